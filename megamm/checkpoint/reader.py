"""Reads stored tensors into shards: only the needed parts of files, whatever layout wrote them.

`load` maps the files: a rank reads its shards once. `TensorReader` reads (pread) directly into each shard: a conversion
goes through a whole checkpoint, and mapped pages would count as its memory until they are unmapped.
"""

import contextlib
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamm.checkpoint import index
from megamm.checkpoint.index import StoredShard, StoredTensor
from megamm.checkpoint.rank_file import elements_at, tensor_in
from megamm.checkpoint.tensor_shards import TensorShard
from megamm.common.errors import UserError

Slices = tuple[slice, ...]
SCRATCH = 16 << 20
"""Bytes read at a time if the order of elements in the shard differs from that in the file."""


def check(folder: Path, stored: dict[str, StoredTensor], shards: Sequence[TensorShard]) -> None:
    """Raise UserError unless every requested tensor is stored with its shape (except for the vocabulary's padding)."""
    remedy = "resume with the model config that wrote the checkpoint"
    for shard in shards:
        found = stored.get(shard.key)
        if found is None:
            what = f"the checkpoint has no tensor {shard.key}"
            raise UserError(what, where=folder, remedy=remedy, on_all_ranks=True)
        theirs, ours = (found.shape[1:], shard.shape[1:]) if shard.grows else (found.shape, shard.shape)
        if theirs != ours:
            what = f"{shard.key} has shape {found.shape}, but the config needs {shard.shape}"
            raise UserError(what, where=folder, remedy=remedy, on_all_ranks=True)


def needed_files(stored: dict[str, StoredTensor], shards: Sequence[TensorShard]) -> set[str]:
    """Return the names of the files in the folder of tensors that contain a part of the shards."""
    return {entry.file for shard in shards for entry, _, _ in parts(stored[shard.key], shard)}


def load(folder: Path, shards: Sequence[TensorShard], stored: dict[str, StoredTensor] | None = None) -> None:
    """Load the shards' data from a folder of tensors. UserError for unsafe contents, another model, missing parts.

    stored: the result of index.read, for callers that load in several calls.
    """
    stored = index.read(folder) if stored is None else stored
    check(folder, stored, shards)
    # A stored shard is opened once for all requested shards that need it, and each file is read front to back.
    by_item: dict[tuple[str, int], list[tuple[TensorShard, StoredShard, Slices, Slices]]] = {}
    for shard in shards:
        for entry, theirs, ours in parts(stored[shard.key], shard):
            by_item.setdefault((entry.file, entry.start), []).append((shard, entry, theirs, ours))
    with contextlib.ExitStack() as opened, torch.no_grad():
        maps: dict[str, memoryview] = {}
        for (file, _), wanted in sorted(by_item.items(), key=lambda item: item[0]):
            if file not in maps:
                maps[file] = opened.enter_context(mapped(folder / file))
            entry = wanted[0][1]
            tensor = tensor_of(folder, maps[file], entry)
            for shard, _, theirs, ours in wanted:
                shard.data.view(shard.size)[ours].copy_(tensor[theirs])
            del tensor


def tensor_of(folder: Path, file: memoryview, entry: StoredShard) -> torch.Tensor:
    """Return a stored shard, in the file's memory if possible. UserError if it is damaged."""
    try:
        return tensor_in(file[entry.start : entry.start + entry.length], entry.dtype, entry.size)
    except Exception as error:  # torch's reader may raise any error for a damaged item
        what = f"{entry.key} cannot be read from {entry.file}: {error}"
        raise UserError(what, where=folder, remedy="use another checkpoint") from None


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """Map a file; pages are read on access. torch needs them writable: changes would stay in this process."""
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if path.stat().st_size else b""
    yield memoryview(pages)  # unmapped when the last tensor over it is gone


def parts(stored: StoredTensor, shard: TensorShard) -> Iterator[tuple[StoredShard, Slices, Slices]]:
    """Yield the stored shards that overlap a requested shard, with the overlap as slices of each."""
    offset, size = np.array(shard.offset, dtype=np.int64), np.array(shard.size, dtype=np.int64)
    # A stored shard overlaps if the intersection [low, high) is not empty on any axis.
    low = np.maximum(stored.offsets, offset)
    high = np.minimum(stored.offsets + stored.sizes, offset + size)
    hits = np.flatnonzero((low < high).all(axis=1))
    # Stored shards do not overlap each other, so they cover the shard if the volumes add up. The padding of a
    # vocabulary (TensorShard.grows) reaches beyond the stored tensor and is not counted.
    inside = np.minimum(offset + size, np.array(stored.shape, dtype=np.int64)) - offset
    covered = int((high - low)[hits].prod(axis=1).sum())
    if covered != int(np.maximum(inside, 0).prod()):
        raise UserError(f"the checkpoint's index does not cover all of {shard.key}", remedy="use another checkpoint")
    for hit in hits:
        entry = stored.shards[hit]
        theirs, ours = low[hit] - stored.offsets[hit], low[hit] - offset
        extent = high[hit] - low[hit]
        yield entry, _slices(theirs, extent), _slices(ours, extent)


def _slices(start: np.ndarray, extent: np.ndarray) -> Slices:
    return tuple(slice(int(a), int(a + n)) for a, n in zip(start, extent, strict=True))


class TensorReader:
    """An open folder of tensors; call `close` after use."""

    def __init__(self, folder: Path, stored: dict[str, StoredTensor] | None = None) -> None:
        """stored: the result of index.read; if None, it is read here, with UserError if it is not safe to read."""
        self.folder, self.stored = folder, index.read(folder) if stored is None else stored
        self.descriptors: dict[str, int] = {}
        self.starts: dict[tuple[str, int], int | None] = {}

    def read(self, shard: TensorShard) -> None:
        """Read a shard on the CPU, of the stored dtype. UserError as reader.load."""
        stored = self.stored.get(shard.key)
        check(self.folder, self.stored, [shard])
        assert stored is not None and shard.data.dtype == stored.dtype, f"{shard.key} is stored as another dtype"
        for entry, theirs, ours in parts(stored, shard):
            self._read(entry, theirs, shard.data.view(shard.size)[ours])

    def _read(self, entry: StoredShard, box: Slices, target: torch.Tensor) -> None:
        """Read the box of a stored shard in runs of elements that are contiguous in the file."""
        start = self._start(entry)
        if start is None:  # not in the format that torch.save writes today
            with mapped(self.folder / entry.file) as pages:
                target.copy_(tensor_of(self.folder, pages, entry)[box])
            return
        # Trailing axes that are read whole are contiguous in the file, together with a range of the axis before them:
        # one run for each index of the axes before `axis`.
        first = [part.start for part in box]
        axis = len(box) - 1
        while axis > 0 and target.shape[axis] == entry.size[axis]:
            axis -= 1
        strides = np.cumprod([1, *entry.size[:0:-1]])[::-1]
        for inside in np.ndindex(*target.shape[: max(axis, 0)]):
            at = [a + b for a, b in zip(first, (*inside, *[0] * (len(box) - len(inside))), strict=True)]
            element = int(np.dot(at, strides[: len(at)])) if at else 0
            self._run(entry, start + element * entry.dtype.itemsize, target[inside])

    def _run(self, entry: StoredShard, start: int, target: torch.Tensor) -> None:
        if target.is_contiguous():
            self._fill(entry, start, target)
            return
        row = target[0].numel() * target.itemsize
        step = max(1, SCRATCH // row)
        for i in range(0, len(target), step):
            rows = torch.empty(target[i : i + step].shape, dtype=target.dtype)
            self._fill(entry, start + i * row, rows)
            target[i : i + step] = rows

    def _fill(self, entry: StoredShard, start: int, target: torch.Tensor) -> None:
        try:
            read_into(self._descriptor(entry.file), start, [target])
        except (OSError, EOFError) as error:
            what = f"{entry.key} cannot be read from {entry.file}: {error}"
            raise UserError(what, where=self.folder, remedy="use another checkpoint") from None

    def _start(self, entry: StoredShard) -> int | None:
        """Return the first byte of its elements in the file; None if torch must read them."""
        at = entry.file, entry.start
        if at not in self.starts:
            with mapped(self.folder / entry.file) as pages:
                inside = elements_at(pages[entry.start : entry.start + entry.length], entry.dtype, entry.size)
            self.starts[at] = None if inside is None else entry.start + inside
        return self.starts[at]

    def _descriptor(self, file: str) -> int:
        if file not in self.descriptors:
            self.descriptors[file] = os.open(self.folder / file, os.O_RDONLY | os.O_CLOEXEC)
        return self.descriptors[file]

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def read_into(descriptor: int, start: int, targets: Sequence[torch.Tensor]) -> None:
    """Fill contiguous tensors, one after the other, from a file's bytes from `start` on. EOFError at its end."""
    for target in targets:
        assert target.is_contiguous()
        left = bytes_of(target)
        while left:
            read = os.preadv(descriptor, [left], start)
            if not read:
                raise EOFError("unexpected end of file")
            start, left = start + read, left[read:]
