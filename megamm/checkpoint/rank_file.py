"""The image of the file that a rank writes, in torch's distributed checkpoint format: one item per block (archive.py).

Everything except the elements is the same at every save: it is written once, and a save copies only elements. Blocks
that share memory (in float32 a weight is its own main copy) are one item, to which the index points twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megamm.checkpoint.archive import frame
from megamm.checkpoint.index import StoredShard
from megamm.checkpoint.tensor_shards import TensorShard

ALIGNMENT = 64
"""Bytes to which items are aligned, as torch.save aligns elements in them."""


@dataclass(frozen=True)
class ShardOffset:
    """ShardOffset of a block's elements in the image. block: index in the list; start: first byte."""

    block: int
    start: int


@dataclass(frozen=True)
class RankFile:
    """Layout of `size` bytes. entries: one per block, for the index."""

    size: int
    offsets: tuple[ShardOffset, ...]
    entries: tuple[StoredShard, ...]
    fixed: tuple[tuple[int, bytes], ...]
    """(position, bytes) of everything around the elements."""

    @classmethod
    def of(cls, blocks: Sequence[TensorShard], file: str) -> "RankFile":
        """Lay out the image of these blocks. file: file name in the entries."""
        end, offsets, entries, fixed = 0, [], [], []
        items: dict[tuple[object, ...], tuple[int, int]] = {}
        for number, block in enumerate(blocks):
            data = block.data
            assert data.is_contiguous() and data.numel() == torch.Size(block.size).numel() > 0, block.key
            same = (data.data_ptr(), data.device, data.dtype, block.size)
            if same not in items:
                around = frame(data.dtype, block.size)
                start = end + len(around.head)
                length = len(around.head) + data.nbytes + len(around.tail)
                fixed += [(end, around.head), (start + data.nbytes, around.tail)]
                offsets.append(ShardOffset(number, start))
                items[same] = end, length
                end = -(-(end + length) // ALIGNMENT) * ALIGNMENT
            entries.append(
                StoredShard(block.key, block.shape, block.offset, block.size, data.dtype, file, *items[same])
            )
        return cls(end, tuple(offsets), tuple(entries), tuple(fixed))

    def lay_out(self, memory: memoryview) -> None:
        """Write the parts that do not change."""
        for start, data in self.fixed:
            memory[start : start + len(data)] = data
