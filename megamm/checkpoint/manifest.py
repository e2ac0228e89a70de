"""The list of a checkpoint's files as bytes from anywhere: names that stay in their folder, sizes, digests.

    {"digest": "xxh3_128", "files": {"state.json": {"size": 812, "xxh3_128": "99aa…"}, …}}

`digest` names the function; without it, it is SHA-256, as manifests had it at first. XXH3 (Collet, xxhash.com) finds
damage as well and costs a fortieth; neither tells who wrote a file: whoever can change a file can change its manifest.
Whoever can write a manifest must not be able to name a file outside of the checkpoint's folder.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from megamm.errors import UserError

NAME, STATE = "manifest.json", "state.json"
STEP_FOLDER = re.compile(r"step_\d{8}")
DIGEST, FIRST_DIGEST = "xxh3_128", "sha256"
"""Of what is written now, and of manifests that name none."""
_CHUNK = 1 << 22


class Hasher(Protocol):
    """As hashlib has it."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


def hasher(name: str = DIGEST) -> Hasher:
    """A new one. ValueError for a function that is not known."""
    if name == DIGEST:
        import xxhash

        return xxhash.xxh3_128()
    if name == FIRST_DIGEST:
        return hashlib.sha256()
    raise ValueError(f"the digest {name!r} is not known")


@dataclass(frozen=True)
class Entry:
    """One file: size in bytes, digest as hex, and the function that gave it."""

    size: int
    digest: str
    function: str = DIGEST

    def to_json(self) -> dict[str, Any]:
        """As it is in a manifest."""
        return {"size": self.size, self.function: self.digest}

    @classmethod
    def from_json(cls, entry: Any, function: str = DIGEST) -> "Entry":
        """KeyError, TypeError or ValueError for anything else."""
        hasher(function)
        return cls(int(entry["size"]), str(entry[function]), function)


def render(listed: Mapping[str, Entry]) -> bytes:
    """The manifest of files by their path inside the checkpoint."""
    files = {name: entry.to_json() for name, entry in listed.items()}
    return json.dumps({"digest": DIGEST, "files": files}, indent=1, sort_keys=True).encode()


def parse(data: bytes, where: str | Path) -> dict[str, Entry]:
    """The files listed, by their path inside the checkpoint. UserError for anything but a complete, safe list."""
    try:
        whole = json.loads(data)
        function = whole.get("digest", FIRST_DIGEST)
        entries = {name: Entry.from_json(entry, function) for name, entry in whole["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(f"no valid {NAME} ({error})", where) from None
    if STATE not in entries:
        raise damaged(f"{NAME} does not list {STATE}", where)
    unsafe = next((name for name in entries if not stays_inside(name) or name == NAME), None)
    if unsafe is not None:
        raise damaged(f"{NAME} lists {unsafe!r}, which is not a file of a checkpoint", where)
    return entries


def read(folder: Path) -> dict[str, Entry]:
    """`parse` of a folder's own manifest."""
    try:
        data = (folder / NAME).read_bytes()
    except OSError as error:
        raise damaged(f"no valid {NAME} ({error})", folder) from None
    return parse(data, folder)


def stays_inside(name: str) -> bool:
    """Whether a path in "/" notation names something below the folder that it is relative to."""
    path = PurePosixPath(name)
    plain = bool(name) and "\\" not in name and "\0" not in name and str(path) == name
    return plain and not path.is_absolute() and ".." not in path.parts


def step_of(name: str) -> int:
    """The step in a folder's name, `step_00001000`."""
    return int(name.removeprefix("step_"))


def digest(path: Path, function: str = DIGEST) -> Entry:
    """Size and digest of a file. OSError if it cannot be read."""
    made, size = hasher(function), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            made.update(chunk)
            size += len(chunk)
    return Entry(size, made.hexdigest(), function)


def problem_of(folder: Path, name: str, entry: Entry, up_to: float = math.inf) -> str:
    """What is wrong with a file of a folder; "" if it is there with this size and, up to so many bytes, digest."""
    path = folder / name
    if not path.is_file() or path.stat().st_size != entry.size:
        return f"{name} is missing or truncated"
    if entry.size > up_to:
        return ""
    return "" if digest(path, entry.function) == entry else f"{name} fails its checksum"


def is_whole(path: Path, entry: Entry) -> bool:
    """Whether the file is there with this size and digest."""
    return not problem_of(path.parent, path.name, entry)


def damaged(what: str, where: str | Path) -> UserError:
    """What to raise about a checkpoint that is not whole."""
    remedy = "use another checkpoint, or remove this one to start without it"
    return UserError(f"damaged checkpoint: {what}", where=where, remedy=remedy)
