"""Loads codecs that transformers saved: the supported models, and the adapter for a folder.

A folder written by `save_pretrained` is identified by `model_type` in its config.json. Only JSON and safetensors are
read, in one file or in shards: no pickles, no code from the folder, no network. Weights are kept in float32, whatever
their stored dtype. Adapters: tokenizers/hf/audio.py, tokenizers/hf/visual.py.
"""

import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from megamm.common.errors import UserError
from megamm.tokenizers.hf.audio import AUDIO_ADAPTERS
from megamm.tokenizers.hf.visual import VISUAL_ADAPTERS
from megamm.tokenizers.io import codec_id, read_config, weight_files

logger = logging.getLogger(__name__)

ADAPTERS: dict[str, dict[str, Any]] = {"audio": AUDIO_ADAPTERS, "visual": VISUAL_ADAPTERS}
"""Adapters by tokenizer name and model_type."""
MODELS_WITH_A_CODEC = {"chameleon": "ChameleonModel", "emu3": "Emu3Model", "janus": "JanusModel"}
"""model_type of language models that contain such a codec, with the transformers class that can read it from them."""

RESTORE = "download or copy the folder again, or save it again with save_pretrained"


@dataclass(frozen=True)
class TransformersCodec:
    """A codec that transformers saved: our adapter, the transformers model with its config, and its sizes."""

    adapter: Any
    model_class: Any
    config: Any
    sizes: Any


def describe_codec(folder: Path, values: dict[str, Any]) -> TransformersCodec:
    """The codec of a folder, given its config.json values, for a model_type that has an adapter.

    Raises UserError if the config is damaged, or the adapter does not support this variant of the model.
    """
    tokenizer = next(tokenizer for tokenizer, adapters in ADAPTERS.items() if values["model_type"] in adapters)
    adapter = ADAPTERS[tokenizer][values["model_type"]]
    import transformers  # takes seconds

    model_class = getattr(transformers, adapter.model_class)
    try:
        safe = {k: v for k, v in values.items() if "attn_implementation" not in k}  # it can name code to download
        config = model_class.config_class.from_dict(safe)
        try:
            return TransformersCodec(adapter, model_class, config, adapter.sizes(config))
        except ValueError as error:
            remedy = f"use a supported variant, or train a tokenizer with `megamm tokenizer train {tokenizer}`"
            raise UserError(f"unsupported {adapter.model_class}: {error}", where=folder, remedy=remedy) from error
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds for a config that it cannot use
        raise _unusable(adapter, error, folder) from error


def _unusable(adapter: Any, error: Exception, folder: Path) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{adapter.model_class} cannot be used: {reason}", where=folder, remedy=RESTORE)


def load_hf_codec(folder: Path, tokenizer: str) -> tuple[nn.Module, str]:
    """The adapter around the folder's model, on the CPU and in eval mode, and its codec_id.

    Raises UserError if the model is not one for this tokenizer, is not supported by its adapter, or is damaged.
    """
    values = read_config(folder, tokenizer)
    _check_adapter(str(values["model_type"]), folder, tokenizer)
    state = _read_weights(folder)
    found = describe_codec(folder, values)
    adapter = found.adapter
    try:
        model, report = found.model_class.from_pretrained(
            None, config=found.config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # transformers raises many kinds for weights that it cannot use
        raise _unusable(adapter, error, folder) from error
    missing, unused = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:  # transformers would continue with random weights
        what = f"the weights lack {len(missing)} tensors of {adapter.model_class}, such as {missing[0]}"
        raise UserError(what, where=folder, remedy=RESTORE)
    if unused:
        logger.warning("%s: %d tensors are not used by this config, such as %s", folder, len(unused), unused[0])
    logger.info("%s: %s through transformers %s, %s", folder, adapter.__name__, version("transformers"), found.sizes)
    return adapter(model, found.sizes).eval(), codec_id(folder)


def _check_adapter(model_type: str, folder: Path, tokenizer: str) -> None:
    adapters = ADAPTERS.get(tokenizer, {})
    if model_type in adapters:
        return
    whole = MODELS_WITH_A_CODEC.get(model_type)
    if whole and tokenizer == "visual":
        remedy = f"save only its tokenizer: transformers.{whole}.from_pretrained(FOLDER).vqmodel.save_pretrained(NEW)"
        what = f"a whole {model_type} model, but only its image tokenizer is needed"
        raise UserError(what, where=folder, remedy=remedy)
    remedy = f"give a folder made by `megamm tokenizer train {tokenizer}`"
    if adapters:
        remedy += f", or a transformers model of type {' or '.join(adapters)}"
    what = f"a transformers model of type {model_type!r} is not a tokenizer for {tokenizer}"
    raise UserError(what, where=folder, remedy=remedy)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            what, remedy = f"unreadable weights: {error}", "download or copy the file again"
            raise UserError(what, where=file, remedy=remedy) from error
    return state
