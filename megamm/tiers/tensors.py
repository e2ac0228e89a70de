"""The tensors of a checkpoint's folder, whole, for the tools: names, shapes, dtypes, values, differences.

Input: STEP_FOLDER/tensors in torch's distributed checkpoint format (checkpoint/reader.py), values in batches of bounded
size.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BATCH_BYTES = 1 << 28
"""Of values in memory at a time, a larger tensor apart."""


@dataclass(frozen=True)
class Described:
    """One stored tensor; `dtype` as torch names it, "float32"."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of values."""
        return prod(self.shape)


def described(folder: Path) -> dict[str, Described]:
    """All tensors of a checkpoint by name. UserError for an index that is not safe to read."""
    from megamm.checkpoint import index

    stored = sorted(index.read(folder / "tensors").items())
    return {name: Described(tensor.shape, str(tensor.dtype).removeprefix("torch.")) for name, tensor in stored}


def values(folder: Path, wanted: dict[str, Described]) -> "dict[str, torch.Tensor]":
    """Whole tensors, on the CPU; `wanted` is a part of `described(folder)`. UserError for damaged ones."""
    import torch

    from megamm.checkpoint import reader
    from megamm.checkpoint.blocks import Block

    tensors = {name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype)) for name, entry in wanted.items()}
    reader.load(folder / "tensors", [Block.whole(name, tensor) for name, tensor in tensors.items()])
    return tensors


@dataclass(frozen=True)
class Difference:
    """Of a tensor that both checkpoints have in the same shape and dtype; max_abs is NaN where one has NaN."""

    name: str
    differing: int
    max_abs: float


def differences(one: Path, other: Path, names: dict[str, Described]) -> Iterator[Difference]:
    """The tensors among `names` that are not the same bit for bit."""
    import torch

    for batch in _batches(names):
        ours, theirs = values(one, batch), values(other, batch)
        for name in batch:
            a, b = (tensors[name].reshape(-1).contiguous() for tensors in (ours, theirs))
            unequal = (a.view(torch.uint8) != b.view(torch.uint8)).reshape(len(a), -1).any(1) if len(a) else a.bool()
            if unequal.any():
                distance = (a[unequal].double() - b[unequal].double()).abs().max()
                yield Difference(name, int(unequal.sum()), float(distance))


def _batches(names: dict[str, Described]) -> Iterable[dict[str, Described]]:
    batch: dict[str, Described] = {}
    for name, entry in names.items():
        # 8 bytes: the widest dtype there is.
        if batch and 8 * (sum(e.elements for e in batch.values()) + entry.elements) > BATCH_BYTES:
            yield batch
            batch = {}
        batch[name] = entry
    if batch:
        yield batch
