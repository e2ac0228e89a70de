"""The tensors of the tools' inputs, one by one: a native checkpoint or run, a transformers folder, a file.

A checkpoint stacks the layers of a tensor, and its experts; here each is a separate piece, under the checkpoint's
name with the numbers inserted (`decoder.layers.3.mlp.experts.0.linear_fc1.weight`) or, if a family of transformers has
the model, under the names and in the shapes of that family. One piece is in memory at a time.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from megamm import checkpoint
from megamm.checkpoint import index
from megamm.checkpoint.folder import find_checkpoint
from megamm.checkpoint.reader import TensorReader
from megamm.checkpoint.tensor_shards import Shape, TensorShard
from megamm.checkpoint.whole_tensors import Described, stream
from megamm.common.errors import UserError
from megamm.config import ModelConfig, RunConfig, config_from_dict
from megamm.convert.families import mapping
from megamm.convert.families.config import family_for
from megamm.convert.families.tables import Family
from megamm.convert.io.safetensors_files import Weights
from megamm.model.vocabulary import Vocabulary

_EXPERTS = ".experts.experts."
_RANK = re.compile(r"__(\d+)_\d+\.distcp")
_ROUTED = re.compile(r"\.mlp\.(router|experts|shared_experts)\.")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


class Tensors(Protocol):
    """Names with shapes and dtypes, and their values; each call to `read` may access the files again."""

    where: Path
    described: dict[str, Described]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole tensors on the CPU; reading those of one layer together is fastest. Raises UserError if damaged."""


@dataclass(frozen=True)
class Owned:
    """The part of a piece that a rank's file holds: the box [offset, offset + size)."""

    rank: int
    offset: Shape
    size: Shape

    def __str__(self) -> str:
        return f"[{', '.join(f'{a}:{a + n}' for a, n in zip(self.offset, self.size, strict=True))}]"


class Native:
    """The weights of a verified checkpoint, piece by piece, without the optimizer state."""

    def __init__(self, step: Path) -> None:
        """Open it. Raises UserError if the index is not safe to read."""
        self.where, self.state = step, checkpoint.read_state(step)
        self.stored = {k: v for k, v in sorted(index.read(step / "tensors").items()) if not k.startswith("optimizer.")}
        self.places: dict[str, tuple[str, Shape]] = {}
        self.described: dict[str, Described] = {}
        layers = int(self.state.config["model"]["num_layers"])
        for key, stored in self.stored.items():
            kind = str(stored.dtype).removeprefix("torch.")
            for place in _places(key, stored.shape):
                name = _piece(key, place, _first_layer(key, stored.shape, layers))
                self.places[name] = key, place
                self.described[name] = Described(stored.shape[len(place) :], kind)
        self.described = dict(sorted(self.described.items(), key=lambda item: natural(item[0])))
        self.names = {at: name for name, at in self.places.items()}

    @property
    def config(self) -> RunConfig:
        """The config of the run that wrote it."""
        return config_from_dict(self.state.config, where=self.where)

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, without the padding of the tables."""
        return Vocabulary.from_json(self.state.vocabulary).size

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        found = {name: torch.empty_like(meta(self.described[name]), device="cpu") for name in names}
        with closing(TensorReader(self.where / "tensors", self.stored)) as pieces:
            for name, tensor in found.items():
                key, place = self.places[name]
                rest = tensor.shape
                offset, size = place + (0,) * len(rest), (1,) * len(place) + tuple(rest)
                pieces.read(TensorShard(key, self.stored[key].shape, offset, size, tensor))
        return found

    def owners(self, name: str) -> list[Owned]:
        """The parts of a piece, with the rank whose file holds each."""
        key, place = self.places[name]
        found = []
        for entry in self.stored[key].shards:
            if all(low <= at < low + n for at, low, n in zip(place, entry.offset, entry.size, strict=False)):
                match = _RANK.fullmatch(entry.file)
                rank = int(match[1]) if match else -1
                found.append(Owned(rank, entry.offset[len(place) :], entry.size[len(place) :]))
        return sorted(found, key=lambda owned: (owned.rank, owned.offset))


class AsTransformers:
    """A checkpoint's weights as the family's tensors: with the names and shapes that an export has."""

    def __init__(self, native: Native, family: Family, m: ModelConfig) -> None:
        """Map the tensors. Raises UserError if the checkpoint lacks a tensor of its model, or its shape is wrong."""
        self.native, self.where, self.m = native, native.where, m
        self.parts: dict[str, tuple[str, mapping.Group, int]] = {}
        """Their name -> the piece, and which part of it."""
        self.described: dict[str, Described] = {}
        try:
            for group in mapping.groups(family.entries, m):
                piece = native.names[group.ours, group.index]
                for number, part in enumerate(self._cut(meta(native.described[piece]), group)):
                    self.parts[group.theirs[number]] = piece, group, number
                    self.described[group.theirs[number]] = described_of(part)
        except (KeyError, RuntimeError) as error:
            what = f"the tensors do not match the checkpoint's config: {error}"
            raise UserError(what, where=self.where, remedy="use another checkpoint") from None

    @cached_property
    def tables(self) -> set[str]:
        """Names of the tensors whose first axis is the vocabulary; here without padding."""
        return {name for name, (piece, _, _) in self.parts.items() if piece in (mapping.EMBEDDING, mapping.HEAD)}

    def _cut(self, ours: torch.Tensor, group: mapping.Group) -> Sequence[torch.Tensor]:
        if group.entry is not None:
            return group.entry.cut(ours, self.m)
        return [ours[: self.native.vocabulary_size] if group.ours in (mapping.EMBEDDING, mapping.HEAD) else ours]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        wanted = {name: self.parts[name] for name in names}
        pieces = self.native.read({piece: None for piece, _, _ in wanted.values()})
        return {
            name: self._cut(pieces[piece], group)[number].contiguous()
            for name, (piece, group, number) in wanted.items()
        }


class OfFiles:
    """The tensors of a transformers folder, or of a safetensors file."""

    def __init__(self, place: Path) -> None:
        """Open it. Raises UserError if there are no weights, or they are damaged."""
        self.where = place
        self.weights = Weights(place)
        self.described = {
            name: Described(found.shape, str(found.dtype).removeprefix("torch."))
            for name, found in sorted(self.weights.places.items(), key=lambda item: natural(item[0]))
        }

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        with self.weights:  # closes its files between reads
            return {name: self.weights[name] for name in names}


def open_place(place: Path, *, by_family: bool = False) -> Native | AsTransformers | OfFiles:
    """Open a run (its newest valid checkpoint), a checkpoint, a transformers folder, or a safetensors file.

    by_family: a checkpoint under the names of transformers. Raises UserError if it is none of these or, by_family, if
    no family has the model.
    """
    if place.is_file() or (place.is_dir() and not is_native(place)):
        return OfFiles(place)
    native = Native(find_checkpoint(place))
    if not by_family:
        return native
    model = native.config.model
    return AsTransformers(native, family_for(model), model)


def is_native(place: Path) -> bool:
    """Whether it is the folder of a run or a checkpoint."""
    return (place / checkpoint.STATE).is_file() or (place / "checkpoints").is_dir()


def not_finite(tensors: Tensors) -> dict[str, int]:
    """Tensors that contain NaN or Inf, with the number of such values."""
    floats = {name: entry for name, entry in tensors.described.items() if meta(entry).is_floating_point()}
    # torch has no isfinite for 8 bits; all of their values exist in 16 bits.
    wide = ((name, v.bfloat16() if v.element_size() == 1 else v) for name, v in stream(tensors.read, floats))
    counts = {name: int((~values.isfinite()).sum()) for name, values in wide}
    return {name: count for name, count in counts.items() if count}


def layer_of(name: str) -> int | None:
    """The layer number in a tensor's name, in any of the naming schemes used here."""
    match = _LAYER.search(f".{name}")
    return int(match[1]) if match else None


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def meta(entry: Described) -> torch.Tensor:
    """A tensor of that shape and dtype without values."""
    return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="meta")


def described_of(tensor: torch.Tensor) -> Described:
    """The shape and dtype of a tensor."""
    return Described(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _places(key: str, shape: Shape) -> Iterator[Shape]:
    """Indices of the pieces along the stacked axes of a stored tensor."""
    stacked = 0 if not key.startswith(mapping.LAYERS) else 2 if _EXPERTS in key else 1
    yield from itertools.product(*map(range, shape[:stacked]))


def _first_layer(key: str, shape: Shape, layers: int) -> int:
    """The first layer of a stack: with dense layers first, tensors of experts and routers exist only after them."""
    return layers - shape[0] if key.startswith(mapping.LAYERS) and _ROUTED.search(key) else 0


def _piece(key: str, place: Shape, first: int) -> str:
    if not place:
        return key
    name = key.replace(mapping.LAYERS, f"{mapping.LAYERS}{first + place[0]}.", 1)
    return name.replace(_EXPERTS, f".experts.{place[1]}.", 1) if len(place) > 1 else name
