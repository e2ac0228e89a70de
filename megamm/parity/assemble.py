"""Maps every element of this rank's tensors to the whole model's tensors, for comparison between layouts.

It uses the same description as checkpoints (mcore/shard_specs.py), so any tensor with a parameter's shape (its value or
gradient) can be read or set.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel

from megamm.mcore import shard_specs
from megamm.mcore.process_groups import ProcessGroups


def coordinates(groups: ProcessGroups) -> tuple[dict[str, int], dict[str, int]]:
    """Return this rank's coordinate along every axis of the device mesh, and the sizes of the axes."""
    c = groups.collection
    axes = {"tensor": c.tp, "context": c.cp, "data": c.dp, "pipeline": c.pp, "expert": c.ep, "expert tensor": c.expt_tp}
    axes["expert data"] = c.expt_dp
    return {name: g.rank() for name, g in axes.items()}, {name: g.size() for name, g in axes.items()}


@dataclass(frozen=True)
class Piece:
    """A block of the whole tensor `key`, whose shape is `shape` (without vocabulary padding it may be shorter).

    The block starts at `offset` and has `size`. `size` is 1 along leading axes that only the whole tensor has (layer,
    expert); `stacked` is the number of these axes. index: indices of its elements in the flattened local tensor. Other
    ranks may have replicas of the block; exactly one replica is main.
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
        """Return the block `[*size]` of a tensor with the local parameter's shape."""
        return local.detach().flatten()[self.index].reshape(self.size)

    @torch.no_grad()
    def put(self, block: torch.Tensor) -> None:
        """Set the local tensor's elements; a block without the vocabulary's padding leaves the padding unchanged."""
        index = self.index.reshape(self.size)[tuple(slice(n) for n in block.shape)]
        self.tensor.data.view(-1)[index.flatten()] = block.flatten().to(self.tensor.dtype)


def pieces(chunks: Sequence[DistributedDataParallel], groups: ProcessGroups) -> list[Piece]:
    """Return the pieces of all parameters and stored buffers of this rank's pipeline chunks (wrapped for DP)."""
    return [
        Piece(
            key=part.key,
            tensor=part.tensor,
            shape=part.shape,
            offset=part.offset,
            size=part.size,
            stacked=part.stacked,
            index=torch.arange(part.start, part.stop),
            is_main=part.is_main,
        )
        for chunk in chunks
        for part in shard_specs.of(chunk.module, groups)
    ]
