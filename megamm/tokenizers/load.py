"""Loads a trained tokenizer (codec) from its folder: one of ours by its `kind`, or one that transformers saved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from megamm.common.errors import UserError
from megamm.tokenizers.io import WEIGHTS, checked_config, codec_id, read_config
from megamm.tokenizers.visual.model import KIND, VisualCodec


def load_codec(folder: Path, kinds: Mapping[str, Any], tokenizer: str) -> tuple[Any, str]:
    """The codec on the CPU and its codec_id: the class that `kinds` has for the folder's `kind`.

    For a folder saved by transformers it returns its adapter. tokenizer: the codec's name in a run's `tokenizers`.
    Raises UserError for a codec of another one, or a damaged codec.
    """
    values = read_config(folder, tokenizer)
    if "kind" not in values and "model_type" in values:
        from megamm.tokenizers.hf.load import load_hf_codec  # brings transformers

        return load_hf_codec(folder, tokenizer)
    kind = str(values.get("kind"))
    if kind not in kinds:
        what = f"a tokenizer of kind {kind!r} is not one for {tokenizer}"
        raise UserError(what, where=folder, remedy=f"give one of kind {' or '.join(kinds)}")
    codec = kinds[kind](checked_config(kinds[kind].Config, values, folder / "config.json"))
    try:
        codec.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        what = f"weights do not fit the config: {reason}"
        raise UserError(what, where=folder / WEIGHTS, remedy="retrain the tokenizer") from error
    return codec, codec_id(folder)


def load_visual_codec(folder: Path) -> tuple[VisualCodec, str]:
    """The codec on the CPU and its codec_id. Raises UserError if it is not a visual codec or is damaged."""
    return load_codec(folder, {KIND: VisualCodec}, "visual")
