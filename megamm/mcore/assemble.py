"""Where every element of this rank's tensors lies in the whole model's, for comparison between layouts.

By the description that checkpoints are written by (parts.py), any tensor of a parameter's shape - value, gradient - can
be cut or set.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel

from megamm.mcore import parts
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


def pieces(chunks: Sequence[DistributedDataParallel], groups: Groups) -> list[Piece]:
    """Of all parameters and stored buffers of this rank's pipeline chunks (wrapped for data parallel)."""
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
        for part in parts.of(chunk.module, groups)
    ]
