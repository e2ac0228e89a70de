"""The tensors of the tools' inputs, one by one: a native checkpoint or run, a transformers folder, a file.

A checkpoint stacks the layers of a tensor, and its experts; here each is a tensor of its own, under the checkpoint's
name with the numbers inserted (`decoder.layers.3.mlp.experts.0.linear_fc1.weight`) or, if a family of transformers has
the model, under the names and in the shapes of that family. One of them is in memory at a time.
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
from megamm.convert.families.family import Family
from megamm.convert.io.origin import Origin
from megamm.convert.io.safetensors_files import Weights
from megamm.model.vocabulary import Vocabulary

_EXPERTS = ".experts.experts."
_RANK = re.compile(r"__(\d+)_\d+\.distcp")
_ROUTED = re.compile(r"\.mlp\.(router|experts|shared_experts)\.")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


class TensorSource(Protocol):
    """Names with shapes and dtypes, and their values; each call to `read` may access the files again."""

    where: Path
    described: dict[str, Described]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole tensors on the CPU; reading those of one layer together is fastest. Raises UserError if damaged."""


@dataclass(frozen=True)
class RankBox:
    """The part of a tensor that a rank's file holds: the box [offset, offset + size)."""

    rank: int
    offset: Shape
    size: Shape

    def __str__(self) -> str:
        return f"[{', '.join(f'{a}:{a + n}' for a, n in zip(self.offset, self.size, strict=True))}]"


class NativeTensors:
    """The weights of a verified checkpoint, one by one, without the optimizer state."""

    def __init__(self, step: Path) -> None:
        """Open it. Raises UserError if the index is not safe to read."""
        self.where, self.state = step, checkpoint.read_state(step)
        self.stored = {k: v for k, v in sorted(index.read(step / "tensors").items()) if not k.startswith("optimizer.")}
        self.slices: dict[str, tuple[str, Shape]] = {}
        """Name -> the stored tensor, and the index along its stacked axes."""
        self.described: dict[str, Described] = {}
        layers = int(self.state.config["model"]["num_layers"])
        for key, stored in self.stored.items():
            kind = str(stored.dtype).removeprefix("torch.")
            for at in _stacked_indices(key, stored.shape):
                name = _name(key, at, _first_layer(key, stored.shape, layers))
                self.slices[name] = key, at
                self.described[name] = Described(stored.shape[len(at) :], kind)
        self.described = dict(sorted(self.described.items(), key=lambda item: natural(item[0])))
        self.names = {at: name for name, at in self.slices.items()}

    @property
    def config(self) -> RunConfig:
        """The config of the run that wrote it."""
        return config_from_dict(self.state.config, where=self.where)

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, without the padding of the tables."""
        return Vocabulary.from_json(self.state.vocabulary).size

    @property
    def table_rows(self) -> int:
        """Rows of the vocabulary's tables in an export: those of the folder that a model was imported from.

        A run has a vocabulary of its own, with control ids: its tables are padded for its layout only.
        """
        origin, vocabulary = Origin.from_json(self.state.origin), Vocabulary.from_json(self.state.vocabulary)
        if origin is None or vocabulary.has_control:
            return vocabulary.size
        return max(vocabulary.size, min(origin.rows, self.stored[mapping.EMBEDDING].shape[0]))

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        found = {name: torch.empty_like(meta(self.described[name]), device="cpu") for name in names}
        with closing(TensorReader(self.where / "tensors", self.stored)) as reader:
            for name, tensor in found.items():
                key, at = self.slices[name]
                rest = tensor.shape
                # One layer (and expert): a box of size 1 along the stacked axes, whole along the others.
                offset, size = at + (0,) * len(rest), (1,) * len(at) + tuple(rest)
                reader.read(TensorShard(key, self.stored[key].shape, offset, size, tensor))
        return found

    def owners(self, name: str) -> list[RankBox]:
        """The parts of a tensor, with the rank whose file holds each (-1: the file's name does not tell)."""
        key, at = self.slices[name]
        found = []
        for entry in self.stored[key].shards:
            # `at` has the stacked axes only, which come first: the box must contain this layer (and expert).
            if all(low <= i < low + n for i, low, n in zip(at, entry.offset, entry.size, strict=False)):
                match = _RANK.fullmatch(entry.file)
                rank = int(match[1]) if match else -1
                found.append(RankBox(rank, entry.offset[len(at) :], entry.size[len(at) :]))
        return sorted(found, key=lambda box: (box.rank, box.offset))


class TransformersTensors:
    """A checkpoint's weights as the family's tensors: with the names and shapes that an export has."""

    def __init__(self, native: NativeTensors, family: Family, m: ModelConfig) -> None:
        """Map the tensors. Raises UserError if the checkpoint lacks a tensor of its model, or its shape is wrong."""
        self.native, self.where, self.m = native, native.where, m
        self.parts: dict[str, tuple[str, mapping.TensorGroup, int]] = {}
        """Their name -> our tensor, its group, and which part of it."""
        self.described: dict[str, Described] = {}
        try:
            for group in mapping.groups(family.rules, m):
                ours = native.names[group.ours, group.index]
                for number, part in enumerate(self._cut(meta(native.described[ours]), group)):
                    self.parts[group.theirs[number]] = ours, group, number
                    self.described[group.theirs[number]] = described_of(part)
        except (KeyError, RuntimeError) as error:
            what = f"the tensors do not match the checkpoint's config: {error}"
            raise UserError(what, where=self.where, remedy="use another checkpoint") from None

    @cached_property
    def tables(self) -> set[str]:
        """Names of the tensors whose first axis is the vocabulary; here without the padding of a parallel layout."""
        return {name for name, (ours, _, _) in self.parts.items() if ours in (mapping.EMBEDDING, mapping.HEAD)}

    def _cut(self, ours: torch.Tensor, group: mapping.TensorGroup) -> Sequence[torch.Tensor]:
        if group.rule is not None:
            return group.rule.cut(ours, self.m)
        return [ours[: self.native.table_rows] if group.ours in (mapping.EMBEDDING, mapping.HEAD) else ours]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        wanted = {name: self.parts[name] for name in names}
        # A dictionary, so that query, key and value read their common tensor once.
        read = self.native.read({ours: None for ours, _, _ in wanted.values()})
        return {
            name: self._cut(read[ours], group)[number].contiguous() for name, (ours, group, number) in wanted.items()
        }


class FileTensors:
    """The tensors of a transformers folder, or of a safetensors file."""

    def __init__(self, path: Path, *, used_only: bool = False) -> None:
        """Open it. Raises UserError if there are no weights, or they are damaged.

        used_only: without the tensors that transformers does not use.
        """
        self.where = path
        self.weights = Weights(path, used_only=used_only)
        self.described = {
            name: Described(found.shape, str(found.dtype).removeprefix("torch."))
            for name, found in sorted(self.weights.infos.items(), key=lambda item: natural(item[0]))
        }

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        with self.weights:  # closes its files between reads
            return {name: self.weights[name] for name in names}


def open_tensors(path: Path, *, by_family: bool = False) -> NativeTensors | TransformersTensors | FileTensors:
    """Open a run (its newest valid checkpoint), a checkpoint, a transformers folder, or a safetensors file.

    by_family: a checkpoint under the names of transformers. Raises UserError if it is none of these or, by_family, if
    no family has the model.
    """
    if path.is_file() or (path.is_dir() and not is_native(path)):
        return FileTensors(path)
    native = NativeTensors(find_checkpoint(path))
    if not by_family:
        return native
    model = native.config.model
    return TransformersTensors(native, family_for(model, native.state.origin), model)


def is_native(path: Path) -> bool:
    """Whether it is the folder of a run or a checkpoint."""
    return (path / checkpoint.STATE).is_file() or (path / "checkpoints").is_dir()


def not_finite(tensors: TensorSource) -> dict[str, int]:
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


def _stacked_indices(key: str, shape: Shape) -> Iterator[Shape]:
    """All indices along the stacked axes of a stored tensor: layer, or layer and expert."""
    stacked = 0 if not key.startswith(mapping.LAYERS) else 2 if _EXPERTS in key else 1
    yield from itertools.product(*map(range, shape[:stacked]))


def _first_layer(key: str, shape: Shape, layers: int) -> int:
    """The first layer of a stack: with dense layers first, tensors of experts and routers exist only after them."""
    return layers - shape[0] if key.startswith(mapping.LAYERS) and _ROUTED.search(key) else 0


def _name(key: str, at: Shape, first: int) -> str:
    """The name of a stored tensor with the numbers of layer and expert inserted; first: the stack's first layer."""
    if not at:
        return key
    name = key.replace(mapping.LAYERS, f"{mapping.LAYERS}{first + at[0]}.", 1)
    return name.replace(_EXPERTS, f".experts.{at[1]}.", 1) if len(at) > 1 else name
