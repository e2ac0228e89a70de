"""Loads a run's configuration from a YAML file plus dotted `key=value` overrides.

An unknown key or a value of the wrong type is a one-line error; for an unknown key it names the nearest valid one.
Keys of earlier versions (RENAMED) are still read, from files, overrides, checkpoints and exports.
"""

import copy
import difflib
import logging
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megamm.common.errors import UserError
from megamm.config.sections import RunConfig

log = logging.getLogger(__name__)

RENAMED = {
    "start_from": "init_from",
    "checkpoint.durable": "checkpoint.remote",
    "train.global_batch": "train.global_batch_size",
    "train.micro_batch": "train.micro_batch_size",
    "parallel.context_exchange": "parallel.cp_comm_type",
    "deepspeed.offload": "deepspeed.offload_optimizer",
    "resilience.rendezvous.join": "resilience.rendezvous.join_timeout",
    "resilience.rendezvous.last_call": "resilience.rendezvous.last_call_timeout",
    "resilience.rendezvous.keep_alive": "resilience.rendezvous.keep_alive_interval",
}
"""Keys of version 0.1 and their names today, which are those of Megatron-LM, DeepSpeed and torch's rendezvous. Never
remove a line: checkpoints and exports record the config of their run."""
REPLACED = {("train.recompute", "selective"): "none"}
"""Values of version 0.1 that mean another one today: attention keeps too little for recomputing it to save memory."""
WORD_OR_SECTION = ("train.recompute",)
"""Keys whose value may be one word or a section: an override of a key of the section replaces the word."""
_logged: set[str] = set()


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the YAML file, apply overrides like `train.steps=100`, validate. The UserError names the key."""
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError("no such config file", where=path, remedy="start from one of examples/*.yaml") from None
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {error}", where=path, remedy="correct the line named above") from None
    if not isinstance(data, dict):
        raise UserError("the config is not a mapping", where=path, remedy="start from examples/cpu_tiny.yaml")
    apply_overrides(data, overrides, where=path)
    return config_from_dict(data, where=path)


def config_from_dict(data: dict[str, Any], where: str | Path) -> RunConfig:
    """Validate a plain mapping (from YAML, or as recorded in a checkpoint)."""
    data = copy.deepcopy(data)
    rename_keys(data, where)
    _check_keys(RunConfig, data, "", where)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        # Where a value may be a section or something else, pydantic also names the section's class.
        key = ".".join(part for part in map(str, first["loc"]) if not part.endswith("Config"))
        given = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r})"
        raise UserError(f"{key}: {first['msg']}{given}", where=where, remedy="correct this key") from None


def rename_keys(data: dict[str, Any], where: str | Path) -> None:
    """Replace keys and values of earlier versions in a plain mapping by today's; log one line for each.

    Raises UserError if a key is given under both names.
    """
    for (key, old_value), value in REPLACED.items():
        *parents, last = key.split(".")
        section = _section_at(data, parents)
        if section is not None and section.get(last) == old_value:
            section[last] = value
            _log_once(f"{key}={old_value}", f"{key}={old_value} is now {value}", where)
    for old, new in RENAMED.items():
        *parents, old_key = old.split(".")
        section, new_key = _section_at(data, parents), new.rpartition(".")[2]  # a key stays in its section
        if section is None or old_key not in section:
            continue
        if new_key in section:
            raise UserError(f"{old} and {new} are both given", where=where, remedy=f"remove {old}, the earlier name")
        value = section[new_key] = section.pop(old_key)
        # For a section, name each of its keys in full: this is what a user searches for.
        inner = [f".{key}" for key in value] if isinstance(value, dict) and value else [""]
        for key in inner:
            _log_once(old + key, f"the key {old}{key} is now {new}{key}", where)


def _section_at(data: dict[str, Any], parents: list[str]) -> dict[str, Any] | None:
    section: Any = data
    for parent in parents:
        section = section.get(parent) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else None


def _log_once(old: str, text: str, where: str | Path) -> None:
    """Log what replaces `old`, once per process: a stored config is read several times, and by every rank."""
    if old not in _logged and os.environ.get("RANK", "0") == "0":
        log.warning("%s: %s", where, text)
    _logged.add(old)


def apply_overrides(data: dict[str, Any], overrides: Sequence[str], where: str | Path = "config") -> None:
    """Set keys of a plain mapping from `key=value`. Raises UserError for any other form. where: for log and errors.

    Mapping and overrides may have keys of earlier versions. The last override of a key counts, under either name.
    """
    rename_keys(data, where)
    for override in overrides:
        _apply_override(data, override)


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} is not key=value", remedy="use the form train.steps=100")
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            given, key = key, new + key.removeprefix(old)
            _log_once(given, f"the key {given} is now {key}", f"override {override!r}")
    *parents, last = key.split(".")
    section: Any = data
    for depth, parent in enumerate(parents, 1):
        if isinstance(section.get(parent), str) and ".".join(parents[:depth]) in WORD_OR_SECTION:
            section[parent] = {}
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise UserError(
                f"override {override!r}: {parent} is not a section", remedy="use the keys in docs/config.md"
            )
    try:
        section[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not YAML", remedy="quote the value") from None
    if isinstance(section[last], str):
        section[last] = _number(section[last])


def _number(text: str) -> str | float:
    """YAML 1.1 reads 3e-4 as a string; convert it to the number."""
    try:
        return float(text)
    except ValueError:
        return text


def _check_keys(section: type[BaseModel], data: dict[str, Any], prefix: str, where: str | Path) -> None:
    """Report unknown keys with a suggestion, which pydantic does not give."""
    for key, value in data.items():
        if key not in section.model_fields:
            # A similar key of this section is more likely meant than a key of another section; without one, any key.
            near = difflib.get_close_matches(str(key), _all_keys(RunConfig, ""), n=1, cutoff=0.0)
            siblings = difflib.get_close_matches(str(key), list(section.model_fields), n=1, cutoff=0.6)
            nearest = prefix + siblings[0] if siblings else near[0]
            raise UserError(f"unknown key {prefix}{key}", where=where, remedy=f"the nearest valid key is {nearest}")
        annotation = section.model_fields[key].annotation
        inner = section_of(annotation)
        if inner is None:
            continue
        if is_mapping(annotation):
            items = {f"{prefix}{key}.{name}.": item for name, item in value.items()} if isinstance(value, dict) else {}
        else:
            items = {f"{prefix}{key}.": value}
        for path, item in items.items():
            for one in item if isinstance(item, list) else [item]:
                if isinstance(one, dict):
                    _check_keys(inner, one, path, where)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class of a field's type, also inside list[...] and dict[...]."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for arg in typing.get_args(annotation) if (found := section_of(arg))), None)


def is_mapping(annotation: Any) -> bool:
    """Whether a field's type is a mapping from names, of modalities for example, which are not keys of the schema."""
    return typing.get_origin(annotation) is dict


def _all_keys(section: type[BaseModel], prefix: str) -> list[str]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        inner = section_of(field.annotation)
        if inner is not None:
            keys += _all_keys(inner, f"{prefix}{name}.NAME." if is_mapping(field.annotation) else f"{prefix}{name}.")
    return keys
