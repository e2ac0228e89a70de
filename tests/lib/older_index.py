"""Indexes of shards as earlier versions wrote them, and damaged ones, made by the safetensors library itself."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

INDEX = "index.safetensors"


def read_columns(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the columns and the metadata of a folder's index."""
    with safe_open(folder / INDEX, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - not a mapping


def change_columns(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Replace the index of a folder by one whose columns are changed."""
    columns, metadata = read_columns(folder)
    change(columns)
    save_file(columns, folder / INDEX, metadata)


def lines_of(folder: Path) -> list[list[dict[str, object]]]:
    """Return the entries of an older index, for each tar."""
    columns, metadata = read_columns(folder)
    forms, members = json.loads(metadata["forms"]), len(columns["key"])
    form, part = (columns.get(name, np.zeros(members, dtype=int)) for name in ("form", "part"))
    entries = []
    for i in range(members):
        name = forms[form[i]]
        entry = {
            "key": columns["key"][i].tobytes().rstrip(b"\0").decode(),
            "ext": name % (part[i] - 1) if part[i] else name,
        }
        entry |= {name: int(columns[name][i]) for name in ("offset", "size", "tokens") if name in columns}
        entries.append(entry)
    first = columns["first"].tolist()
    return [entries[start:stop] for start, stop in pairwise(first)]


def to_older(folder: Path) -> Path:
    """Replace the index of a folder by 000000.jsonl, ... and shards.json, as version 0.1 wrote them; return it."""
    tars = lines_of(folder)
    for number, entries in enumerate(tars):
        lines = (json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries)
        (folder / f"{number:06d}.jsonl").write_text("".join(lines))
    (folder / "shards.json").write_text(json.dumps({"shards": len(tars)}) + "\n")
    (folder / INDEX).unlink()
    return folder
