"""Rules that make a stored tensor from transformers' tensors; each has an inverse, and both are exact.

Stored tensors stack the layers that have them on a first axis L, and experts on the next. For each layer (and expert)
a rule defines how our tensor is split into theirs and joined again:
    same  one tensor, unchanged
    rows  several, stacked by rows: gate, then up `[2F, H]`
    qkv   q, k and v by query group: a group's queries, its key, its value `[G * (N/G + 2) * D, ...]`
G query groups, N heads, D head size, F feed-forward size; other letters as in common/sample.py.
Models differ only in their family's table of such entries (tables.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megamm.config import ModelConfig

Tensors = dict[str, torch.Tensor]
LAYERS, EMBEDDING, HEAD = "decoder.layers.", "embedding.word_embeddings.weight", "output_layer.weight"


def all_layers(m: ModelConfig) -> range:
    return range(m.num_layers)


def dense_layers(m: ModelConfig) -> range:
    """Layers before the ones with experts."""
    return range(m.moe.dense_layers if m.moe.num_experts else m.num_layers)


def routed_layers(m: ModelConfig) -> range:
    return range(dense_layers(m).stop, m.num_layers)


@dataclass(frozen=True)
class Entry:
    """One stored tensor of a layer, by its name after LAYERS, and its sources, by their names in a layer.

    "{e}" in their names stands for an expert's number: then our tensor stacks the experts. layers: the layers of a
    model that have it; if there are none, nothing is stored.
    """

    ours: str
    theirs: tuple[str, ...]
    rule: Literal["same", "rows", "qkv"] = "same"
    layers: Callable[[ModelConfig], range] = all_layers

    @property
    def is_of_experts(self) -> bool:
        return "{e}" in self.theirs[0]

    def names(self, layer: int, expert: int | None = None) -> list[str]:
        """Their full names."""
        return [f"model.layers.{layer}.{name.format(e=expert)}" for name in self.theirs]

    def cut(self, ours: torch.Tensor, m: ModelConfig) -> Sequence[torch.Tensor]:
        """Split our tensor, of one layer and expert, into theirs in the order of their names."""
        if self.rule == "same":
            return [ours]
        if self.rule == "rows":
            return ours.chunk(len(self.theirs))
        groups = ours.view(m.num_query_groups, -1, m.head_dim, *ours.shape[1:])
        parts = groups.split([groups.shape[1] - 2, 1, 1], dim=1)
        return [part.reshape(-1, *ours.shape[1:]) for part in parts]

    def join(self, theirs: Sequence[torch.Tensor], m: ModelConfig) -> torch.Tensor:
        """The inverse of `cut`."""
        if self.rule == "same":
            return theirs[0]
        if self.rule == "rows":
            return torch.cat(list(theirs))
        parts = [part.view(m.num_query_groups, -1, m.head_dim, *part.shape[1:]) for part in theirs]
        return torch.cat(parts, dim=1).reshape(-1, *theirs[0].shape[1:])


def unstacked(m: ModelConfig) -> dict[str, str]:
    """Stored tensors without an axis of layers, with their names in transformers."""
    tables = {EMBEDDING: "model.embed_tokens.weight", "decoder.final_layernorm.weight": "model.norm.weight"}
    return tables if m.tie_embeddings else tables | {HEAD: "lm_head.weight"}


def to_transformers(
    entries: Sequence[Entry], stored: Mapping[str, torch.Tensor], m: ModelConfig, vocabulary_size: int
) -> Tensors:
    """Convert stored tensors to a state dict of transformers, without run-time padding of the vocabulary."""
    result = {theirs: stored[ours] for ours, theirs in unstacked(m).items()}
    for theirs in ("model.embed_tokens.weight", "lm_head.weight"):
        if theirs in result:
            result[theirs] = result[theirs][:vocabulary_size]
    for layer in range(m.num_layers):
        for entry in (entry for entry in entries if layer in entry.layers(m)):
            ours = stored[LAYERS + entry.ours][entry.layers(m).index(layer)]
            for expert, tensor in _by_expert(entry, ours):
                result |= dict(zip(entry.names(layer, expert), entry.cut(tensor, m), strict=True))
    return {name: tensor.contiguous() for name, tensor in result.items()}


@dataclass(frozen=True)
class Group:
    """One unit of splitting or joining: a stored tensor at `index` of its leading axes, and its sources.

    entry None: the whole of a tensor without an axis of layers, unchanged.
    """

    ours: str
    index: tuple[int, ...]
    theirs: tuple[str, ...]
    entry: Entry | None


def groups(entries: Sequence[Entry], m: ModelConfig) -> Iterator[Group]:
    """All groups of the model, in the order of its layers."""
    alone = [Group(ours, (), (theirs,), None) for ours, theirs in unstacked(m).items()]
    yield from (group for group in alone if group.ours == EMBEDDING)
    for layer in range(m.num_layers):
        for entry in (entry for entry in entries if layer in entry.layers(m)):
            for expert in range(m.moe.num_experts) if entry.is_of_experts else [None]:
                place = entry.layers(m).index(layer)
                index = (place,) if expert is None else (place, expert)
                yield Group(LAYERS + entry.ours, index, tuple(entry.names(layer, expert)), entry)
    yield from (group for group in alone if group.ours != EMBEDDING)


def names(entries: Sequence[Entry], m: ModelConfig) -> Iterator[str]:
    """Names of all tensors that a transformers model has on disk."""
    for group in groups(entries, m):
        yield from group.theirs


def _by_expert(entry: Entry, ours: torch.Tensor) -> Iterator[tuple[int | None, torch.Tensor]]:
    yield from enumerate(ours) if entry.is_of_experts else [(None, ours)]


def from_transformers(entries: Sequence[Entry], theirs: Mapping[str, torch.Tensor], m: ModelConfig) -> Tensors:
    """The inverse of `to_transformers`. Raises KeyError for a missing tensor."""
    stored = {ours: theirs[name] for ours, name in unstacked(m).items()}
    for entry in entries:
        if layers := [join_layer(entry, theirs, m, layer) for layer in entry.layers(m)]:
            stored[LAYERS + entry.ours] = torch.stack(layers)
    return stored


def join_layer(entry: Entry, theirs: Mapping[str, torch.Tensor], m: ModelConfig, layer: int) -> torch.Tensor:
    """An entry's stored tensor of one layer, its experts stacked. Raises KeyError for a missing tensor."""

    def one(expert: int | None) -> torch.Tensor:
        return entry.join([theirs[name] for name in entry.names(layer, expert)], m)

    return torch.stack([one(e) for e in range(m.moe.num_experts)]) if entry.is_of_experts else one(None)
