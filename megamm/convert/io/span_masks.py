"""The attention masks with which a model of transformers reads bidirectional spans.

Without spans transformers makes the mask itself. With spans it gets one of `[B, 1, S, S]`, or one for each kind of
layer of a model that has full and windowed layers; a window limits how far back a token of a span sees, as in Gemma 3.
"""

from typing import Any

import torch

FULL, WINDOWED = "full_attention", "sliding_attention"


def attention_mask(
    model: Any, is_token_BS: torch.Tensor, span_BS: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return `attention_mask` of a forward pass. is_token: false for padding; span: as in `sample.Row`."""
    if not bool((span_BS >= 0).any()):
        return is_token_BS.long()
    index = torch.arange(span_BS.shape[1], device=span_BS.device)
    is_same_span = (span_BS[:, :, None] == span_BS[:, None, :]) & (span_BS[:, None, :] >= 0)
    is_seen = ((index[:, None] >= index) | is_same_span) & is_token_BS.bool()[:, None, :]
    # A query of padding without any key would give NaN.
    is_seen |= index[:, None] == index
    config = model.config.get_text_config()
    window: int = getattr(config, "sliding_window", None) or 0
    kinds = set(getattr(config, "layer_types", None) or [WINDOWED if window else FULL])
    assert kinds <= {FULL, WINDOWED}, "the families of an export have no other layers"
    masks = {}
    for kind in kinds:
        seen = is_seen & (index[:, None] - index < window) if kind == WINDOWED else is_seen
        nothing = torch.finfo(model.dtype).min
        masks[kind] = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill_(~seen, nothing)[
            :, None
        ]
    return masks if len(masks) > 1 else masks.popitem()[1]
