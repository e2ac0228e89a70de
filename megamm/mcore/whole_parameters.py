"""Saves and loads the state of engines that do not use Megatron's shards: each whole parameter is saved by one rank.

The folder is the same as that of `store` (same names, shapes and formats). `Names` is created while the model is still
whole: it keeps Megatron's description of every tensor, without data.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megamm.checkpoint.tensor_shards import MAIN, MOMENTS, STATE, Block
from megamm.mcore import shard_specs
from megamm.mcore.backbone import Backbone
from megamm.mcore.process_groups import ProcessGroups
from megamm.mcore.shard_specs import ShardSpec

MODEL = "model"
"""Kind of a parameter's value in the run's precision; MAIN and MOMENTS are float32."""

Whole = dict[str, dict[str, torch.Tensor]]
"""Parameter or buffer name -> kind (MODEL, MAIN, one of MOMENTS) -> whole tensor."""


@dataclass(frozen=True)
class Names:
    """Stored parts of a model's tensors: parameters and persistent buffers by their name in the module."""

    parts: Mapping[str, list[ShardSpec]]
    shapes: Mapping[str, torch.Size]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, model: Backbone, groups: ProcessGroups) -> "Names":
        """Create the names for a model that is whole on this rank."""
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        name_of = {id(tensor): name for name, tensor in tensors.items()}
        found: dict[str, list[ShardSpec]] = {}
        for part in shard_specs.of(model, groups):
            without_data = replace(part, tensor=torch.empty_like(part.tensor, device="meta"))
            found.setdefault(name_of[id(part.tensor)], []).append(without_data)
        return cls(found, {n: tensors[n].shape for n in found}, {n: tensors[n].dtype for n in found})

    def owners(self, ranks: int) -> dict[str, int]:
        """Return the rank that keeps and writes each tensor, in shares of about equal size; the same on every rank."""
        load, owner = [0] * ranks, {}
        for name in sorted(self.parts, key=lambda n: (-self.shapes[n].numel(), n)):
            owner[name] = load.index(min(load))
            load[owner[name]] += self.shapes[name].numel()
        return owner

    def blocks(self, tensors: Whole) -> list[Block]:
        """Return the blocks of whole tensors."""
        return [
            part.block(data, "" if kind == MODEL else f"{STATE}{kind}.")
            for name, kinds in tensors.items()
            for kind, data in kinds.items()
            for part in self.parts[name]
        ]


def load(
    read: Callable[[Sequence[Block]], None], names: Names, owned: Iterable[str], kinds: Mapping[str, Iterable[str]]
) -> Whole:
    """Load the tensors that this rank owns, on the CPU: the `kinds` of each name; `read` fills their blocks."""
    empty = {
        name: {
            kind: torch.empty(names.shapes[name], dtype=names.dtypes[name] if kind == MODEL else torch.float32)
            for kind in kinds[name]
        }
        for name in owned
    }
    read(names.blocks(empty))
    return empty


__all__ = ["MAIN", "MODEL", "MOMENTS", "Names", "Whole", "load"]
