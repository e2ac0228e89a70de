"""Checks that every parameter element has exactly one owner, and as many copies as its gradient is reduced over.

Input: the boxes of the whole model's tensors that ranks hold. Every tensor is cut into cells along the borders of all
its boxes, and owners and holders of each cell are counted: this is exact, and the work depends only on
the number of boxes.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class HeldBox(NamedTuple):
    """A box of a whole tensor that a rank holds; shapes and offsets count elements."""

    key: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    extent: tuple[int, ...]
    is_owner: bool
    """Whether a checkpoint stores this rank's copy; the other copies are replicas."""
    is_expert: bool
    is_parameter: bool
    copies: int
    """Number of ranks that must hold these elements: those over which Megatron reduces the parameter's gradient."""

    @property
    def size(self) -> int:
        return math.prod(self.extent)

    def __str__(self) -> str:
        ranges = [f"{o}:{o + e}" for o, e in zip(self.offset, self.extent, strict=True)]
        return f"[{', '.join(ranges)}]{' as owner' if self.is_owner else ''}"


def fault(boxes: Iterable[tuple[HeldBox, int]]) -> str | None:
    """Return the first tensor with an element that is not owned once or not held by `copies` ranks, or None.

    boxes: the boxes of one rank of every kind, each with the number of ranks of that kind in the world.
    """
    by_key: dict[str, list[tuple[HeldBox, int]]] = {}
    for box, ranks in boxes:
        by_key.setdefault(box.key, []).append((box, ranks))
    for key, held in by_key.items():
        found = _fault_of_tensor(held)
        if found:
            return f"tensor {key} {found}"
    return None


def _fault_of_tensor(held: list[tuple[HeldBox, int]]) -> str | None:
    first = held[0][0]
    for box, _ in held:
        if box.shape != first.shape:
            return f"has shape {first.shape} on one rank and {box.shape} on another"
        if box.copies != first.copies:
            return f"is reduced over {first.copies} ranks by one of them and over {box.copies} by another"
        ends = [o + e for o, e in zip(box.offset, box.extent, strict=True)]
        if min(box.offset, default=0) < 0 or any(e > s for e, s in zip(ends, box.shape, strict=True)):
            return f"of shape {box.shape} does not contain the piece {box}"
    # Between two neighbouring borders no box begins or ends: a cell is in a box as a whole, or not at all.
    borders = [
        np.unique([0, size, *(p.offset[d] for p, _ in held), *(p.offset[d] + p.extent[d] for p, _ in held)])
        for d, size in enumerate(first.shape)
    ]
    owners = np.zeros([len(b) - 1 for b in borders], dtype=np.int64)
    holders = np.zeros_like(owners)
    for box, ranks in held:
        cells = tuple(
            slice(*np.searchsorted(b, (o, o + e))) for b, o, e in zip(borders, box.offset, box.extent, strict=True)
        )
        # A box stands for as many ranks of its kind; a checkpoint stores the copy of one of them.
        owners[cells] += box.is_owner
        holders[cells] += ranks
    for counts, wanted, what in ((owners, 1, "owned by"), (holders, first.copies, "held by")):
        wrong = np.argwhere(counts != wanted)
        if len(wrong):
            cell = tuple(wrong[0])
            where = [int(b[i]) for b, i in zip(borders, cell, strict=True)]
            return f"of shape {first.shape}: element {where} is {what} {int(counts[cell])} ranks, not {wanted}"
    return None
