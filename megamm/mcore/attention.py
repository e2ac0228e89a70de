"""Core attention for packed rows: causal inside each document of a row, nothing across, RoPE restarting in each.

Megatron's own core attention knows neither packed rows nor a CPU without Transformer Engine. This one
takes the place of `core_attention` in the layer spec and runs torch's scaled dot product attention
on every device. Megatron hands `attention_mask` through unchanged; here it carries the row's
segments `[B, S]` (data/sample.py), from which the mask and the positions follow.

RoPE is relative, so counting positions through the row would be the same in exact arithmetic, but large
angles lose float32 digits that a document read alone keeps.
Source: Vaswani et al. 2017 (attention); Ainslie et al. 2023 (grouped queries).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megamm.model.rope import cosines_and_sines, inverse_frequencies, rotate


class PackedAttention(MegatronModule):
    """query `[S, B, N/tp, D]`, key and value `[S, B, G/tp, D]`, segments `[B, S]` -> `[S, B, N/tp * D]`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        rope_base: float,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "config.check refuses context parallel"
        assert config.attention_dropout == 0.0, "PackedAttention has no dropout"
        self.layer_number, self.rope_base = layer_number, rope_base
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        assert attention_bias is None and packed_seq_params is None
        frequencies = inverse_frequencies(query.shape[-1], self.rope_base, query.device)
        angles = cosines_and_sines(document_positions(attention_mask), frequencies, query.dtype)
        query, key = rotate(query, *angles), rotate(key, *angles)
        # Grouped keys are repeated: GPU kernels that take a mask and need no S x S scores take no grouped queries.
        per_group = query.shape[2] // key.shape[2]
        if per_group > 1:
            key, value = (x.repeat_interleave(per_group, dim=2) for x in (key, value))
        context = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=document_mask(attention_mask),
            scale=self.softmax_scale,
        )
        return context.permute(2, 0, 1, 3).flatten(2)


def document_mask(segment_BS: torch.Tensor) -> torch.Tensor:
    """`[B, 1, S, S]`, True where a query (row) may see a key (column): same document and not later."""
    same = segment_BS[:, :, None] == segment_BS[:, None, :]
    return same.tril().unsqueeze(1)


def document_positions(segment_BS: torch.Tensor) -> torch.Tensor:
    """`[B, S]`: index of every token in its document (a row's padding is a segment of its own)."""
    index = torch.arange(segment_BS.shape[1], device=segment_BS.device)
    starts = torch.zeros_like(segment_BS)
    starts[:, 1:] = torch.where(segment_BS[:, 1:] != segment_BS[:, :-1], index[1:], 0)
    return index - starts.cummax(dim=1).values
