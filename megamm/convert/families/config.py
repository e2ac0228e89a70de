"""Converts config.json of transformers <-> the model section of a run's config, by the tables in tables.py."""

import json
import logging
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megamm.common.errors import UserError
from megamm.config import ModelConfig
from megamm.convert.families.family import IF_GIVEN, Family, leaves
from megamm.convert.families.read_keys import read_keys
from megamm.convert.families.tables import FAMILIES

log = logging.getLogger(__name__)

_ROPE_SCALING = {  # ours: theirs
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
    **{name: name for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")},
}
_ROPE_NEEDS = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_length"),
    "yarn": ("factor", "original_length", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}
_NONE = ("mla.q_lora_rank", "attention_softcap", "logit_softcap")
"""Our keys that are 0 where theirs are None."""


_OWN_KEYS = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "vocab_size"}
_OWN_KEYS |= {"rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq", "bos_token_id", "eos_token_id"}
_OWN_KEYS |= {"sliding_window", "use_sliding_window", "layer_types", "sliding_window_pattern", "max_window_layers"}
_OWN_KEYS |= {"pad_token_id", "auto_map", "quantization_config", "num_nextn_predict_layers"}
"""Keys of an origin's config.json that an export does not take over: it has its own values, or nothing of the kind."""


def family_for(m: ModelConfig, origin: Mapping[str, Any] | None = None) -> Family:
    """The family of the origin (TrainState.origin), or else the first one, that can express this model.

    Raises UserError naming the field that excludes the nearest one.
    """
    known = next((f for f in FAMILIES if origin is not None and f.model_type == _type_of(origin["config"])), None)
    if known is not None and not known.refused(m):
        return known
    # The nearest family refuses the fewest keys; of equal ones, the first of the table.
    refused = {family.architecture: family.refused(m) for family in FAMILIES}
    nearest = min(FAMILIES, key=lambda family: len(refused[family.architecture]))
    if wrong := refused[nearest.architecture]:
        what = f"{nearest.architecture} cannot express {wrong[0]}"
        raise UserError(what, remedy=f"to export, train with another value of {wrong[0]}")
    return nearest


def _type_of(values: Mapping[str, Any]) -> str | None:
    """The model_type of a config.json; as in transformers' AutoConfig, a Mistral with layer_types is a Ministral."""
    found = values.get("model_type")
    return "ministral" if found == "mistral" and "layer_types" in values else found


def to_config(
    family: Family,
    m: ModelConfig,
    vocabulary_size: int,
    seq_length: int,
    special: Mapping[str, Any],
    origin: Mapping[str, Any] | None = None,
) -> Any:
    """transformers' configuration of our backbone; special: the bos/eos/pad token ids.

    vocabulary_size: rows of the vocabulary's tables; origin: config.json of the model that the weights came from, for
    what is not in ours: the positions that it was made for, and keys that do not change what the weights compute.
    """
    from transformers import CONFIG_MAPPING

    origin = origin or {}
    is_same_family = _type_of(origin) == family.model_type
    if is_same_family and origin.get("num_hidden_layers") == m.num_layers:
        m = _with_dropped_windows(family, m, seq_length, origin)
    ours = dict(leaves(m.model_dump()))
    values = _carried(origin) if is_same_family else {}
    values |= {theirs: ours[key] for key, theirs in family.fields.items()} | family.fixed
    # Their key is the factor between two of ours.
    values |= {count: ours[key] // ours[other] for key, (other, count) in family.multiples.items()}
    # 0 means none there.
    values |= {family.fields[key]: None for key in _NONE if key in family.fields and not ours[key]}
    positions = max(seq_length, origin.get("max_position_embeddings") or 0)
    values |= {"vocab_size": vocabulary_size, "max_position_embeddings": positions, **special}
    values |= _to_windows(family, m)
    if "num_nextn_predict_layers" in _defaults(family):
        values["num_nextn_predict_layers"] = 0
    scaling = m.rope_scaling
    rope = {_ROPE_SCALING[key]: getattr(scaling, key) for key in _ROPE_NEEDS[scaling.kind]}
    if scaling.kind == "yarn":  # other engines do not know some keys: written only where they have an effect
        if not scaling.mscale_all_dim and not m.mla.kv_lora_rank:
            del rope["mscale"], rope["mscale_all_dim"]
        rope |= {"attention_factor": scaling.attention_factor} if scaling.attention_factor else {}
        rope |= {} if scaling.truncate else {"truncate": False}
    kind = "default" if scaling.kind == "none" else scaling.kind
    rope = {"rope_type": kind, "rope_theta": m.rope_base, **rope}
    local = {"rope_type": "default", "rope_theta": m.window.rope_base or m.rope_base}
    by_layer = {"full_attention": rope, "sliding_attention": local}
    values["rope_parameters"] = by_layer if family.has_local_rope else rope
    return CONFIG_MAPPING[family.model_type](architectures=[family.architecture], **values)


def _carried(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that an export of the same family takes over from the config.json of its origin."""
    from transformers import GenerationConfig

    # Old files have generation settings here; they are in generation_config.json now (io/origin.py).
    others = _OWN_KEYS | (GenerationConfig().to_dict().keys() - {"use_cache"})
    return {key: value for key, value in origin.items() if key not in others and not key.startswith("_")}


def _with_dropped_windows(family: Family, m: ModelConfig, seq_length: int, origin: Mapping[str, Any]) -> ModelConfig:
    """The model with the windows that `_windows` has dropped because they are not shorter than a row."""
    from transformers import CONFIG_MAPPING

    if m.window.size or family.windows == "none":
        return m
    theirs = CONFIG_MAPPING[family.model_type].from_dict({**origin, "model_type": family.model_type})
    found = _windows(family, theirs, sys.maxsize, Path("config.json"))
    if found.get("window.size", 0) < seq_length:
        return m
    window = m.window.model_copy(update={key.removeprefix("window."): value for key, value in found.items()})
    return m.model_copy(update={"window": window})


def _to_windows(family: Family, m: ModelConfig) -> dict[str, Any]:
    defaults, size, full = _defaults(family), m.window.size, m.window.full_layers
    values: dict[str, Any] = {"sliding_window": size} if size else {}
    if not size and family.windows == "all":
        values["sliding_window"] = None
    if "use_sliding_window" in defaults:
        values["use_sliding_window"] = size > 0
    if "max_window_layers" in defaults and full == list(range(len(full))):
        # For engines that do not read layer_types: layers from this one on have the window.
        values["max_window_layers"] = len(full) if size else m.num_layers
    if "layer_types" in defaults:
        kinds = ["sliding_attention" if size and i not in full else "full_attention" for i in range(m.num_layers)]
        values["layer_types"] = kinds
    return values


def read_model(folder: Path, seq_length: int) -> tuple[Family, ModelConfig]:
    """The family and the backbone that a folder's config.json describes, for rows of seq_length tokens.

    Raises UserError if it is unreadable, or for the first key that our backbone cannot express.
    """
    file = folder / "config.json"
    try:
        family, section = read_config(json.loads(file.read_text()), seq_length, file)
        return family, ModelConfig.model_validate(section)
    except (OSError, ValueError) as error:
        raise _unreadable(error, file) from None


def family_of(values: Any, where: Path) -> Family:
    """The family of a config.json. Raises UserError if there is none."""
    if not isinstance(values, dict):
        raise _unreadable(TypeError("not a JSON object"), where)
    found = next((family for family in FAMILIES if family.model_type == _type_of(values)), None)
    if found is None:
        known = ", ".join(family.model_type for family in FAMILIES)
        what = f"model_type {values.get('model_type')} is not supported"
        raise UserError(what, where=where, remedy=f"choose one of {known}")
    return found


def read_config(values: dict[str, Any], seq_length: int, where: Path) -> tuple[Family, dict[str, Any]]:
    """The family of a config.json (its values), and the model section of a run with rows of seq_length tokens.

    Raises UserError for the first key that our backbone cannot express.
    """
    from transformers import CONFIG_MAPPING

    family = family_of(values, where)
    try:
        theirs = CONFIG_MAPPING[family.model_type].from_dict(values | {"model_type": family.model_type})
    except Exception as error:  # transformers raises many kinds for a damaged one
        raise _unreadable(error, where) from None
    if unread := unread_keys(family, values, where):
        log_skipped(where, family.architecture, ", ".join(unread))
    for key, value in family.fixed.items():
        if getattr(theirs, key) != value:
            raise _inexpressible(key, getattr(theirs, key), where)
    for key, value in (IF_GIVEN | family.if_given).items():
        if values.get(key, value) != value:
            raise _inexpressible(key, values[key], where)
    section = _nested(_ours(family, theirs, where, _windows(family, theirs, seq_length, where)))
    if wrong := family.wrong(ModelConfig.model_validate(section)):
        name = family.fields.get(wrong, wrong)
        raise _inexpressible(name, getattr(theirs, name, theirs.rope_parameters), where)
    return family, section


@cache
def log_skipped(where: Path, architecture: str, names: str) -> None:
    """Log the skipped keys of a file, once: it is read several times."""
    log.info("%s: skipping keys that transformers' %s does not read: %s", where, architecture, names)


def unread_keys(family: Family, values: dict[str, Any], where: Path) -> list[str]:
    """Keys of a config.json that transformers does not read. Raises UserError for one that only our tables lack."""
    known, unread = family.known_keys() | _of_any_model(), []
    for key, value in values.items():
        # Keys with a leading _ are notes on the file's origin; token ids are read from the tokenizer.
        if key in known or key.startswith("_") or key.endswith("_token_id") or value is None:
            continue
        if key in read_keys(family.model_type):
            raise _inexpressible(key, value, where)
        unread.append(key)
    return unread


def _nested(dotted: dict[str, Any]) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for key, value in dotted.items():
        *parents, last = key.split(".")
        inner = section
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return section


def _windows(family: Family, theirs: Any, seq_length: int, where: Path) -> dict[str, Any]:
    """Our dotted keys. A window as long as a row counts as none, unless its layers use other RoPE angles.

    An export has it again (`_with_dropped_windows`).
    """
    size, kinds = getattr(theirs, "sliding_window", None), getattr(theirs, "layer_types", None)
    if other := set(kinds or ()) - {"full_attention", "sliding_attention"}:
        raise _inexpressible("layer_types", sorted(other)[0], where)
    full = [i for i, kind in enumerate(kinds or ()) if kind == "full_attention"]
    if size is None or len(full) == theirs.num_hidden_layers or (size >= seq_length and not family.has_local_rope):
        return {}
    if family.windows == "none":
        raise _inexpressible(f"sliding_window (below data.seq_length = {seq_length})", size, where)
    return {"window.size": size, "window.full_layers": full}


def _ours(family: Family, theirs: Any, where: Path, windows: dict[str, Any]) -> dict[str, Any]:
    """Our dotted keys with their values, given those of the windows."""
    rope = theirs.rope_parameters
    if family.has_local_rope:
        # Layers with a window have a RoPE of their own, which must be without scaling.
        rope, local = rope["full_attention"], rope["sliding_attention"]
        if windows and local["rope_type"] != "default":
            raise _inexpressible("rope_parameters", local, where)
        windows = windows and windows | {"window.rope_base": float(local["rope_theta"])}
    kind = {"default": "none"}.get(rope["rope_type"], rope["rope_type"])
    latent = "mla.kv_lora_rank" in family.fields
    if kind == "yarn":
        rope = _yarn(rope, theirs.max_position_embeddings, latent)
    if kind not in family.rope_kinds or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _inexpressible("rope_parameters", rope, where)
    has_more = kind == "yarn" and (rope.get("attention_factor") or not rope.get("truncate", True))
    if latent and (has_more or (rope.get("mscale_all_dim") and not rope.get("mscale"))):
        raise _inexpressible("rope_parameters", rope, where)
    # Later entries override earlier ones: what all models of the family have, then what this one has.
    ours = family.implied | windows | {key: getattr(theirs, name, None) for key, name in family.fields.items()}
    ours |= {"rope_base": float(rope["rope_theta"]), "rope_scaling.kind": kind}
    optional = ("attention_factor", "truncate") if kind == "yarn" else ()
    named = {key: rope.get(_ROPE_SCALING[key]) for key in (*_ROPE_NEEDS[kind], *optional)}
    ours |= {f"rope_scaling.{key}": value for key, value in named.items() if value is not None}
    # Some of our keys have no field of theirs: they follow from None, or from other keys.
    ours |= {key: 0 for key in _NONE if ours.get(key, 0) is None}
    if ours.get("head_dim", 0) is None:
        ours["head_dim"] = theirs.hidden_size // theirs.num_attention_heads
    if "head_dim" in family.unused:
        ours["head_dim"] = theirs.qk_nope_head_dim + theirs.qk_rope_head_dim
    ours |= {key: ours[other] for key, other in family.same_as.items()}
    return ours | {key: ours[other] * getattr(theirs, n) for key, (other, n) in family.multiples.items()}


def _yarn(rope: dict[str, Any], max_position: int, latent: bool) -> dict[str, Any]:
    """The parameters of YaRN with transformers' rules for missing ones; latent: for latent attention."""
    rope = {key: value for key, value in rope.items() if value is not None}
    if "factor" not in rope:
        rope["factor"] = max_position / rope["original_max_position_embeddings"]
    rope |= {key: default for key, default in (("beta_fast", 32), ("beta_slow", 1)) if not rope.get(key)}
    if not latent and not (rope.get("mscale") and rope.get("mscale_all_dim")):
        # One alone has no effect, except that latent attention also scales its softmax by mscale_all_dim.
        rope = {key: value for key, value in rope.items() if not key.startswith("mscale")}
    return rope


def _unreadable(error: Exception, where: Path) -> UserError:
    if isinstance(error, ValidationError):
        found = error.errors(include_url=False)[0]
        value = f"model.{'.'.join(map(str, found['loc']))} = {found['input']}"
        return UserError(f"impossible config: {value}: {found['msg']}", where=where, remedy="correct it")
    reason = " ".join(str(error).split())[:200]
    return UserError(f"unreadable config: {reason}", where=where, remedy="download or copy the file again")


def _inexpressible(key: str, value: Any, where: Path) -> UserError:
    return UserError(f"our backbone cannot express {key} = {value}", where=where, remedy="convert a model without it")


def _defaults(family: Family) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    values: dict[str, Any] = CONFIG_MAPPING[family.model_type]().to_dict()
    return values


def _of_any_model() -> set[str]:
    """Keys that every transformers configuration has: generation, classification heads, version."""
    from transformers import GenerationConfig, PreTrainedConfig

    generation = GenerationConfig().to_dict()  # settings of generation, in older files
    return {*PreTrainedConfig().to_dict(), *generation, "model_type", "torch_dtype", "_name_or_path"}
