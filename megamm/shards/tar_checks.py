"""Checks of a folder's tars against its index: missing, truncated, changed, or those of another index."""

import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from megamm.common.errors import UserError
from megamm.shards.index import ShardIndex
from megamm.shards.tar_reader import BLOCK, StoredMember, TarReader

TARS_CHECKED = 1000
"""Most tars that are checked when a folder is opened; the others are checked when a member of them is read."""


def rebuild_command(folder: Path) -> str:
    """The command that rebuilds a folder of shards."""
    if ".tokens-" in folder.name:
        return f"delete {folder} and run `megamm data tokenize` again"
    return f"delete {folder.parent.parent} and run `megamm data build` again"


def tar_path(folder: Path, shard: int) -> Path:
    """The tar of that number."""
    return folder / f"{shard:06d}.tar"


def require_tars(folder: Path, index: ShardIndex) -> None:
    """Raise UserError unless the tars are those of the index: all of up to TARS_CHECKED, of more as many, spread."""
    reader = TarReader()
    shards = range(index.shards)
    if index.shards > TARS_CHECKED:
        shards = np.linspace(0, index.shards - 1, TARS_CHECKED, dtype=np.int64).tolist()
    for shard in shards:
        require_tar(folder, index, shard, reader)
    if tar_path(folder, index.shards).exists():
        what = f"the index ends before {tar_path(folder, index.shards).name}"
        raise UserError(what, where=folder, remedy=f"rebuild the index with `megamm data index {folder}`")
    reader.close()


def require_tar(folder: Path, index: ShardIndex, shard: int, reader: TarReader) -> None:
    """Raise UserError unless this tar has the indexed size and, at its place, the first member."""
    tar = tar_path(folder, shard)
    try:
        size = os.stat(tar).st_size
    except FileNotFoundError:
        raise UserError(f"missing shard {tar.name}", where=folder, remedy=rebuild_command(folder)) from None
    first, expected = int(index.first[shard]), int(index.tar_bytes[shard])
    # The header of one member finds the index of another tar, without reading all headers.
    if first < index.first[shard + 1]:
        reader.verify(member_of(folder, index, first))
    if size < expected:
        raise UserError("truncated tar", where=tar, remedy=rebuild_command(folder))
    if size > expected:
        remedy = f"rebuild the index with `megamm data index {folder}`"
        raise UserError(f"the tar has {size} bytes, {expected} when it was indexed", where=tar, remedy=remedy)


def member_of(folder: Path, index: ShardIndex, i: int) -> StoredMember:
    """Member i with its tar."""
    return StoredMember(
        _tar_name(folder, index.shard_of(i)), index.name_of(i), int(index.offset[i]), int(index.size[i])
    )


@lru_cache(maxsize=4096)
def _tar_name(folder: Path, shard: int) -> str:
    """The tar's path: the same object each time, which is then pickled once for a message to a worker."""
    return str(tar_path(folder, shard))


def require_end(tar: Path, data_end: int) -> int:
    """Raise UserError unless the tar covers its last member and ends with two zero blocks; return its size in bytes."""
    end = -(-data_end // BLOCK) * BLOCK
    with open(tar, "rb") as file:
        file.seek(end)
        # Writers may add more zero blocks, which are not checked.
        tail = file.read(2 * BLOCK)
        size = os.fstat(file.fileno()).st_size
    if len(tail) < 2 * BLOCK:
        raise UserError("truncated tar", where=tar, remedy=rebuild_command(tar.parent))
    if tail != bytes(2 * BLOCK):
        remedy = f"rebuild the index with `megamm data index {tar.parent}`"
        raise UserError("the tar has data after the last member in its index", where=tar, remedy=remedy)
    return size
