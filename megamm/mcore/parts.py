"""Where this rank's tensors lie in the whole model's: the one walk over Megatron's sharded description.

Checkpoints (store.py, whole_store.py), comparison between layouts (assemble.py) and the dry run (paper.py) all go by
it. Megatron names a whole tensor (`key`), its shape, and the boxes of it that a local tensor holds; most are one box,
a SwiGLU's two halves are two. Megatron stacks layers on a first axis unless they are of two kinds; here they always
are, over those layers that have the tensor.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import nn

from megamm.checkpoint.blocks import Block, flat_boxes
from megamm.mcore.groups import Groups


@dataclass(frozen=True, eq=False)
class Part:
    """Elements [start, stop) of the flattened local `tensor`: the box of `size` at `offset` of the whole tensor.

    shape: of the whole (without vocabulary padding it may be shorter, `grows`). Leading axes that only the whole has
    (layer, expert) count as 1 in `size`; `stacked` says how many. replica: which copy of the box this is, by pipeline
    stage, tensor rank and data rank; one of them all is 0 in all three.
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

    def block(self, data: torch.Tensor, prefix: str = "") -> Block:
        """The whole part, out of a tensor of the local one's shape."""
        flat = data.detach().view(-1)[self.start : self.stop]
        return Block(prefix + self.key, self.shape, self.offset, self.size, flat.view(self.size), self.grows)

    def blocks(self, flat: torch.Tensor, first: int, prefix: str = "") -> list[Block]:
        """What elements [first, first + len(flat)) of the flattened tensor, the optimizer's, have of this part."""
        low, high = max(first, self.start), min(first + len(flat), self.stop)
        found = []
        for offset, size, place in flat_boxes(self.size, low - self.start, high - self.start):
            at = self.start - first + place
            data = flat.detach()[at : at + torch.Size(size).numel()].view(size)
            there = tuple(a + b for a, b in zip(self.offset, offset, strict=True))
            found.append(Block(prefix + self.key, self.shape, there, size, data, self.grows, steady=True))
        return found


def of(module: nn.Module, groups: Groups) -> list[Part]:
    """Of all parameters and stored buffers of a model or pipeline chunk (not wrapped for data parallel)."""
    described: Any = module
    entries = described.sharded_state_dict(metadata={"dp_cp_group": groups.collection.dp_cp}).values()
    freq = described.config.moe_layer_freq
    tensors = {_storage(t): t for t in (*module.buffers(), *module.parameters())}
    found = [
        part
        # Layers' extra state is left out: always empty here, and the one thing that would be stored as a pickle.
        for entry in entries
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
        for part in _of_entry(entry, tensors[_storage(entry.data)], freq if isinstance(freq, list) else [])
    ]
    missing = {id(p) for p in module.parameters()} - {id(part.tensor) for part in found}
    assert not missing, "Megatron stores not every parameter"
    return found


def _storage(tensor: Any) -> tuple[int, int, torch.Size]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape


def _of_entry(
    entry: ShardedTensor | ShardedTensorFactory, tensor: torch.Tensor, is_routed: Sequence[int]
) -> list[Part]:
    boxes: Sequence[ShardedTensor] = (
        list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]
    )
    parts = []
    for box in boxes:
        data: Any = box.data
        assert data.is_contiguous() and data.untyped_storage()._cdata == tensor.untyped_storage()._cdata, box.key
        start = data.storage_offset() - tensor.storage_offset()
        replica = box.replica_id if isinstance(box.replica_id, tuple) else (0, 0, box.replica_id)
        assert len(replica) == 3, f"{box.key}: {replica} is not (stage, tensor, data)"
        key, leading = _stacked(box.key, is_routed)
        parts.append(
            Part(
                key=key,
                tensor=tensor,
                start=start,
                stop=start + data.numel(),
                shape=(*(count for _, count in leading), *box.global_shape),
                offset=(*(place for place, _ in leading), *box.global_offset),
                size=(1,) * (len(leading) + box.prepend_axis_num) + tuple(box.local_shape),
                stacked=len(leading) + box.prepend_axis_num,
                replica=replica,
                grows=box.allow_shape_mismatch,
            )
        )
    return parts


def _stacked(key: str, is_routed: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """A tensor's name without the number of its layer, and (place, number) among the layers that have such a tensor.

    is_routed: of every layer whether it has experts, where some have not and Megatron thus numbers the names.
    """
    numbered = re.fullmatch(r"(decoder\.layers\.)(\d+)\.(.+)", key)
    if not is_routed or numbered is None:
        return key, []
    prefix, layer, name = numbered[1], int(numbered[2]), numbered[3]
    # The norm before a dense MLP and that before a router are one tensor, which Megatron may name as the former's.
    is_of_all = not name.startswith("mlp.") or name.startswith("mlp.linear_fc1.layer_norm_")
    having = [i for i, kind in enumerate(is_routed) if is_of_all or kind == is_routed[layer]]
    return prefix + name, [(having.index(layer), len(having))]
