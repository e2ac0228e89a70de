"""Where every element of this rank's tensors lies in the whole model's, for comparison between layouts.

Megatron's sharded description (the one that checkpoints are written by) is asked with element numbers instead of
values, so that any tensor of a parameter's shape - value, gradient - can be cut or set by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import nn

from megamm.mcore.groups import Groups


def coordinates(groups: Groups) -> tuple[dict[str, int], dict[str, int]]:
    """This rank's place along every axis of the grid, and the axes' sizes."""
    c = groups.collection
    axes = {"tensor": c.tp, "context": c.cp, "data": c.dp, "pipeline": c.pp, "expert": c.ep, "expert tensor": c.expt_tp}
    axes["expert data"] = c.expt_dp
    return {name: g.rank() for name, g in axes.items()}, {name: g.size() for name, g in axes.items()}


@dataclass(frozen=True)
class Piece:
    """A block of the whole tensor `key`, whose shape is `shape` (without vocabulary padding it may be shorter).

    The block starts at `offset` and has `size`; leading axes that only the whole tensor has (layer, expert) count as 1
    in it, `stacked` says how many. index: its elements' places in the flattened local tensor. Replicas of a block are
    in other ranks' pieces: exactly one of them all is main.
    """

    key: str
    tensor: torch.Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    stacked: int
    index: torch.Tensor
    is_main: bool

    def cut(self, local: torch.Tensor) -> torch.Tensor:
        """The block `[*size]` out of a tensor of the local parameter's shape."""
        return local.detach().flatten()[self.index].reshape(self.size)

    @torch.no_grad()
    def put(self, block: torch.Tensor) -> None:
        """Set the local tensor's elements; a block that ends before the vocabulary's padding leaves the rest."""
        index = self.index.reshape(self.size)[tuple(slice(n) for n in block.shape)]
        self.tensor.data.view(-1)[index.flatten()] = block.flatten().to(self.tensor.dtype)


def pieces(chunks: Sequence[nn.Module], groups: Groups) -> list[Piece]:
    """Of all parameters and stored buffers of this rank's pipeline chunks (wrapped for data parallel)."""
    metadata = {"dp_cp_group": groups.collection.dp_cp}
    found = []
    for chunk in chunks:
        module: Any = chunk.module
        parameters = {id(p) for p in module.parameters()}
        seen = set()
        for entry in module.sharded_state_dict(metadata=metadata).values():
            if isinstance(entry, ShardedTensor | ShardedTensorFactory) and isinstance(entry.data, torch.Tensor):
                seen.add(id(entry.data))
                found += _of_entry(entry)
        assert parameters <= seen, "a parameter would go uncompared"
    return found


def _of_entry(entry: ShardedTensor | ShardedTensorFactory) -> list[Piece]:
    tensor: torch.Tensor = entry.data
    numbers = torch.arange(tensor.numel()).reshape(tensor.shape)
    if isinstance(entry, ShardedTensorFactory):
        built = replace(entry, data=numbers).build()
        parts = list(built.values()) if isinstance(built, dict) else list(built)
    else:
        parts = [replace(entry, data=numbers, dtype=numbers.dtype)]
    return [
        Piece(
            key=part.key,
            tensor=tensor,
            shape=tuple(part.global_shape),
            offset=tuple(part.global_offset),
            size=(1,) * part.prepend_axis_num + tuple(part.local_shape),
            stacked=part.prepend_axis_num,
            index=part.data.flatten(),
            is_main=not any(part.replica_id if isinstance(part.replica_id, tuple) else [part.replica_id]),
        )
        for part in parts
    ]
