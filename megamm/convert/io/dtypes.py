"""The values of a conversion: joined, cut, cast to another dtype, packed into files of a given size.

Memory use: one group (mapping.Group), and a window of it in the other dtype. A group that is not made of views
(query, key and value by query group) takes two copies.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from megamm.checkpoint.reader import bytes_of
from megamm.common.errors import UserError
from megamm.config import ModelConfig
from megamm.convert.families.mapping import Group
from megamm.convert.io.safetensors_files import Weights

WINDOW = 16 << 20
"""Bytes of a table's rows that form one item; also the elements converted at a time."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Unit = TypeVar("Unit")


def windows(rows: int, row_bytes: int) -> Iterator[range]:
    """Ranges of a table's rows, WINDOW bytes each."""
    step = max(1, WINDOW // max(1, row_bytes))
    return (range(row, min(rows, row + step)) for row in range(0, rows, step))


def packed(units: Sequence[Unit], size: Callable[[Unit], int], limit: int) -> list[list[Unit]]:
    """Units in their order, split into files of at most `limit` bytes; a larger unit gets its own file."""
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
    """A group's part of the stored tensor, in the files' dtype. Raises KeyError for a missing tensor, or UserError."""
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
    """A tensor's elements cast to a dtype. Raises UserError for a finite value that is out of range there."""
    flat = tensor.reshape(-1)
    if tensor.dtype == dtype:
        yield bytes_of(flat)
        return
    for part in flat.split(WINDOW // tensor.itemsize):
        new = part.to(dtype)
        if bool((new.isinf() & part.isfinite()).any()):
            largest = float(part[part.isfinite()].abs().max())
            what = f"{name} has a value of {largest:.3g}, which is out of range for {_named(dtype)}"
            raise UserError(what, remedy="convert it to bf16 or fp32: --dtype bf16")
        yield bytes_of(new)


def target_of(dtype: torch.dtype, chosen: torch.dtype | None) -> torch.dtype:
    """The target of a stored dtype: the chosen one, if any, for floating point; otherwise the same."""
    return chosen if chosen is not None and dtype.is_floating_point else dtype


def said(found: Sequence[tuple[torch.dtype, torch.dtype]]) -> list[str]:
    """The dtype changes as readable lines."""
    counts = {pair: found.count(pair) for pair in dict.fromkeys(found)}
    return [
        f"{count} tensors {_named(old)}" + (f" -> {_named(new)}" if old != new else ", unchanged")
        for (old, new), count in counts.items()
    ]


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
