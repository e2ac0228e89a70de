"""The manifest of a checkpoint: names, sizes and digests of its files; it is treated as untrusted input.

    {"digest": "xxh3_128", "files": {"state.json": {"size": 812, "xxh3_128": "99aa…"}, …}}

`digest` is the hash function; without it, it is SHA-256, as in the first manifests. XXH3 (Collet, xxhash.com) detects
damage equally well at a fortieth of the cost. Neither proves who wrote a file: whoever can change a file can change its
manifest. A manifest must not be able to name a file outside of the checkpoint's folder.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from megamm.common.errors import UserError

NAME, STATE = "manifest.json", "state.json"
STEP_FOLDER = re.compile(r"step_\d{8}")
DIGEST, FIRST_DIGEST = "xxh3_128", "sha256"
"""Hash function of new manifests, and of manifests that name none."""
_CHUNK = 1 << 22


class Hasher(Protocol):
    """The interface of hashlib's hash objects."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


def hasher(name: str = DIGEST) -> Hasher:
    """Create a hasher. ValueError for an unknown function."""
    if name == DIGEST:
        import xxhash

        return xxhash.xxh3_128()
    if name == FIRST_DIGEST:
        return hashlib.sha256()
    raise ValueError(f"unknown digest {name!r}")


@dataclass(frozen=True)
class ManifestEntry:
    """One file: size in bytes, digest as hex, and the hash function."""

    size: int
    digest: str
    function: str = DIGEST

    def to_json(self) -> dict[str, Any]:
        """Return the entry as it is in a manifest."""
        return {"size": self.size, self.function: self.digest}

    @classmethod
    def from_json(cls, entry: Any, function: str = DIGEST) -> "ManifestEntry":
        """Parse an entry; KeyError, TypeError or ValueError if it is not one."""
        hasher(function)  # ValueError for an unknown one
        return cls(int(entry["size"]), str(entry[function]), function)


def render(listed: Mapping[str, ManifestEntry]) -> bytes:
    """Return the manifest for files by their path inside the checkpoint."""
    files = {name: entry.to_json() for name, entry in listed.items()}
    return json.dumps({"digest": DIGEST, "files": files}, indent=1, sort_keys=True).encode()


def parse(data: bytes, where: str | Path) -> dict[str, ManifestEntry]:
    """Return the listed files by their path inside the checkpoint. UserError for anything but a complete, safe list."""
    try:
        whole = json.loads(data)
        function = whole.get("digest", FIRST_DIGEST)
        entries = {name: ManifestEntry.from_json(entry, function) for name, entry in whole["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(f"no valid {NAME} ({error})", where) from None
    if STATE not in entries:
        raise damaged(f"{NAME} does not list {STATE}", where)
    unsafe = next((name for name in entries if not stays_inside(name) or name == NAME), None)
    if unsafe is not None:
        raise damaged(f"{NAME} lists {unsafe!r}, which is not a file of a checkpoint", where)
    return entries


def read(folder: Path) -> dict[str, ManifestEntry]:
    """Parse a folder's own manifest."""
    try:
        data = (folder / NAME).read_bytes()
    except OSError as error:
        raise damaged(f"no valid {NAME} ({error})", folder) from None
    return parse(data, folder)


def stays_inside(name: str) -> bool:
    """Whether a path in "/" notation stays below the folder that it is relative to."""
    path = PurePosixPath(name)
    # Only the normal form is accepted: "a//b" or "./a" would name a file twice.
    plain = bool(name) and "\\" not in name and "\0" not in name and str(path) == name
    return plain and not path.is_absolute() and ".." not in path.parts


def step_of(name: str) -> int:
    """Return the step of a folder name, `step_00001000`."""
    return int(name.removeprefix("step_"))


def digest(path: Path, function: str = DIGEST) -> ManifestEntry:
    """Return size and digest of a file. OSError if it cannot be read."""
    made, size = hasher(function), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            made.update(chunk)
            size += len(chunk)
    return ManifestEntry(size, made.hexdigest(), function)


def problem_of(folder: Path, name: str, entry: ManifestEntry, up_to: float = math.inf) -> str:
    """Return what is wrong with a file; "" if it has this size and digest (checked up to `up_to` bytes only)."""
    path = folder / name
    if not path.is_file() or path.stat().st_size != entry.size:
        return f"{name} is missing or truncated"
    if entry.size > up_to:
        return ""
    return "" if digest(path, entry.function) == entry else f"{name} fails its checksum"


def is_whole(path: Path, entry: ManifestEntry) -> bool:
    """Whether the file exists with this size and digest."""
    return not problem_of(path.parent, path.name, entry)


def damaged(what: str, where: str | Path) -> UserError:
    """Return the error for a damaged checkpoint."""
    remedy = "use another checkpoint, or remove this one to start without it"
    return UserError(f"damaged checkpoint: {what}", where=where, remedy=remedy)
