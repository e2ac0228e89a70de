"""Exports a codec's encoder or decoder alone: an image decoder (ids to pixels), an audio encoder (waveform to ids).

The exported folder has the codec's config.json with the added key `half`, and model.safetensors without the tensors
that only the other module needs, in float32. Its results are bit-identical to the whole codec's.
"""

import json
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from megamm.common.errors import UserError
from megamm.tokenizers.audio.model import KIND as AUDIO
from megamm.tokenizers.audio.model import AudioCodec
from megamm.tokenizers.io import WEIGHTS, checked_config, read_config
from megamm.tokenizers.load import load_codec
from megamm.tokenizers.visual.model import KIND as VISUAL
from megamm.tokenizers.visual.model import VisualCodec

CodecModule = Literal["encoder", "decoder"]
KINDS: dict[str, dict[str, Any]] = {
    "audio": {AUDIO: AudioCodec},
    "visual": {VISUAL: VisualCodec},
}
"""Our own codecs, by tokenizer name and kind."""
_VQGAN: dict[str, tuple[str, ...]] = {
    "encoder": ("model.encoder", "model.quant_conv"),
    "decoder": ("model.decoder", "model.post_quant_conv"),
}
_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    VISUAL: {"encoder": ("encoder",), "decoder": ("decoder",)},
    AUDIO: {"encoder": ("encoder",), "decoder": ("decoder", "norm", "head")},
    "mimi": {
        "encoder": ("model.encoder", "model.encoder_transformer", "model.downsample"),
        "decoder": ("model.decoder", "model.decoder_transformer", "model.upsample"),
    },
    "encodec": {"encoder": ("model.encoder",), "decoder": ("model.decoder",)},
    "dac": {"encoder": ("model.encoder",), "decoder": ("model.decoder",)},
    "emu3_vqgan": _VQGAN,
    "janus_vqgan": _VQGAN,
}
"""Submodules that only the encoder or only the decoder needs, by kind (model_type for transformers' codecs).
Chameleon's has no decoder."""
_REMEDY = "create it again with `megamm convert modules`"


def save_module(codec: Path, tokenizer: str, module: CodecModule, target: Path) -> bool:
    """Write this module of a codec folder into `target`, created if necessary; False if it cannot be exported alone.

    tokenizer: the codec's name in a run's `tokenizers`.
    """
    values = read_config(codec, tokenizer)
    parts = _PARTS.get(_kind(values))
    if parts is None:
        return False
    whole, _ = load_codec(codec, KINDS[tokenizer], tokenizer)
    kept = {
        name: tensor.detach().contiguous()
        for name, tensor in whole.state_dict().items()
        if not _is_in(name, parts[_other(module)])
    }
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(values | {"half": module}, indent=2) + "\n")
    save_file(kept, target / WEIGHTS, metadata={"format": "pt"})
    return True


def load_module(folder: Path) -> Any:
    """The encoder or decoder on the CPU, in eval mode, with `encode` or `decode` as in the whole codec.

    Raises UserError if the folder was not written by `save_module` or is damaged.
    """
    values = read_config(folder, "an encoder or decoder alone", _REMEDY)
    module = values.pop("half", None)
    parts = _PARTS.get(_kind(values))
    if module not in ("encoder", "decoder") or parts is None:
        raise UserError("not the encoder or decoder of a tokenizer", where=folder, remedy=_REMEDY)
    codec = _whole(_kind(values), values, folder)
    absent = parts[_other(module)]
    try:
        missing, unknown = codec.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"weights do not fit the config: {reason}", where=folder, remedy=_REMEDY) from error
    if wrong := [name for name in missing if not _is_in(name, absent)] + list(unknown):
        raise UserError(f"{wrong[0]} is missing or unknown", where=folder, remedy=_REMEDY)
    for part in absent:  # it has random weights, which must not be used
        parent, _, name = part.rpartition(".")
        owner = codec.get_submodule(parent)
        if hasattr(owner, name):
            delattr(owner, name)
    return codec.eval()


def _whole(kind: str, values: dict[str, Any], folder: Path) -> nn.Module:
    for codecs in KINDS.values():
        if kind in codecs:
            module: nn.Module = codecs[kind](checked_config(codecs[kind].Config, values, folder / "config.json"))
            return module
    from megamm.tokenizers.hf.load import describe_codec  # brings transformers

    found = describe_codec(folder, values)
    return found.adapter(found.model_class(found.config), found.sizes)


def _kind(values: dict[str, Any]) -> str:
    return str(values.get("kind", values.get("model_type")))


def _other(module: str) -> str:
    return "decoder" if module == "encoder" else "encoder"


def _is_in(name: str, parts: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{part}.") for part in parts)
