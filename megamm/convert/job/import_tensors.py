"""Converts the tensors of safetensors files to those of a checkpoint, group by group (mapping.Group).

It plans the layout first, then produces the bytes. Each group is a block of its stacked tensor and an item of a file,
as checkpoint/rank_file.py lays them out: whole layers, from which any parallel layout reads its part.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamm.checkpoint import index
from megamm.checkpoint.index import StoredShard
from megamm.checkpoint.rank_file import ALIGNMENT, frame
from megamm.checkpoint.tensor_shards import Shape
from megamm.common.errors import UserError
from megamm.config import ModelConfig
from megamm.convert.families import mapping
from megamm.convert.families.mapping import Group
from megamm.convert.io import dtypes as elements
from megamm.convert.io.safetensors_files import Weights
from megamm.convert.job.plan import Item, Maker


@dataclass(frozen=True)
class Unit:
    """A block that is stored: a group, or rows of a table; its size is without the axes of layers and experts."""

    group: Group
    rows: range | None
    size: Shape
    read_as: torch.dtype
    stored_as: torch.dtype

    @property
    def length(self) -> int:
        """Bytes of its archive."""
        around = frame(self.stored_as, self.block_size)
        elements_size = self.stored_as.itemsize * torch.Size(self.size).numel()
        return len(around.head) + elements_size + len(around.tail)

    @property
    def padded(self) -> int:
        """Its length, rounded up to where the next one begins."""
        return -(-self.length // ALIGNMENT) * ALIGNMENT

    @property
    def offset(self) -> Shape:
        first = 0 if self.rows is None else self.rows.start
        return (*self.group.index, first, *[0] * (len(self.size) - 1)) if self.size else self.group.index

    @property
    def block_size(self) -> Shape:
        return (*[1] * len(self.group.index), *self.size)


@dataclass(frozen=True)
class Import:
    """The import as a plan.Conversion."""

    folder: Path
    model: ModelConfig
    files: Mapping[str, Sequence[Item]]
    stored: tuple[StoredShard, ...]
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...]
    """The dtypes read and stored, for each tensor."""
    identity: str
    name: str = "import"

    @contextmanager
    def opened(self) -> Iterator[Maker]:
        with Weights(self.folder) as weights:
            yield _Reading(weights, self.model)

    def index(self) -> dict[str, bytes]:
        """The checkpoint's tensor files that hold no elements."""
        return index.files_of(self.stored)


@dataclass(frozen=True)
class _Reading:
    weights: Weights
    model: ModelConfig

    def __call__(self, unit: Unit) -> Iterable[bytes | memoryview]:
        around = frame(unit.stored_as, unit.block_size)
        yield around.head
        if unit.rows is None:
            ours = elements.joined(unit.group, self.weights, self.model)
        else:
            ours = torch.empty(unit.size, dtype=unit.read_as)
            self.weights.read(unit.group.theirs[0], ours, unit.rows.start)
        yield from elements.bytes_as(ours, unit.stored_as, unit.group.theirs[0])
        yield around.tail
        yield bytes(unit.padded - unit.length)


def plan(
    weights: Weights, entries: tuple[mapping.Entry, ...], m: ModelConfig, dtype: torch.dtype | None, file_size: int
) -> Import:
    """Plan the import of a checked folder (hf_source.shapes_of). Raises UserError if one tensor has several dtypes."""
    groups = list(mapping.groups(entries, m))
    units = [unit for group in groups for unit in _units(group, weights, m, dtype)]
    shapes = _shapes(units)
    files: dict[str, list[Item]] = {}
    stored: list[StoredShard] = []
    for number, file in enumerate(elements.packed(units, lambda unit: unit.padded, file_size)):
        name, start = f"__{number}_0.distcp", 0
        for unit in file:
            place = shapes[unit.group.ours], unit.offset, unit.block_size
            stored.append(StoredShard(unit.group.ours, *place, unit.stored_as, name, start, unit.length))
            start += unit.padded
        files[f"tensors/{name}"] = [Item(unit.padded, unit) for unit in file]
    _check_dtypes(stored, weights.folder)
    dtypes = tuple((unit.read_as, unit.stored_as) for unit in units if unit.rows is None or unit.rows.start == 0)
    return Import(weights.folder, m, files, tuple(stored), dtypes, _identity(weights, stored))


def _units(group: Group, weights: Weights, m: ModelConfig, dtype: torch.dtype | None) -> Iterator[Unit]:
    described = [weights.places[name] for name in group.theirs]
    read_as = described[0].dtype
    if any(place.dtype != read_as for place in described):
        names = ", ".join(group.theirs)
        raise UserError(f"{names} have several dtypes", where=weights.folder, remedy="convert them to one dtype")
    stored_as = elements.target_of(read_as, dtype)
    if group.entry is not None:
        parts = [torch.empty(place.shape, dtype=place.dtype, device="meta") for place in described]
        yield Unit(group, None, tuple(group.entry.join(parts, m).shape), read_as, stored_as)
        return
    rows, *rest = described[0].shape
    for part in elements.windows(rows, torch.Size(rest).numel() * read_as.itemsize):
        yield Unit(group, part, (len(part), *rest), read_as, stored_as)


def _shapes(units: Sequence[Unit]) -> dict[str, Shape]:
    """Shapes of the whole tensors: as large as their blocks extend."""
    shapes: dict[str, Shape] = {}
    for unit in units:
        end = tuple(a + b for a, b in zip(unit.offset, unit.block_size, strict=True))
        before = shapes.get(unit.group.ours, end)
        shapes[unit.group.ours] = tuple(map(max, before, end))
    return shapes


def _check_dtypes(stored: Sequence[StoredShard], folder: Path) -> None:
    found: dict[str, torch.dtype] = {}
    for entry in stored:
        if found.setdefault(entry.key, entry.dtype) != entry.dtype:
            what = f"layers of {entry.key} have the dtypes {found[entry.key]} and {entry.dtype}"
            raise UserError(what, where=folder, remedy="convert them to one dtype (--dtype)")


def _identity(weights: Weights, stored: Sequence[StoredShard]) -> str:
    """An identity of the input (files by name, size and mtime, tensor offsets) and of the output."""
    told: list[Any] = []
    for file in weights.files:
        state = file.stat()
        told.append([file.name, state.st_size, state.st_mtime_ns])
    told += [[name, place.file.name, place.start] for name, place in sorted(weights.places.items())]
    told += [[e.key, *e.offset, *e.size, str(e.dtype), e.file, e.start] for e in stored]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
