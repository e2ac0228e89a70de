"""config.json of transformers <-> the model section of a run's config, by the family's tables (families.py)."""

import json
from pathlib import Path
from typing import Any

from megamm.config import ModelConfig
from megamm.convert.families import FAMILIES, Family, leaves
from megamm.errors import UserError

_ROPE_SCALING = {  # ours: theirs
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}
_ROPE_NEEDS = {"none": (), "linear": ("factor",), "llama3": tuple(_ROPE_SCALING)}


def family_for(m: ModelConfig) -> Family:
    """The first family that has this model. UserError names the field that keeps it out of the nearest one."""
    refused = {family.architecture: family.refused(m) for family in FAMILIES}
    nearest = min(FAMILIES, key=lambda family: len(refused[family.architecture]))
    if wrong := refused[nearest.architecture]:
        raise UserError(f"{nearest.architecture} cannot express {wrong[0]}", remedy="train without it to export")
    return nearest


def to_config(family: Family, m: ModelConfig, vocabulary_size: int, seq_length: int, special: dict[str, int]) -> Any:
    """transformers' configuration of our backbone; special holds bos/eos/pad token ids."""
    from transformers import CONFIG_MAPPING

    ours = dict(leaves(m.model_dump()))
    values: dict[str, Any] = {theirs: ours[key] for key, theirs in family.fields.items()} | family.fixed
    values |= {"vocab_size": vocabulary_size, "max_position_embeddings": seq_length, **special}
    if "sliding_window" in _defaults(family):
        values["sliding_window"] = None
    scaling = m.rope_scaling
    rope = {_ROPE_SCALING[key]: getattr(scaling, key) for key in _ROPE_NEEDS[scaling.kind]}
    kind = "default" if scaling.kind == "none" else scaling.kind
    values["rope_parameters"] = {"rope_type": kind, "rope_theta": m.rope_base, **rope}
    return CONFIG_MAPPING[family.model_type](architectures=[family.architecture], **values)


def read_model(folder: Path, seq_length: int) -> tuple[Family, ModelConfig]:
    """The family and the backbone that a folder's config.json describes, for rows of seq_length tokens.

    UserError names what is unreadable, or the first key that our backbone cannot express.
    """
    file = folder / "config.json"
    try:
        family, section = read_config(json.loads(file.read_text()), seq_length, file)
        return family, ModelConfig.model_validate(section)
    except (OSError, ValueError) as error:
        raise _unreadable(error, file) from None


def read_config(values: dict[str, Any], seq_length: int, where: Path) -> tuple[Family, dict[str, Any]]:
    """The family of a config.json (its values) and the model section of a run with rows of seq_length tokens.

    UserError names the first key that our backbone cannot express.
    """
    from transformers import CONFIG_MAPPING

    model_type = values.get("model_type")
    family = next((family for family in FAMILIES if family.model_type == model_type), None)
    if family is None:
        known = ", ".join(family.model_type for family in FAMILIES)
        raise UserError(f"model_type {model_type} is none of {known}", where=where, remedy="choose one of these")
    try:
        theirs = CONFIG_MAPPING[family.model_type].from_dict(values)
    except Exception as error:  # whatever transformers makes of a damaged one
        raise _unreadable(error, where) from None
    for key in values:
        if key not in family.known_keys() and key not in _of_any_model() and values[key] is not None:
            raise _inexpressible(key, values[key], where)
    for key, value in family.fixed.items():
        if getattr(theirs, key) != value:
            raise _inexpressible(key, getattr(theirs, key), where)
    if other := set(getattr(theirs, "layer_types", None) or ()) - {"full_attention"}:
        raise _inexpressible("layer_types", sorted(other)[0], where)
    window = getattr(theirs, "sliding_window", None)
    if window is not None and window < seq_length:
        raise _inexpressible(f"sliding_window (below data.seq_length = {seq_length})", window, where)
    section: dict[str, Any] = {}
    for key, value in _ours(family, theirs, where).items():
        *parents, last = key.split(".")
        place = section
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return family, section


def _ours(family: Family, theirs: Any, where: Path) -> dict[str, Any]:
    """Our keys, dotted, and their values."""
    rope = theirs.rope_parameters
    kind = {"default": "none"}.get(rope["rope_type"], rope["rope_type"])
    if kind not in family.rope_kinds or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _inexpressible("rope_parameters", rope, where)
    ours = family.implied | {key: getattr(theirs, name) for key, name in family.fields.items()}
    ours |= {"rope_base": float(rope["rope_theta"]), "rope_scaling.kind": kind}
    ours |= {f"rope_scaling.{key}": rope[_ROPE_SCALING[key]] for key in _ROPE_NEEDS[kind]}
    if ours.get("head_dim", 0) is None:
        ours["head_dim"] = theirs.hidden_size // theirs.num_attention_heads
    if "head_dim" in family.unused:
        ours["head_dim"] = theirs.qk_nope_head_dim + theirs.qk_rope_head_dim
    return ours | {key: ours[other] for key, other in family.same_as.items()}


def _unreadable(error: Exception, where: Path) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"unreadable config: {reason}", where=where, remedy="restore it")


def _inexpressible(key: str, value: Any, where: Path) -> UserError:
    return UserError(f"our backbone cannot express {key} = {value}", where=where, remedy="convert a model without it")


def _defaults(family: Family) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    values: dict[str, Any] = CONFIG_MAPPING[family.model_type]().to_dict()
    return values


def _of_any_model() -> set[str]:
    """Keys that every configuration of transformers has: of generation, of heads for classes, its version."""
    from transformers import PreTrainedConfig

    return {*PreTrainedConfig().to_dict(), "model_type", "torch_dtype", "_name_or_path"}
