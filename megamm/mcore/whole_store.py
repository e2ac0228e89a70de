"""What a rank stores and reads where shards are not Megatron's: parameter by parameter, each whole on one rank.

The folder is the one of `store` (same names, shapes and formats). `Names` is made while the model still is whole: it
keeps what Megatron says of every tensor, no data.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megamm.checkpoint.blocks import MAIN, MOMENTS, STATE, Block
from megamm.mcore import parts
from megamm.mcore.backbone import Backbone
from megamm.mcore.groups import Groups
from megamm.mcore.parts import Part

MODEL = "model"
"""Kind of a parameter's value in the run's precision; MAIN and MOMENTS are float32."""

Whole = dict[str, dict[str, torch.Tensor]]
"""Parameter or buffer name -> kind (MODEL, MAIN, one of MOMENTS) -> whole tensor."""


@dataclass(frozen=True)
class Names:
    """Where the tensors of a model are stored: parameters and persistent buffers by their name in the module."""

    parts: Mapping[str, list[Part]]
    shapes: Mapping[str, torch.Size]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, model: Backbone, groups: Groups) -> "Names":
        """Of a model that is whole on this rank."""
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        name_of = {id(tensor): name for name, tensor in tensors.items()}
        found: dict[str, list[Part]] = {}
        for part in parts.of(model, groups):
            without_data = replace(part, tensor=torch.empty_like(part.tensor, device="meta"))
            found.setdefault(name_of[id(part.tensor)], []).append(without_data)
        return cls(found, {n: tensors[n].shape for n in found}, {n: tensors[n].dtype for n in found})

    def owners(self, ranks: int) -> dict[str, int]:
        """The rank that keeps and writes each tensor: shares of about the same size, the same on every rank."""
        load, owner = [0] * ranks, {}
        for name in sorted(self.parts, key=lambda n: (-self.shapes[n].numel(), n)):
            owner[name] = load.index(min(load))
            load[owner[name]] += self.shapes[name].numel()
        return owner

    def blocks(self, tensors: Whole) -> list[Block]:
        """Of whole tensors."""
        return [
            part.block(data, "" if kind == MODEL else f"{STATE}{kind}.")
            for name, kinds in tensors.items()
            for kind, data in kinds.items()
            for part in self.parts[name]
        ]


def load(
    read: Callable[[Sequence[Block]], None], names: Names, owned: Iterable[str], kinds: Mapping[str, Iterable[str]]
) -> Whole:
    """The tensors that this rank owns, on the CPU: of each name its `kinds`, which `read` sets block by block."""
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
