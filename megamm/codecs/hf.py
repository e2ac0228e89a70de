"""Codecs that transformers saved: which there are, and the way from their folder to an adapter.

A folder written by `save_pretrained` says what it is by `model_type` in its config.json; nothing else is needed. What
is read is JSON and safetensors, in one file or in shards: no pickles, no code of the folder's, no network. Weights are
held in float32, whatever they were saved in. Adapters: codecs/hf_audio.py, codecs/hf_visual.py.
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

from megamm.codecs.folders import codec_id, read_config, weight_files
from megamm.codecs.hf_audio import AUDIO_ADAPTERS
from megamm.codecs.hf_visual import VISUAL_ADAPTERS
from megamm.errors import UserError

logger = logging.getLogger(__name__)

ADAPTERS: dict[str, dict[str, Any]] = {"audio": AUDIO_ADAPTERS, "visual": VISUAL_ADAPTERS}
"""By family and model_type."""
MODELS_WITH_A_CODEC = {"chameleon": "ChameleonModel", "emu3": "Emu3Model", "janus": "JanusModel"}
"""model_type of the language models that hold such a codec, with the class of transformers that reads it from them."""

RESTORE = "restore the folder, or save it anew with save_pretrained"


@dataclass(frozen=True)
class Form:
    """What a folder holds: the adapter of ours, the model of transformers with its config, what is known of sizes."""

    adapter: Any
    model_class: Any
    config: Any
    sizes: Any


def form_of(folder: Path, values: dict[str, Any]) -> Form:
    """From the values of a folder's config.json, of a model_type that has an adapter.

    UserError if the config is damaged, or the model is of a form that its adapter cannot use.
    """
    family = next(family for family, adapters in ADAPTERS.items() if values["model_type"] in adapters)
    adapter = ADAPTERS[family][values["model_type"]]
    import transformers  # seconds

    model_class = getattr(transformers, adapter.model_class)
    try:
        safe = {k: v for k, v in values.items() if "attn_implementation" not in k}  # it can name code to download
        config = model_class.config_class.from_dict(safe)
        try:
            return Form(adapter, model_class, config, adapter.sizes(config))
        except ValueError as error:
            remedy = f"use one of another form, or train a codec with `megamm tokenizer train {family}`"
            raise UserError(f"{adapter.model_class} of no usable form: {error}", where=folder, remedy=remedy) from error
    except UserError:
        raise
    except Exception as error:  # transformers raises nearly any class for a config that it cannot use
        raise _unusable(adapter, error, folder) from error


def _unusable(adapter: Any, error: Exception, folder: Path) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{adapter.model_class} cannot be used: {reason}", where=folder, remedy=RESTORE)


def load_hf_codec(folder: Path, family: str) -> tuple[nn.Module, str]:
    """The adapter around the folder's model, on the CPU and in eval mode, and its codec_id.

    UserError if the model is no codec of this family, is of a form that its adapter cannot use, or is damaged.
    """
    values = read_config(folder, family)
    _check_adapter(str(values["model_type"]), folder, family)
    state = _read_weights(folder)
    form = form_of(folder, values)
    adapter = form.adapter
    try:
        model, report = form.model_class.from_pretrained(
            None, config=form.config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # transformers raises nearly any class for weights that it cannot use
        raise _unusable(adapter, error, folder) from error
    missing, unused = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:  # transformers would go on with random ones
        what = f"the weights lack {len(missing)} tensors of {adapter.model_class}, such as {missing[0]}"
        raise UserError(what, where=folder, remedy=RESTORE)
    if unused:
        logger.warning("%s: %d tensors have no use in this config, such as %s", folder, len(unused), unused[0])
    logger.info("%s: %s through transformers %s, %s", folder, adapter.__name__, version("transformers"), form.sizes)
    return adapter(model, form.sizes).eval(), codec_id(folder)


def _check_adapter(model_type: str, folder: Path, family: str) -> None:
    adapters = ADAPTERS.get(family, {})
    if model_type in adapters:
        return
    whole = MODELS_WITH_A_CODEC.get(model_type)
    if whole and family == "visual":
        remedy = f"save its codec alone: transformers.{whole}.from_pretrained(FOLDER).vqmodel.save_pretrained(NEW)"
        raise UserError(
            f"a whole {model_type} model, of which only the image codec is needed", where=folder, remedy=remedy
        )
    remedy = f"name a folder made by `megamm tokenizer train {family}`"
    if adapters:
        remedy += f", or a transformers model of type {' or '.join(adapters)}"
    raise UserError(f"a transformers model of type {model_type!r} is no {family} codec", where=folder, remedy=remedy)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"unreadable weights: {error}", where=file, remedy="restore the file") from error
    return state
