"""What tensors a model of transformers has on disk: names and shapes as its own class has them.

No table of ours is asked: the class is built without values, and what `save_pretrained` does to names and shapes is
done to its tensors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megamm.checkpoint.blocks import Shape
from megamm.errors import UserError
from megamm.tiers.tensors import Described

FLOATS = ("float32", "bfloat16", "float16")


def read_config(folder: Path) -> Any:
    """The configuration of a folder. UserError for a config.json that transformers makes none of."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of a damaged one
        raise _no_model(error, folder / "config.json") from None


def problems(config: Any, found: Mapping[str, Described], where: Path) -> list[str]:
    """Of a model's tensors: what is missing, unknown, of another shape than its configuration says, or no float.

    UserError, about the file `where`, for a configuration that no class of transformers can be built of.
    """
    try:
        shapes, tied = _expected(config)
    except Exception as error:  # whatever transformers makes of sizes that no model has
        raise _no_model(error, where) from None
    lines = [f"{name} is missing" for name in sorted(shapes.keys() - found.keys() - tied)]
    lines += [f"{name} has no place in the model" for name in sorted(found.keys() - shapes.keys())]
    for name in sorted(shapes.keys() & found.keys()):
        if found[name].shape != shapes[name]:
            lines.append(f"{name} is {list(found[name].shape)}, the config says {list(shapes[name])}")
        elif found[name].dtype not in FLOATS:
            lines.append(f"{name} has values of {found[name].dtype}, none of {', '.join(FLOATS)}")
    return lines


def _expected(config: Any) -> tuple[dict[str, Shape], set[str]]:
    """Shapes by name, and names that may be left out because they are tied to another."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    on_disk = revert_weight_conversion(model, model.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in on_disk.items()}, set(model.all_tied_weights_keys)


def check(folder: Path, found: Mapping[str, Described]) -> None:
    """UserError that names the first problem of a folder's tensors."""
    lines = problems(read_config(folder), found, folder / "config.json")
    if lines:
        more = f", and {len(lines) - 1} more" if len(lines) > 1 else ""
        what = f"the weights do not fit config.json: {lines[0]}{more}"
        raise UserError(what, where=folder, remedy="restore the folder")


def _no_model(error: Exception, where: Path) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"no model of transformers: {type(error).__name__} {reason}", where=where, remedy="restore it")
