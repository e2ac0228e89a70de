"""Model and optimizer tensors to and from a folder, parameter by parameter, each whole on one rank.

The folder is the one that `store` writes (same names, shapes and formats), for an engine whose shards are not
Megatron's. `Names` is made while the model still is whole: it keeps what Megatron says of every tensor, no data.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from megamm.mcore import store
from megamm.mcore.backbone import Backbone
from megamm.mcore.groups import Groups

MODEL, MAIN, MOMENTS = "model", "param", ("exp_avg", "exp_avg_sq")
"""What is kept of a parameter: its value in the run's precision and, float32, its main copy and Adam's moments."""

Whole = dict[str, dict[str, torch.Tensor]]
"""Parameter or buffer name -> kind (MODEL, MAIN, one of MOMENTS) -> whole tensor."""


@dataclass(frozen=True)
class Names:
    """Where the tensors of a model are stored: parameters and persistent buffers by their name in the module."""

    entries: Mapping[str, ShardedTensor | ShardedTensorFactory]
    shapes: Mapping[str, torch.Size]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, model: Backbone, groups: Groups) -> "Names":
        """Of a model that is whole on this rank."""
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        name_of = {id(tensor): name for name, tensor in tensors.items()}
        described = model.sharded_state_dict(metadata=store.metadata_of(groups)).values()
        entries = {name_of[id(e.data)]: e.without_data() for e in described if not isinstance(e, ShardedObject)}
        missing = {name for name, _ in model.named_parameters()} - entries.keys()
        assert not missing, f"Megatron stores no {sorted(missing)[0]}"
        return cls(entries, {n: tensors[n].shape for n in entries}, {n: tensors[n].dtype for n in entries})

    def owners(self, ranks: int) -> dict[str, int]:
        """The rank that keeps and writes each tensor: shares of about the same size, the same on every rank."""
        load, owner = [0] * ranks, {}
        for name in sorted(self.entries, key=lambda n: (-self.shapes[n].numel(), n)):
            owner[name] = load.index(min(load))
            load[owner[name]] += self.shapes[name].numel()
        return owner

    def _at(self, name: str, kind: str, data: torch.Tensor) -> ShardedTensor | ShardedTensorFactory:
        """Megatron's description of one stored tensor, with the data; this rank is the one that has it."""
        entry = self.entries[name]
        key = entry.key if kind == MODEL else f"optimizer.state.{kind}.{entry.key}"
        changes: dict[str, Any] = dict(key=key, data=data, replica_id=(0, 0, 0))
        if isinstance(entry, ShardedTensor):
            changes["dtype"] = data.dtype
        return replace(entry, **changes)

    def _state(self, tensors: Whole) -> dict[str, Any]:
        return {
            f"{name}/{kind}": self._at(name, kind, data)
            for name, kinds in tensors.items()
            for kind, data in kinds.items()
        }


def save(folder: Path, names: Names, owned: Whole) -> None:
    """Write the tensors that this rank owns into an existing empty folder. Every rank calls it."""
    store.write(names._state(owned), folder)


def load(folder: Path, names: Names, owned: Iterable[str], kinds: Mapping[str, Iterable[str]]) -> Whole:
    """Read the tensors that this rank owns, on the CPU: of each name its `kinds`. Every rank calls it.

    UserError for a folder with unsafe contents, or of another model.
    """
    store.check_index(folder)
    store.check_names(folder, {"model": dict(names.entries)})
    empty = {
        name: {
            kind: torch.empty(names.shapes[name], dtype=names.dtypes[name] if kind == MODEL else torch.float32)
            for kind in kinds[name]
        }
        for name in owned
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = dist_checkpointing.load(names._state(empty), str(folder))
    return {name: {kind: loaded[f"{name}/{kind}"] for kind in kinds[name]} for name in empty}
