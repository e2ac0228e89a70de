"""Positions of this rank's tensors in the whole model's tensors, from Megatron's sharded state dict.

This is the only description of where an element is stored. Checkpoints (store.py), comparison between layouts
(parity/rank.py) and the dry run (fake_world.py) all use it. Megatron gives the name of the whole tensor (`key`), its
shape, and the boxes of it that a local tensor holds: usually one, two for the halves of a SwiGLU. Megatron stacks
layers on a first axis unless there are two kinds of layers; here they are always stacked, over the layers that have
the tensor.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import nn

from megamm.checkpoint.tensor_shards import TensorShard, flat_boxes
from megamm.mcore.process_groups import ProcessGroups


@dataclass(frozen=True, eq=False)
class ShardSpec:
    """Elements [start, stop) of the flattened local `tensor`: the box of `size` at `offset` of the whole tensor.

    shape: of the whole tensor (without vocabulary padding it may be shorter, `grows`). `size` is 1 along leading axes
    that only the whole tensor has (layer, expert); `stacked` is their number. replica: index of this copy of the box by
    pipeline stage, tensor rank and data rank; exactly one copy has 0 in all three.
    """

    key: str
    tensor: torch.Tensor
    start: int
    stop: int
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    stacked: int
    replica: tuple[int, int, int]
    grows: bool

    @property
    def is_main(self) -> bool:
        return not any(self.replica)

    def block(self, data: torch.Tensor, prefix: str = "") -> TensorShard:
        """Return the whole spec as a block, from a tensor with the local tensor's shape."""
        flat = data.detach().view(-1)[self.start : self.stop]
        return TensorShard(prefix + self.key, self.shape, self.offset, self.size, flat.view(self.size), self.grows)

    def blocks(self, flat: torch.Tensor, first: int, prefix: str = "") -> list[TensorShard]:
        """Return the blocks of this spec in the optimizer's elements [first, first + len(flat)) of the flat tensor."""
        low, high = max(first, self.start), min(first + len(flat), self.stop)
        found = []
        for offset, size, before in flat_boxes(self.size, low - self.start, high - self.start):
            at = self.start - first + before
            data = flat.detach()[at : at + torch.Size(size).numel()].view(size)
            there = tuple(a + b for a, b in zip(self.offset, offset, strict=True))
            found.append(TensorShard(prefix + self.key, self.shape, there, size, data, self.grows, steady=True))
        return found


def of(module: nn.Module, groups: ProcessGroups) -> list[ShardSpec]:
    """Return the specs of all parameters and stored buffers of a model or pipeline chunk (not wrapped for DP)."""
    described: Any = module
    entries = described.sharded_state_dict(metadata={"dp_cp_group": groups.collection.dp_cp}).values()
    freq = described.config.moe_layer_freq
    tensors = {_storage(t): t for t in (*module.buffers(), *module.parameters())}
    found = [
        spec
        # Extra state of layers is skipped: it is always empty here, and would be the only data stored as a pickle.
        for entry in entries
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
        for spec in _of_entry(entry, tensors[_storage(entry.data)], freq if isinstance(freq, list) else [])
    ]
    missing = {id(p) for p in module.parameters()} - {id(spec.tensor) for spec in found}
    assert not missing, "Megatron does not store every parameter"
    return found


def _storage(tensor: Any) -> tuple[int, int, torch.Size]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape


def _of_entry(
    entry: ShardedTensor | ShardedTensorFactory, tensor: torch.Tensor, is_routed: Sequence[int]
) -> list[ShardSpec]:
    # A factory describes a tensor that is stored in several boxes, as the gate and up halves of a SwiGLU.
    boxes: Sequence[ShardedTensor] = (
        list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]
    )
    specs = []
    for box in boxes:
        data: Any = box.data
        assert data.is_contiguous() and data.untyped_storage()._cdata == tensor.untyped_storage()._cdata, box.key
        start = data.storage_offset() - tensor.storage_offset()
        # A single number is the index among data-parallel copies.
        replica = box.replica_id if isinstance(box.replica_id, tuple) else (0, 0, box.replica_id)
        assert len(replica) == 3, f"{box.key}: {replica} is not (stage, tensor, data)"
        key, leading = _stacked(box.key, is_routed)
        specs.append(
            ShardSpec(
                key=key,
                tensor=tensor,
                start=start,
                stop=start + data.numel(),
                shape=(*(count for _, count in leading), *box.global_shape),
                offset=(*(index for index, _ in leading), *box.global_offset),
                size=(1,) * (len(leading) + box.prepend_axis_num) + tuple(box.local_shape),
                stacked=len(leading) + box.prepend_axis_num,
                replica=replica,
                grows=box.allow_shape_mismatch,
            )
        )
    return specs


def _stacked(key: str, is_routed: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """Return a tensor's name without its layer number, and (index, count) among the layers that have such a tensor.

    is_routed: for every layer whether it has experts; empty if all layers are of one kind and names have no number.
    """
    numbered = re.fullmatch(r"(decoder\.layers\.)(\d+)\.(.+)", key)
    if not is_routed or numbered is None:
        return key, []
    prefix, layer, name = numbered[1], int(numbered[2]), numbered[3]
    # The norms before a dense MLP and before a router are one tensor, which Megatron may name after the dense MLP.
    is_of_all = not name.startswith("mlp.") or name.startswith("mlp.linear_fc1.layer_norm_")
    having = [i for i, kind in enumerate(is_routed) if is_of_all or kind == is_routed[layer]]
    return prefix + name, [(having.index(layer), len(having))]
