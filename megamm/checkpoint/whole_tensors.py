"""The whole tensors of a checkpoint folder, for the tools: names, shapes, dtypes, values, differences.

Input: STEP_FOLDER/tensors in torch's distributed checkpoint format (checkpoint/reader.py). Values are read in batches
of bounded size.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BATCH_BYTES = 1 << 24
"""Maximum bytes of values in memory at a time, unless a single tensor is larger."""


@dataclass(frozen=True)
class Described:
    """One stored tensor; `dtype` is torch's name, for example "float32"."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of values."""
        return prod(self.shape)


Read = Callable[[dict[str, Described]], "dict[str, torch.Tensor]"]
"""Returns the whole tensors of these names."""


def described(folder: Path) -> dict[str, Described]:
    """Return all tensors of a checkpoint by name. UserError if the index is not safe to read."""
    from megamm.checkpoint import index

    stored = sorted(index.read(folder / "tensors").items())
    return {name: Described(tensor.shape, str(tensor.dtype).removeprefix("torch.")) for name, tensor in stored}


def values(folder: Path) -> Read:
    """Return a function that reads whole CPU tensors for a part of `described(folder)`. UserError for damaged ones."""
    import torch

    from megamm.checkpoint import index, reader
    from megamm.checkpoint.tensor_shards import TensorShard

    stored = index.read(folder / "tensors")

    def read(wanted: dict[str, Described]) -> dict[str, torch.Tensor]:
        tensors = {name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype)) for name, entry in wanted.items()}
        shards = [TensorShard.whole(name, tensor) for name, tensor in tensors.items()]
        reader.load(folder / "tensors", shards, stored)
        return tensors

    return read


@dataclass(frozen=True)
class Difference:
    """Difference of a tensor with the same shape on both sides; max_abs is NaN if only one side has NaN."""

    name: str
    differing: int
    max_abs: float


def differences(one: Path, other: Path, names: dict[str, Described]) -> Iterator[Difference]:
    """Yield the tensors of `names` that are not bitwise equal in two checkpoints (with the same shape and dtype)."""
    for name, a, b in pairs(values(one), values(other), names):
        if found := difference(name, a, b):
            yield found


def pairs(one: Read, other: Read, names: dict[str, Described]) -> "Iterator[tuple[str, torch.Tensor, torch.Tensor]]":
    """Yield each tensor's name and its values on both sides; `names` describes the first side."""
    for batch in _batches(names):
        ours, theirs = one(batch), other(batch)
        for name in batch:
            yield name, ours.pop(name), theirs.pop(name)


def stream(read: Read, names: dict[str, Described]) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield each tensor's name and values."""
    for batch in _batches(names):
        found = read(batch)
        for name in batch:
            yield name, found.pop(name)


def difference(name: str, one: "torch.Tensor", other: "torch.Tensor") -> Difference | None:
    """Compare two tensors of the same shape; None if bitwise equal, or, with different dtypes, equal in value."""
    import torch

    a, b = (tensor.reshape(-1).contiguous() for tensor in (one, other))
    if a.dtype == b.dtype:
        bits = a.view(torch.uint8), b.view(torch.uint8)
        whole = len(bits[0]) % 8 == 0 and not any(each.storage_offset() % 8 for each in bits)
        # torch.equal needs no memory; on words of eight bytes it is eight times as fast.
        if torch.equal(*(each.view(torch.int64) if whole else each for each in bits)):
            return None
        unequal = (bits[0] != bits[1]).reshape(len(a), -1).any(1)
    else:
        a, b = a.double(), b.double()
        unequal = (a != b) & ~(a.isnan() & b.isnan())
    if not unequal.any():
        return None
    distance = (a[unequal].double() - b[unequal].double()).abs().max()
    return Difference(name, int(unequal.sum()), float(distance))


def _batches(names: dict[str, Described]) -> Iterable[dict[str, Described]]:
    batch: dict[str, Described] = {}
    for name, entry in names.items():
        # 8 bytes: the widest dtype.
        if batch and 8 * (sum(e.elements for e in batch.values()) + entry.elements) > BATCH_BYTES:
            yield batch
            batch = {}
        batch[name] = entry
    if batch:
        yield batch
