"""Reads parts of stored tensors, one after the other, without more memory than the parts themselves.

reader.py maps a rank's files and reads them once. A conversion reads a whole checkpoint, and mapped pages count as its
memory until they are unmapped. So here the elements are read (pread) directly into their block.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamm.checkpoint import index, reader
from megamm.checkpoint.archive import elements_at
from megamm.checkpoint.index import Entry, Stored
from megamm.checkpoint.tensor_shards import Block
from megamm.common.errors import UserError

SCRATCH = 16 << 20
"""Bytes read at a time if the order of elements in the block differs from that in the file."""


class TensorReader:
    """An open folder of tensors; call `close` after use."""

    def __init__(self, folder: Path, stored: dict[str, Stored] | None = None) -> None:
        """stored: the result of index.read; if None, it is read here, with UserError if it is not safe to read."""
        self.folder, self.stored = folder, index.read(folder) if stored is None else stored
        self.descriptors: dict[str, int] = {}
        self.starts: dict[tuple[str, int], int | None] = {}

    def read(self, block: Block) -> None:
        """Read a block on the CPU, of the stored dtype. UserError as reader.load."""
        stored = self.stored.get(block.key)
        reader.check(self.folder, self.stored, [block])
        assert stored is not None and block.data.dtype == stored.dtype, f"{block.key} is stored as another dtype"
        for entry, theirs, ours in reader.parts(stored, block):
            self._read(entry, theirs, block.data.view(block.size)[ours])

    def _read(self, entry: Entry, box: reader.Slices, target: torch.Tensor) -> None:
        """Read the box of a stored block in runs of elements that are contiguous in the file."""
        start = self._start(entry)
        if start is None:  # not in the format that torch.save writes today
            with reader.mapped(self.folder / entry.file) as pages:
                target.copy_(reader.tensor_of(self.folder, pages, entry)[box])
            return
        first = [part.start for part in box]
        axis = len(box) - 1
        while axis > 0 and target.shape[axis] == entry.size[axis]:
            axis -= 1
        strides = np.cumprod([1, *entry.size[:0:-1]])[::-1]
        for inside in np.ndindex(*target.shape[: max(axis, 0)]):
            place = [a + b for a, b in zip(first, (*inside, *[0] * (len(box) - len(inside))), strict=True)]
            element = int(np.dot(place, strides[: len(place)])) if place else 0
            self._run(entry, start + element * entry.dtype.itemsize, target[inside])

    def _run(self, entry: Entry, start: int, target: torch.Tensor) -> None:
        if target.is_contiguous():
            self._fill(entry, start, target)
            return
        row = target[0].numel() * target.itemsize
        step = max(1, SCRATCH // row)
        for i in range(0, len(target), step):
            rows = torch.empty(target[i : i + step].shape, dtype=target.dtype)
            self._fill(entry, start + i * row, rows)
            target[i : i + step] = rows

    def _fill(self, entry: Entry, start: int, target: torch.Tensor) -> None:
        try:
            read_into(self._descriptor(entry.file), start, [target])
        except (OSError, EOFError) as error:
            what = f"{entry.key} cannot be read from {entry.file}: {error}"
            raise UserError(what, where=self.folder, remedy="use another checkpoint") from None

    def _start(self, entry: Entry) -> int | None:
        """Return the first byte of its elements in the file; None if torch must read them."""
        at = entry.file, entry.start
        if at not in self.starts:
            with reader.mapped(self.folder / entry.file) as pages:
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
