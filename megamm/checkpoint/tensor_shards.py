"""Shards: boxes of a whole tensor in this rank's memory, to be saved or loaded.

A whole tensor `key` has `shape`; a shard starts at `offset` in it, has `size`, and `data` is its live, contiguous
storage. A rank's flat range of a tensor (the distributed optimizer's shards) is cut into boxes by `flat_boxes`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]
STATE = "optimizer.state."
MAIN, MOMENTS = "param", ("exp_avg", "exp_avg_sq")
"""Kinds of optimizer state: the float32 main copy and Adam's moments of KEY have the key `STATE + kind + "." + KEY`."""


@dataclass(frozen=True, eq=False)
class TensorShard:
    """A shard of a tensor. data: contiguous, `size` elements, on any device.

    grows: a stored tensor with another first size still fits (the vocabulary's padding depends on the layout); only the
    rows that both have are read. steady: only an optimizer update (see engine.before_update) or a load changes the
    data.
    """

    key: str
    shape: Shape
    offset: Shape
    size: Shape
    data: torch.Tensor
    grows: bool = False
    steady: bool = False

    @classmethod
    def whole(cls, key: str, tensor: torch.Tensor) -> "TensorShard":
        """Return a shard of all of a tensor."""
        shape = tuple(tensor.shape)
        return cls(key, shape, (0,) * len(shape), shape, tensor.detach().contiguous())


def flat_boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape, int]]:
    """Yield (offset, size, flat index of the first element) of boxes that cover the row-major elements [start, stop).

    There are at most 2 n - 1 boxes for n axes: the end of the first row, whole rows, and the begin of the last row,
    each split recursively.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,), start) if shape else ((), (), 0)
        return
    row = math.prod(shape[1:])
    first, last = start // row, stop // row
    if first == last:  # within one row
        for offset, size, at in flat_boxes(shape[1:], start - first * row, stop - first * row):
            yield (first, *offset), (1, *size), first * row + at
        return
    if start % row:
        for offset, size, at in flat_boxes(shape[1:], start % row, row):
            yield (first, *offset), (1, *size), first * row + at
        first += 1
    # Whole rows are contiguous: one box, however many there are.
    if first < last:
        rest = (0,) * (len(shape) - 1)
        yield (first, *rest), (last - first, *shape[1:]), first * row
    for offset, size, at in flat_boxes(shape[1:], 0, stop % row):
        yield (last, *offset), (1, *size), last * row + at
