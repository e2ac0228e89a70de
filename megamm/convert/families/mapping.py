"""The tensor names and layouts of a family: rules that map stored tensors to transformers' and back, exactly.

Stored tensors stack the layers that have them on a first axis L, and experts on the next. For each layer (and expert)
a TensorRule defines how our tensor is split into theirs and joined again, by its kind:
    same  one tensor, unchanged
    rows  several, stacked by rows: gate, then up `[2F, H]`
    qkv   q, k and v by query group: a group's queries, its key, its value `[G * (N/G + 2) * D, ...]`
    fused the same, where one tensor of theirs has all rows of q, then of k, then of v
G query groups, N heads, D head size, F feed-forward size; other letters as in common/sample.py.
Models differ only in their family's table of such rules (tables.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megamm.config import ModelConfig

Tensors = dict[str, torch.Tensor]
LAYERS, EMBEDDING, HEAD = "decoder.layers.", "embedding.word_embeddings.weight", "output_layer.weight"
PREDICTION = "mtp."
"""Prefix of the stored tensors of multi-token prediction, which no family has."""
HEAD_THERE = "lm_head.weight"
"""Their name of the output layer's weight."""


def all_layers(m: ModelConfig) -> range:
    """Every layer of the model."""
    return range(m.num_layers)


def dense_layers(m: ModelConfig) -> range:
    """Layers before the ones with experts."""
    return range(m.moe.dense_layers if m.moe.num_experts else m.num_layers)


def routed_layers(m: ModelConfig) -> range:
    """Layers with experts."""
    return range(dense_layers(m).stop, m.num_layers)


@dataclass(frozen=True)
class TensorRule:
    """One stored tensor of a layer, by its name after LAYERS, and the tensors it is made of, by their names in a layer.

    "{e}" in their names stands for an expert's number: then our tensor stacks the experts. layers: the layers of a
    model that have it; if there are none, nothing is stored.
    """

    ours: str
    theirs: tuple[str, ...]
    kind: Literal["same", "rows", "qkv", "fused"] = "same"
    layers: Callable[[ModelConfig], range] = all_layers

    @property
    def is_of_experts(self) -> bool:
        return "{e}" in self.theirs[0]

    def names(self, layer: int, expert: int | None = None) -> list[str]:
        """Their full names."""
        return [f"model.layers.{layer}.{name.format(e=expert)}" for name in self.theirs]

    def cut(self, ours: torch.Tensor, m: ModelConfig) -> Sequence[torch.Tensor]:
        """Split our tensor, of one layer and expert, into theirs in the order of their names."""
        if self.kind == "same":
            return [ours]
        if self.kind == "rows":
            return ours.chunk(len(self.theirs))
        # Megatron-core stores q, k and v of a query group together, so that tensor parallel cuts between groups.
        groups = ours.view(m.num_query_groups, -1, m.head_dim, *ours.shape[1:])
        # [G, N/G + 2, D, ...]: the queries of a group, then its key and its value.
        parts = groups.split([groups.shape[1] - 2, 1, 1], dim=1)
        separate = [part.reshape(-1, *ours.shape[1:]) for part in parts]
        return [torch.cat(separate)] if self.kind == "fused" else separate

    def join(self, theirs: Sequence[torch.Tensor], m: ModelConfig) -> torch.Tensor:
        """The inverse of `cut`."""
        if self.kind == "same":
            return theirs[0]
        if self.kind == "rows":
            return torch.cat(list(theirs))
        if self.kind == "fused":
            theirs = theirs[0].split([n * m.head_dim for n in (m.num_attention_heads, *[m.num_query_groups] * 2)])
        parts = [part.view(m.num_query_groups, -1, m.head_dim, *part.shape[1:]) for part in theirs]
        return torch.cat(parts, dim=1).reshape(-1, *theirs[0].shape[1:])


def unstacked(m: ModelConfig) -> dict[str, str]:
    """Stored tensors without an axis of layers, with their names in transformers."""
    tables = {EMBEDDING: "model.embed_tokens.weight", "decoder.final_layernorm.weight": "model.norm.weight"}
    return tables if m.tie_embeddings else tables | {HEAD: HEAD_THERE}


@dataclass(frozen=True)
class TensorGroup:
    """One unit of splitting or joining: a stored tensor at `index` of its leading axes, and the tensors it is made of.

    rule None: the whole of a tensor without an axis of layers, unchanged.
    """

    ours: str
    index: tuple[int, ...]
    theirs: tuple[str, ...]
    rule: TensorRule | None


def groups(rules: Sequence[TensorRule], m: ModelConfig) -> Iterator[TensorGroup]:
    """All groups of the model, in the order of its layers."""
    alone = [TensorGroup(ours, (), (theirs,), None) for ours, theirs in unstacked(m).items()]
    yield from (group for group in alone if group.ours == EMBEDDING)
    for layer in range(m.num_layers):
        for rule in (rule for rule in rules if layer in rule.layers(m)):
            for expert in range(m.moe.num_experts) if rule.is_of_experts else [None]:
                row = rule.layers(m).index(layer)  # in the stack of the layers that have this tensor
                index = (row,) if expert is None else (row, expert)
                yield TensorGroup(LAYERS + rule.ours, index, tuple(rule.names(layer, expert)), rule)
    yield from (group for group in alone if group.ours != EMBEDDING)


def names(rules: Sequence[TensorRule], m: ModelConfig) -> Iterator[str]:
    """Names of all tensors that a transformers model has on disk."""
    for group in groups(rules, m):
        yield from group.theirs


def from_transformers(rules: Sequence[TensorRule], theirs: Mapping[str, torch.Tensor], m: ModelConfig) -> Tensors:
    """Make the stored tensors of a transformers state dict. Raises KeyError for a missing tensor."""
    stored = {ours: theirs[name] for ours, name in unstacked(m).items()}
    for rule in rules:
        if layers := [join_layer(rule, theirs, m, layer) for layer in rule.layers(m)]:
            stored[LAYERS + rule.ours] = torch.stack(layers)
    return stored


def join_layer(rule: TensorRule, theirs: Mapping[str, torch.Tensor], m: ModelConfig, layer: int) -> torch.Tensor:
    """A rule's stored tensor of one layer, its experts stacked. Raises KeyError for a missing tensor."""

    def one(expert: int | None) -> torch.Tensor:
        return rule.join([theirs[name] for name in rule.names(layer, expert)], m)

    return torch.stack([one(e) for e in range(m.moe.num_experts)]) if rule.is_of_experts else one(None)
