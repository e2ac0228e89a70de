"""Loads stored tensors into this rank's blocks: reads only the needed parts of files, whatever layout wrote them."""

import contextlib
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from megamm.checkpoint import index
from megamm.checkpoint.archive import tensor_in
from megamm.checkpoint.index import StoredShard, StoredTensor
from megamm.checkpoint.tensor_shards import TensorShard
from megamm.common.errors import UserError

Slices = tuple[slice, ...]


def check(folder: Path, stored: dict[str, StoredTensor], blocks: Sequence[TensorShard]) -> None:
    """Raise UserError unless every requested tensor is stored with its shape (except for the vocabulary's padding)."""
    remedy = "resume with the model config that wrote the checkpoint"
    for block in blocks:
        found = stored.get(block.key)
        if found is None:
            what = f"the checkpoint has no tensor {block.key}"
            raise UserError(what, where=folder, remedy=remedy, on_all_ranks=True)
        theirs, ours = (found.shape[1:], block.shape[1:]) if block.grows else (found.shape, block.shape)
        if theirs != ours:
            what = f"{block.key} has shape {found.shape}, but the config needs {block.shape}"
            raise UserError(what, where=folder, remedy=remedy, on_all_ranks=True)


def needed_files(stored: dict[str, StoredTensor], blocks: Sequence[TensorShard]) -> set[str]:
    """Return the names of the files in the folder of tensors that contain a part of the blocks."""
    return {entry.file for block in blocks for entry, _, _ in parts(stored[block.key], block)}


def load(folder: Path, blocks: Sequence[TensorShard], stored: dict[str, StoredTensor] | None = None) -> None:
    """Load the blocks' data from a folder of tensors. UserError for unsafe contents, another model, missing parts.

    stored: the result of index.read, for callers that load in several calls.
    """
    stored = index.read(folder) if stored is None else stored
    check(folder, stored, blocks)
    by_item: dict[tuple[str, int], list[tuple[TensorShard, StoredShard, Slices, Slices]]] = {}
    for block in blocks:
        for entry, theirs, ours in parts(stored[block.key], block):
            by_item.setdefault((entry.file, entry.start), []).append((block, entry, theirs, ours))
    with contextlib.ExitStack() as opened, torch.no_grad():
        maps: dict[str, memoryview] = {}
        for (file, _), wanted in sorted(by_item.items(), key=lambda item: item[0]):
            if file not in maps:
                maps[file] = opened.enter_context(mapped(folder / file))
            entry = wanted[0][1]
            tensor = tensor_of(folder, maps[file], entry)
            for block, _, theirs, ours in wanted:
                block.data.view(block.size)[ours].copy_(tensor[theirs])
            del tensor


def tensor_of(folder: Path, file: memoryview, entry: StoredShard) -> torch.Tensor:
    """Return a stored block, in the file's memory if possible. UserError if it is damaged."""
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


def parts(stored: StoredTensor, block: TensorShard) -> Iterator[tuple[StoredShard, Slices, Slices]]:
    """Yield the stored blocks that overlap a requested block, with the overlap as slices of each."""
    offset, size = np.array(block.offset, dtype=np.int64), np.array(block.size, dtype=np.int64)
    low = np.maximum(stored.offsets, offset)
    high = np.minimum(stored.offsets + stored.sizes, offset + size)
    hits = np.flatnonzero((low < high).all(axis=1))
    inside = np.minimum(offset + size, np.array(stored.shape, dtype=np.int64)) - offset
    covered = int((high - low)[hits].prod(axis=1).sum())
    if covered != int(np.maximum(inside, 0).prod()):
        raise UserError(f"the checkpoint's index does not cover all of {block.key}", remedy="use another checkpoint")
    for hit in hits:
        entry = stored.blocks[hit]
        theirs, ours = low[hit] - stored.offsets[hit], low[hit] - offset
        extent = high[hit] - low[hit]
        yield entry, _slices(theirs, extent), _slices(ours, extent)


def _slices(start: np.ndarray, extent: np.ndarray) -> Slices:
    return tuple(slice(int(a), int(a + n)) for a, n in zip(start, extent, strict=True))
