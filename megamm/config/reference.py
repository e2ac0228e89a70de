"""docs/config.md, written from the schema: `python -m megamm.config.reference > docs/config.md`.

Every key of RunConfig has a line with its type, bounds, default and description; sections inside a section have a
table of their own. tests/test_config.py fails if the page is stale.
"""

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megamm.config.load import is_mapping, section_of
from megamm.config.sections import RunConfig

HEAD = """# Configuration

Every key of a run's YAML file. Set keys on the command line with `key=value`, for example
`megamm train examples/cpu_tiny.yaml train.steps=100 parallel.tensor=2`. A config error prints one line: what is wrong,
where, and how to fix it.

This page is generated from the schema (`python -m megamm.config.reference > docs/config.md`).
"""
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "multiple of"}


def page() -> str:
    """The whole page, in Markdown."""
    return HEAD + "".join(_section(RunConfig, ""))


def _section(section: type[BaseModel], name: str) -> Iterator[str]:
    """Heading, text and table of a section, then the same of the sections inside it."""
    text = " ".join((section.__doc__ or "").split())
    yield f"\n## {name or 'Top level'}\n\n{text}\n\n| key | type | default | description |\n| --- | --- | --- | --- |\n"
    inside: list[tuple[type[BaseModel], str]] = []
    for key, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None:
            yield f"| `{key}` | {_type(field)} | {_default(field)} | {field.description} |\n"
            continue
        path = (f"{name}.{key}" if name else key) + (".NAME" if is_mapping(field.annotation) else "")
        is_list = typing.get_origin(field.annotation) is list
        others = [arg for arg in typing.get_args(field.annotation) if typing.get_origin(arg) is Literal]
        what = f"{field.description} Keys of an item: " if is_list else "See "
        default = "required" if field.is_required() else "none" if field.default is None else "as there"
        kind = "list of sections" if is_list else "section"
        if is_mapping(field.annotation):
            what, default, kind = f"{field.description} See ", _default(field), "mapping to section"
        if others:
            what, default, kind = f"{field.description} See ", _default(field), f"{_plain(others[0])}, or a section"
        yield f"| `{key}` | {kind} | {default} | {what}[`{path}`](#{path.replace('.', '').lower()}). |\n"
        inside.append((inner, path))
    for inner, path in inside:
        yield from _section(inner, path)


def _type(field: FieldInfo) -> str:
    """A field's type with its bounds: "integer ≥ 1"."""
    bounds = [f"{_BOUNDS[name]} {getattr(b, name):g}" for b in field.metadata for name in _BOUNDS if hasattr(b, name)]
    return " ".join([_plain(field.annotation), ", ".join(bounds)]).strip()


def _plain(annotation: Any) -> str:
    """A type in words; alternatives as they are written in the file."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        *others, last = (f"`{value}`" for value in arguments)
        return f"{', '.join(others)} or {last}"
    if origin in (list, dict):
        return f"{'list of' if origin is list else 'mapping to'} {_plain(arguments[-1])}"
    if origin is typing.Annotated:
        return _plain(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_plain(argument) for argument in arguments if argument is not type(None))
    names = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path", Any: "any value"}
    return names[annotation]


def _default(field: FieldInfo) -> str:
    """A field's default as it would be written in the file."""
    if field.is_required():
        return "required"
    if field.default is None:
        return "none"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


if __name__ == "__main__":
    print(page(), end="")
