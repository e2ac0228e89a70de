"""Tensors of a Hugging Face folder that transformers' classes do not use, and that are therefore not converted.

Some files have buffers that follow from the configuration (RoPE frequencies, causal masks), and those of DeepSeek-V3
have prediction modules after the last layer, which transformers' causal language models do not load.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from megamm.checkpoint.tensor_shards import Shape

_ANGLES = re.compile(r"(^|\.)rotary_emb\.((original_)?inv_freq|cos_cached|sin_cached)$")
_MASK = re.compile(r"\.(attn|self_attn|attention)\.(masked_bias|bias)$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def unused(folder: Path, shapes: Iterable[tuple[str, Shape]]) -> dict[str, str]:
    """The names that transformers does not use, each with its kind; shapes: names and shapes of all tensors."""
    prediction = _prediction_layers(folder / "config.json")
    found = {}
    for name, shape in shapes:
        layer = _LAYER.match(name)
        if _ANGLES.search(name):
            found[name] = "RoPE frequencies"
        # A scalar, or a causal mask [1, 1, S, S]; a bias has one axis.
        elif _MASK.search(name) and len(shape) in (0, 4):
            found[name] = "causal masks"
        elif layer and int(layer[1]) in prediction:
            found[name] = "modules of multi-token prediction"
    return found


def _prediction_layers(file: Path) -> range:
    """Numbers of the prediction modules' layers, which follow the model's own."""
    try:
        config = json.loads(file.read_text())
        first = int(config["num_hidden_layers"])
        default = 1 if config.get("model_type") == "deepseek_v3" else 0  # that of its class
        count = config.get("num_nextn_predict_layers", config.get("num_mtp_layers", default))
        return range(first, first + int(count or 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged config.json is reported elsewhere
        return range(0)


def summary(found: dict[str, str]) -> str:
    """One line on these tensors, for the log."""
    kinds = sorted(set(found.values()))
    return f"skipping {len(found)} tensors that transformers does not use ({', '.join(kinds)}), as {min(found)}"
