"""The tensors that a transformers model has on disk: names and shapes, taken from its own class.

This uses none of our tables: the class is built without values, and the changes that `save_pretrained` makes to names
and shapes are applied to its tensors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megamm.checkpoint.tensor_shards import Shape
from megamm.checkpoint.whole_tensors import Described
from megamm.common.errors import UserError

FLOATS = ("float32", "bfloat16", "float16")


def read_config(folder: Path) -> Any:
    """The configuration of a folder. Raises UserError if transformers cannot read its config.json."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a damaged one
        raise _no_model(error, folder / "config.json") from None


def problems(config: Any, found: Mapping[str, Described], where: Path) -> list[str]:
    """Problems with a model's tensors: missing, unknown, wrong shape, or not floating point.

    Raises UserError, about the file `where`, if transformers cannot build a model from the configuration.
    """
    try:
        shapes, tied = _expected(config)
    except Exception as error:  # transformers raises many kinds for impossible sizes
        raise _no_model(error, where) from None
    lines = [f"{name} is missing" for name in sorted(shapes.keys() - found.keys() - tied)]
    lines += [f"{name} is not a tensor of the model" for name in sorted(found.keys() - shapes.keys())]
    for name in sorted(shapes.keys() & found.keys()):
        if found[name].shape != shapes[name]:
            lines.append(f"{name} has the shape {list(found[name].shape)}, the config requires {list(shapes[name])}")
        elif found[name].dtype not in FLOATS:
            lines.append(f"{name} has the dtype {found[name].dtype}, expected one of {', '.join(FLOATS)}")
    return lines


def _expected(config: Any) -> tuple[dict[str, Shape], set[str]]:
    """Shapes by name, and the names that may be missing because they are tied to another tensor."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    on_disk = revert_weight_conversion(model, model.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in on_disk.items()}, set(model.all_tied_weights_keys)


def check(folder: Path, found: Mapping[str, Described]) -> None:
    """Raise UserError for the first problem with a folder's tensors."""
    lines = problems(read_config(folder), found, folder / "config.json")
    if lines:
        more = f", and {len(lines) - 1} more" if len(lines) > 1 else ""
        what = f"the weights do not fit config.json: {lines[0]}{more}"
        remedy = "download or copy the folder again"
        if lines[0] == "lm_head.weight is missing":  # an embedding model, a classifier
            remedy = "choose a checkpoint with the output layer of a language model"
        raise UserError(what, where=folder, remedy=remedy)


def _no_model(error: Exception, where: Path) -> UserError:
    reason = " ".join(str(error).split())[:200]
    what = f"transformers cannot build this model: {type(error).__name__} {reason}"
    return UserError(what, where=where, remedy="correct the config, or download or copy the folder again")
