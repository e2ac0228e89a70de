"""The space of a shard cache: what it holds, and which blocks become holes when it is full (shard_cache.py).

left = evict(CACHE, goal)      -> bytes that are still held, at most `goal` if folders in use allow it
"""

import ctypes
import fcntl
import os
import shutil
from pathlib import Path

import numpy as np

BLOCK_BYTES = 4096
"""Unit of space: the block of common file systems."""
SPACE_KEPT = 0.9
"""Share of the limit that is held after an eviction, so that the next one is not due at once."""
IN_USE = "in-use"
"""File of a folder on which every process that has it open holds a shared lock."""
_HOLE = 0x01 | 0x02
"""fallocate(2): FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE."""


def when_file(tar: Path) -> Path:
    """The file that says when the blocks of a tar were last wanted."""
    return tar.with_suffix(".when")


def punch(file: int, start: int, length: int) -> None:
    """Turn a range of a file into a hole. Raises OSError if the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(file, _HOLE, ctypes.c_int64(start), ctypes.c_int64(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def fixed_bytes(cache: Path) -> int:
    """Bytes on disk of everything but the tars."""
    total = 0
    for root, _, names in os.walk(cache):
        for name in names:
            if not name.endswith(".tar"):
                try:
                    total += os.lstat(os.path.join(root, name)).st_blocks * 512
                except FileNotFoundError:
                    continue  # a temporary file
    return total


def evict(cache: Path, goal: int) -> int:
    """Punch the blocks wanted longest ago until the cache holds `goal` bytes; return what it holds.

    The caller holds the cache's lock. Folders without blocks that no process has open are removed.
    """
    tables = {path: np.fromfile(path, dtype="<u4") for path in sorted(cache.glob("*/*.when"))}
    held = {path: np.flatnonzero(table) for path, table in tables.items()}
    when = np.sort(np.concatenate([tables[path][held[path]] for path in tables] or [np.zeros(0, dtype="<u4")]))
    room = max(0, (goal - fixed_bytes(cache)) // BLOCK_BYTES)
    if len(when) > room:
        newest_evicted = when[len(when) - room - 1]
        for path, table in tables.items():
            _punch_until(path, table, held[path], int(newest_evicted))
    _remove_unused(cache)
    blocks = sum(int(np.count_nonzero(np.fromfile(path, dtype="<u4"))) for path in cache.glob("*/*.when"))
    return fixed_bytes(cache) + blocks * BLOCK_BYTES


def _punch_until(path: Path, table: np.ndarray, held: np.ndarray, newest_evicted: int) -> None:
    """Turn the blocks of a tar that were wanted then or before into holes."""
    old = held[table[held] <= newest_evicted]
    if not len(old):
        return
    with open(path.with_suffix(".tar"), "r+b") as tar:
        for run in np.split(old, np.flatnonzero(np.diff(old) > 1) + 1):
            punch(tar.fileno(), int(run[0]) * BLOCK_BYTES, len(run) * BLOCK_BYTES)
    # The table is written last: after a kill in between, it counts holes as held, and a later eviction frees them.
    table[old] = 0
    with open(path, "r+b") as file:
        if table.any():
            file.write(table.tobytes())
        else:
            file.truncate(0)  # takes no space


def _remove_unused(cache: Path) -> None:
    """Remove folders that hold no blocks and that no process has open."""
    for marker in cache.glob(f"*/{IN_USE}"):
        folder = marker.parent
        if any(np.fromfile(path, dtype="<u4").any() for path in folder.glob("*.when")):
            continue
        with open(marker, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            shutil.rmtree(folder, ignore_errors=True)
