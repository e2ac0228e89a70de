"""Elements of a conversion on their way: joined, cut, in another dtype, packed into files of a size.

In memory at once: a group (mapping.Group), and a window of it in the other dtype. Of a group that is not made of views
(query, key and value by query group) there are two copies.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from megamm.checkpoint.pieces import bytes_of
from megamm.config import ModelConfig
from megamm.convert.mapping import Group
from megamm.convert.weights import Weights
from megamm.errors import UserError

WINDOW = 16 << 20
"""Bytes of a table's rows that are one item, and elements converted at a time."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Unit = TypeVar("Unit")


def windows(rows: int, row_bytes: int) -> Iterator[range]:
    """Rows of a table, WINDOW bytes at a time."""
    step = max(1, WINDOW // max(1, row_bytes))
    return (range(row, min(rows, row + step)) for row in range(0, rows, step))


def packed(units: Sequence[Unit], size: Callable[[Unit], int], limit: int) -> list[list[Unit]]:
    """Units in their order, in files of at most `limit` bytes; a larger one has its own."""
    found: list[list[Unit]] = [[]]
    filled = 0
    for unit in units:
        if found[-1] and filled + size(unit) > limit:
            found.append([])
            filled = 0
        found[-1].append(unit)
        filled += size(unit)
    return found


def joined(group: Group, weights: Weights, m: ModelConfig) -> torch.Tensor:
    """A group's part of the stored tensor, of the files' dtype. KeyError names a missing tensor; UserError."""
    if group.entry is None:
        return weights[group.theirs[0]]
    described = [
        torch.empty(weights.places[n].shape, dtype=weights.places[n].dtype, device="meta") for n in group.theirs
    ]
    like = group.entry.join(described, m)
    ours = torch.empty(like.shape, dtype=like.dtype)
    parts = group.entry.cut(ours, m)
    memory = ours.untyped_storage().data_ptr()
    if all(part.untyped_storage().data_ptr() == memory and part.is_contiguous() for part in parts):
        for name, part in zip(group.theirs, parts, strict=True):
            weights.read(name, part)
        return ours
    del ours, parts
    return group.entry.join([weights[name] for name in group.theirs], m)


def bytes_as(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> Iterator[memoryview]:
    """A tensor's elements as those of a dtype. UserError for a finite number that has none there."""
    flat = tensor.reshape(-1)
    if tensor.dtype == dtype:
        yield bytes_of(flat)
        return
    for part in flat.split(WINDOW // tensor.itemsize):
        new = part.to(dtype)
        if bool((new.isinf() & part.isfinite()).any()):
            largest = float(part[part.isfinite()].abs().max())
            what = f"{name} has a value of {largest:.3g}, which {_named(dtype)} has not"
            raise UserError(what, remedy="convert it to bf16 or fp32")
        yield bytes_of(new)


def target_of(dtype: torch.dtype, chosen: torch.dtype | None) -> torch.dtype:
    """What a stored dtype becomes: numbers with a fraction the chosen one, if there is one."""
    return chosen if chosen is not None and dtype.is_floating_point else dtype


def said(found: Sequence[tuple[torch.dtype, torch.dtype]]) -> list[str]:
    """What becomes of dtypes, for a person."""
    counts = {pair: found.count(pair) for pair in dict.fromkeys(found)}
    return [
        f"{count} tensors {_named(old)}" + (f" -> {_named(new)}" if old != new else ", as they are")
        for (old, new), count in counts.items()
    ]


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
