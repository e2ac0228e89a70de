"""Writes the tensors of a checkpoint as safetensors files, group by group (mapping.Group): the layout, then the bytes.

A file has the header, then the tensors in the order of the layers, wider dtypes first so that each is aligned.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megamm.checkpoint import index, manifest
from megamm.checkpoint.index import StoredTensor
from megamm.checkpoint.reader import TensorReader
from megamm.checkpoint.tensor_shards import Shape, TensorShard
from megamm.common.errors import UserError
from megamm.config import ModelConfig
from megamm.convert.families import mapping
from megamm.convert.families.mapping import Group
from megamm.convert.io import dtypes as elements
from megamm.convert.io.safetensors_files import header
from megamm.convert.job.plan import Item, Maker
from megamm.tokenizers.io import WEIGHTS


@dataclass(frozen=True)
class Unit:
    """A group, the shape read from it, and the tensors that it is split into: name, dtype, shape."""

    group: Group
    shape: Shape
    stored_as: torch.dtype
    tensors: tuple[tuple[str, torch.dtype, Shape], ...]

    @property
    def size(self) -> int:
        return sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in self.tensors)

    def items(self) -> Iterator[Item]:
        """The whole unit as one item; a table as several, by rows."""
        _, dtype, _ = self.tensors[0]
        if self.group.entry is not None:
            yield Item(self.size, Cut(self, None))
            return
        row = torch.Size(self.shape[1:]).numel()
        for rows in elements.windows(self.shape[0], row * self.stored_as.itemsize):
            yield Item(len(rows) * row * dtype.itemsize, Cut(self, rows))


@dataclass(frozen=True)
class Cut:
    """A unit as a whole, or rows of its only tensor."""

    unit: Unit
    rows: range | None


@dataclass(frozen=True)
class Export:
    """The export as a plan.Conversion. tensors: the tensors folder of a checkpoint."""

    tensors: Path
    entries: tuple[mapping.Entry, ...]
    model: ModelConfig
    files: Mapping[str, Sequence[Item]]
    placed: Mapping[str, str]
    """The file of each tensor."""
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...]
    """The dtypes stored and written, for each tensor."""
    identity: str
    name: str = "export"

    @contextmanager
    def opened(self) -> Iterator[Maker]:
        with closing(TensorReader(self.tensors)) as pieces:
            yield _Reading(pieces, self.model)

    def index(self) -> bytes:
        """The content of model.safetensors.index.json."""
        size = sum(item.size for items in self.files.values() for item in items[1:])
        return json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(self.placed.items()))}).encode()


@dataclass(frozen=True)
class _Reading:
    pieces: TensorReader
    model: ModelConfig

    def __call__(self, what: bytes | Cut) -> Iterable[bytes | memoryview]:
        if isinstance(what, bytes):
            yield what
            return
        unit, group = what.unit, what.unit.group
        shape = unit.shape if what.rows is None else (len(what.rows), *unit.shape[1:])
        first = (0 if what.rows is None else what.rows.start, *[0] * (len(shape) - 1))
        ours = torch.empty(shape, dtype=unit.stored_as)
        whole, ones = self.pieces.stored[group.ours].shape, (1,) * len(group.index)
        self.pieces.read(TensorShard(group.ours, whole, (*group.index, *first), (*ones, *shape), ours))
        parts = [ours] if group.entry is None else group.entry.cut(ours, self.model)
        for part, (name, dtype, _) in zip(parts, unit.tensors, strict=True):
            yield from elements.bytes_as(part, dtype, name)


def plan(
    step: Path,
    entries: tuple[mapping.Entry, ...],
    m: ModelConfig,
    vocabulary_size: int,
    dtype: torch.dtype | None,
    shard_size: int,
) -> Export:
    """Plan the export of a checkpoint's folder. Raises UserError for missing tensors, or ones the family lacks."""
    tensors = step / "tensors"
    stored = {name: found for name, found in index.read(tensors).items() if not name.startswith("optimizer.")}
    groups = list(mapping.groups(entries, m))
    missing, unknown = {g.ours for g in groups} - stored.keys(), stored.keys() - {g.ours for g in groups}
    for wrong, what in ((missing, "missing in the checkpoint"), (unknown, "unknown to the family")):
        if wrong:
            raise UserError(f"tensors {what}: {', '.join(sorted(wrong))}", where=step, remedy="use another checkpoint")
    units = [_unit(group, stored[group.ours], m, vocabulary_size, dtype) for group in groups]
    shards = elements.packed(units, lambda unit: unit.size, shard_size)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files: dict[str, list[Item]] = {}
    for name, shard in zip(names if len(shards) > 1 else [WEIGHTS], shards, strict=True):
        ordered = sorted(shard, key=lambda unit: -unit.tensors[0][1].itemsize)
        begin = header(tensor for unit in ordered for tensor in unit.tensors)
        files[name] = [Item(len(begin), begin), *(item for unit in ordered for item in unit.items())]
    placed = {name: file for file, shard in zip(files, shards, strict=True) for u in shard for name, _, _ in u.tensors}
    headers = hashlib.sha256(b"".join(items[0].what for items in files.values())).hexdigest()
    source = hashlib.sha256((step / manifest.NAME).read_bytes()).hexdigest()
    # A damaged file that is repaired while a killed conversion waits has the same size and digest, but another ctime.
    changed = max(file.stat().st_ctime_ns for file in tensors.iterdir())
    dtypes = tuple((unit.stored_as, written) for unit in units for _, written, _ in unit.tensors)
    return Export(tensors, entries, m, files, placed, dtypes, f"{source} {changed} {headers}")


def _unit(group: Group, stored: StoredTensor, m: ModelConfig, vocabulary_size: int, dtype: torch.dtype | None) -> Unit:
    shape = stored.shape[len(group.index) :]
    if group.ours in (mapping.EMBEDDING, mapping.HEAD):  # without the padding of a parallel layout
        shape = (vocabulary_size, *shape[1:])
    ours = torch.empty(shape, dtype=stored.dtype, device="meta")
    parts = [ours] if group.entry is None else group.entry.cut(ours, m)
    written = elements.target_of(stored.dtype, dtype)
    tensors = zip(group.theirs, parts, strict=True)
    return Unit(group, shape, stored.dtype, tuple((name, written, tuple(part.shape)) for name, part in tensors))
