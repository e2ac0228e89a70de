"""SHA256SUMS of a folder: a digest of every file; check it with `sha256sum -c SHA256SUMS` in that folder.

One line per file, `<64 hex digits>  <path from the folder>`, sorted by path; the file does not list itself.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megamm.common.errors import UserError

DIGESTS = "SHA256SUMS"


def write_digests(folder: Path) -> Path:
    """Write folder/SHA256SUMS over all files below the folder, replacing an older one; returns its path."""
    lines = [f"{digest}  {name}\n" for name, digest in _sha256(folder, _files(folder))]
    partial = folder / f".{DIGESTS}.partial"
    partial.write_text("".join(lines), encoding="utf-8")
    return partial.replace(folder / DIGESTS)


def check_digests(folder: Path) -> None:
    """Raise UserError for the first missing, unlisted or changed file, or if SHA256SUMS is not readable."""
    listed = _read(folder)
    found = set(_files(folder))
    if missing := sorted(listed.keys() - found):
        raise UserError(f"{missing[0]} is missing", where=folder, remedy="copy or create the folder again")
    for name, digest in _sha256(folder, listed):
        if listed[name] != digest:
            raise UserError(f"{name} does not match {DIGESTS}", where=folder, remedy="copy or create the folder again")
    if unlisted := sorted(found - listed.keys()):
        remedy = "remove it, or create the folder again"
        raise UserError(f"{DIGESTS} does not list {unlisted[0]}", where=folder, remedy=remedy)


def _read(folder: Path) -> dict[str, str]:
    try:
        text = (folder / DIGESTS).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"no readable {DIGESTS}: {error}", where=folder, remedy="create the folder again") from None
    listed = {}
    for number, line in enumerate(text.splitlines(), 1):
        digest, gap, name = line[:64], line[64:66], line[66:]
        if not name or gap != "  " or set(digest) - set("0123456789abcdef"):
            raise UserError(f"line {number} is not a digest", where=folder / DIGESTS, remedy="create the folder again")
        listed[name] = digest
    return listed


def _files(folder: Path) -> list[str]:
    """Paths of all regular files below the folder, except the digests."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in files if name != DIGESTS and not name.startswith(f".{DIGESTS}"))


def _sha256(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names and digests, in the given order; files are hashed in parallel, one thread per core."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(lambda name: (name, _digest(folder / name)), names)


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
