"""The tensors of a checkpoint's folder, read without Megatron's or the run's help: names, shapes, dtypes, values.

Input: STEP_FOLDER/tensors in torch's distributed checkpoint format; its index is checked before it is read, values are
read in batches of bounded size.
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from megamm.errors import UserError

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
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from megamm.checkpoint import index

    entries = index.check_index(folder / "tensors").state_dict_metadata
    return {
        name: Described(tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."))
        for name, entry in sorted(entries.items())
        if isinstance(entry, TensorStorageMetadata)
    }


def values(folder: Path, wanted: dict[str, Described]) -> "dict[str, torch.Tensor]":
    """Whole tensors, on the CPU; `wanted` is a part of `described(folder)`, which has checked the index."""
    import torch
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    tensors = {name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype)) for name, entry in wanted.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = checkpoint.FileSystemReader(folder / "tensors")
        try:
            checkpoint.load(dict(tensors), storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            why = str(error).splitlines()[-1].strip()
            raise UserError(f"its tensors cannot be read: {why}", where=folder, remedy="verify it") from None
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
