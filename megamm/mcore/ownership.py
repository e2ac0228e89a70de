"""Checks that every parameter element has exactly one owner, and as many copies as its gradient is reduced over.

Input: the `HeldBox`s that ranks hold, boxes in the tensors of the whole model. Every tensor is cut into cells along the
borders of all its pieces, and owners and holders of each cell are counted: this is exact, and the work depends only on
the number of pieces.
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

    @property
    def box(self) -> str:
        ranges = [f"{o}:{o + e}" for o, e in zip(self.offset, self.extent, strict=True)]
        return f"[{', '.join(ranges)}]{' as owner' if self.is_owner else ''}"


def fault(pieces: Iterable[tuple[HeldBox, int]]) -> str | None:
    """Return the first tensor with an element that is not owned once or not held by `copies` ranks, or None.

    pieces: the pieces of one rank of every kind, each with the number of ranks of that kind in the world.
    """
    by_key: dict[str, list[tuple[HeldBox, int]]] = {}
    for piece, ranks in pieces:
        by_key.setdefault(piece.key, []).append((piece, ranks))
    for key, held in by_key.items():
        found = _fault_of_tensor(held)
        if found:
            return f"tensor {key} {found}"
    return None


def _fault_of_tensor(held: list[tuple[HeldBox, int]]) -> str | None:
    first = held[0][0]
    for piece, _ in held:
        if piece.shape != first.shape:
            return f"has shape {first.shape} on one rank and {piece.shape} on another"
        if piece.copies != first.copies:
            return f"is reduced over {first.copies} ranks by one of them and over {piece.copies} by another"
        ends = [o + e for o, e in zip(piece.offset, piece.extent, strict=True)]
        if min(piece.offset, default=0) < 0 or any(e > s for e, s in zip(ends, piece.shape, strict=True)):
            return f"of shape {piece.shape} does not contain the piece {piece.box}"
    borders = [
        np.unique([0, size, *(p.offset[d] for p, _ in held), *(p.offset[d] + p.extent[d] for p, _ in held)])
        for d, size in enumerate(first.shape)
    ]
    owners = np.zeros([len(b) - 1 for b in borders], dtype=np.int64)
    holders = np.zeros_like(owners)
    for piece, ranks in held:
        cells = tuple(
            slice(*np.searchsorted(b, (o, o + e))) for b, o, e in zip(borders, piece.offset, piece.extent, strict=True)
        )
        owners[cells] += piece.is_owner
        holders[cells] += ranks
    for counts, wanted, what in ((owners, 1, "owned by"), (holders, first.copies, "held by")):
        wrong = np.argwhere(counts != wanted)
        if len(wrong):
            cell = tuple(wrong[0])
            where = [int(b[i]) for b, i in zip(borders, cell, strict=True)]
            return f"of shape {first.shape}: element {where} is {what} {int(counts[cell])} ranks, not {wanted}"
    return None
