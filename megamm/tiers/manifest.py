"""The list of a checkpoint's files as bytes from anywhere: names that stay in their folder, sizes, SHA-256 digests.

Input: manifest.json of checkpoint.py. Whoever can write a manifest must not be able to name a file outside of the
checkpoint's folder.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megamm.errors import UserError

NAME = "manifest.json"
STATE = "state.json"
STEP_FOLDER = re.compile(r"step_\d{8}")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Entry:
    """One file: size in bytes, SHA-256 as hex."""

    size: int
    sha256: str


def parse(data: bytes, where: str | Path) -> dict[str, Entry]:
    """The files listed, by their path inside the checkpoint. UserError for anything but a complete, safe list."""
    try:
        listed = json.loads(data)["files"]
        entries = {name: Entry(int(entry["size"]), str(entry["sha256"])) for name, entry in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(f"no valid {NAME} ({error})", where) from None
    if STATE not in entries:
        raise _damaged(f"{NAME} does not list {STATE}", where)
    unsafe = next((name for name in entries if not stays_inside(name) or name == NAME), None)
    if unsafe is not None:
        raise _damaged(f"{NAME} lists {unsafe!r}, which is not a file of a checkpoint", where)
    return entries


def stays_inside(name: str) -> bool:
    """Whether a path in "/" notation names something below the folder that it is relative to."""
    path = PurePosixPath(name)
    plain = bool(name) and "\\" not in name and "\0" not in name and str(path) == name
    return plain and not path.is_absolute() and ".." not in path.parts


def step_of(name: str) -> int:
    """The step in a folder's name, `step_00001000`."""
    return int(name.removeprefix("step_"))


def digest(path: Path) -> Entry:
    """Size and digest of a file. OSError if it cannot be read."""
    hasher, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
            size += len(chunk)
    return Entry(size, hasher.hexdigest())


def is_whole(path: Path, entry: Entry) -> bool:
    """Whether the file is there with this size and digest."""
    return path.is_file() and path.stat().st_size == entry.size and digest(path) == entry


def _damaged(what: str, where: str | Path) -> UserError:
    return UserError(f"damaged checkpoint: {what}", where=where, remedy="use another checkpoint, or remove this one")
