"""Records what a simulated step does: device memory by kind, collectives, kernel launches, FLOPs.

Memory follows the lifetime of storages: each counts from the operation that creates it until its last tensor is gone,
rounded up to 512 bytes as torch's caching allocator does. Fragmentation and the allocator's cache are not in it.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROUND = 512
"""Bytes to which torch's caching allocator rounds an allocation."""

_c10d = torch.ops.c10d
_COALESCED = (
    _c10d.reduce_scatter_tensor_coalesced_.default,
    _c10d.allgather_into_tensor_coalesced_.default,
    _c10d.allreduce_coalesced_.default,
)
"""Collectives for which torch has no fake kernel."""
_ATTENTION = {"_varlen_attn": "attention", "_varlen_attn_backward": "attention backward"}
"""Operators of torch's varlen attention, with the name of their FLOPs."""
_PRODUCTS = {
    torch.ops.aten.mm: 2,
    torch.ops.aten.bmm: 2,
    torch.ops.aten.addmm: 3,
    torch.ops.aten.baddbmm: 3,
    torch.ops.aten._scaled_mm: 4,  # factors and scales
}
"""Matrix products, with the number of their tensors. Flex attention (mcore/fake_gpu.py) reports its FLOPs itself; those
of other operations are not counted: their time is that of memory, not of arithmetic."""
_GROUPED = (torch.ops.aten._grouped_mm, torch.ops.aten._scaled_grouped_mm)
"""The products of a rank's experts, for which torch has no formula."""
_NO_LAUNCH = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "lift_fresh"}
_NO_LAUNCH |= {"_unsafe_view", "_reshape_alias", "alias", "set_", "resize_", "record_stream", "_local_scalar_dense"}
_NO_LAUNCH |= {"device"}
"""Operations that are not views and launch no kernel; FakeTensors are asked for their device."""


@dataclass(frozen=True)
class Collective:
    """A communication of this rank over a group of `size` ranks.

    bytes: of the whole tensor, which each rank of the group has before or after it; with send, recv and all_to_all
    what this rank sends or receives.
    """

    operation: str
    group: str
    size: int
    bytes: int


_Moved = Callable[..., tuple[Any, Any]]
"""Arguments of an operation -> (tensors whose bytes count, process group)."""
_COLLECTIVES: dict[Any, tuple[str, _Moved]] = {
    _c10d.allreduce_.default: ("all_reduce", lambda tensors, group, *_: (tensors, group)),
    _c10d.allreduce_coalesced_.default: ("all_reduce", lambda tensors, group, *_: (tensors, group)),
    _c10d.broadcast_.default: ("broadcast", lambda tensors, group, *_: (tensors, group)),
    _c10d.allgather_.default: ("all_gather", lambda out, own, group, *_: (out, group)),
    _c10d._allgather_base_.default: ("all_gather", lambda out, own, group, *_: (out, group)),
    _c10d.allgather_into_tensor_coalesced_.default: ("all_gather", lambda out, own, group, *_: (out, group)),
    _c10d.reduce_scatter_.default: ("reduce_scatter", lambda out, parts, group, *_: (parts, group)),
    _c10d._reduce_scatter_base_.default: ("reduce_scatter", lambda out, parts, group, *_: (parts, group)),
    _c10d.reduce_scatter_tensor_coalesced_.default: ("reduce_scatter", lambda out, parts, group, *_: (parts, group)),
    _c10d.alltoall_base_.default: ("all_to_all", lambda out, own, group, *_: (own, group)),
    _c10d.alltoall_.default: ("all_to_all", lambda out, own, group, *_: (own, group)),
    _c10d.send.default: ("send", lambda tensors, group, *_: (tensors, group)),
    _c10d.recv_.default: ("recv", lambda tensors, group, *_: (tensors, group)),
    _c10d.barrier.default: ("barrier", lambda tensor, group, *_: (tensor, group)),
}


def _attention_flops(operator: str, arguments: Any) -> float:
    """Return the FLOPs of varlen attention; no sequence is shorter than the longest, as each row is one document.

    A product of all pairs of a query and a key has 2 FLOPs for each pair, head and channel. Forward has two; backward
    computes the scores again, and four more.
    """
    is_backward = operator == "_varlen_attn_backward"
    query, most_queries, most_keys = (arguments[i] for i in ((1, 8, 9) if is_backward else (0, 5, 6)))
    left, _ = arguments[13 if is_backward else 9]
    tokens, heads, channels = query.shape
    window = min(left + 1 if left >= 0 else most_keys, most_keys)
    # Query i of n sees the keys up to k - n + i, and at most a window of them.
    first, last = most_keys - most_queries, most_keys
    rising = max(0, min(window, last) - first)
    pairs = rising * (first + rising / 2) + (most_queries - rising) * window
    return (5 if is_backward else 2) * 2.0 * pairs * (tokens / most_queries) * heads * channels


class Recorder(TorchDispatchMode):
    """Records every operation on the device inside of `with recorder`.

    group_names: name of a process group by torch's own. What is running is named by `kind` (of the memory of new
    tensors), `phase` (which has a peak of its own) and `scope` ("microbatch" or "step": how often it happens).
    """

    def __init__(self, group_names: Mapping[str, str]) -> None:
        super().__init__()
        self.group_names = group_names
        self.kind, self.phase, self.scope = "temporaries", "build", "step"
        self.live: dict[int, tuple[int, str]] = {}
        """Bytes and kind of each storage, by its address in torch."""
        self.by_kind: Counter[str] = Counter()
        self.now = 0
        self.peaks: dict[str, tuple[int, Counter[str]]] = {}
        """The most bytes in use at once in each phase, and bytes by kind at this time."""
        self.collectives: Counter[tuple[str, Collective]] = Counter()
        self.launches: Counter[str] = Counter()
        self.flops: defaultdict[tuple[str, str], float] = defaultdict(float)
        """Each by scope."""

    @contextmanager
    def running(self, **names: str) -> Iterator[None]:
        """Name what runs in the block: kind, phase, scope."""
        before = {name: getattr(self, name) for name in names}
        self.__dict__.update(names)
        try:
            yield
        finally:
            self.__dict__.update(before)

    def restart(self) -> None:
        """Forget what was counted; what is in use stays."""
        self.peaks.clear()
        self.collectives.clear()
        self.launches.clear()
        self.flops.clear()

    def resized(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor with the size that it has now."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.live:
            before, kind = self.live[storage._cdata]
            size = -(-storage.nbytes() // ROUND) * ROUND
            self.live[storage._cdata] = size, kind
            self._add(size - before, kind)

    def add_flops(self, operation: str, flops: float) -> None:
        self.flops[self.scope, operation] += flops

    def relabel(self, tensor: torch.Tensor, kind: str) -> None:
        """Count the storage of a tensor as this kind from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self.live:
            size, before = self.live[key]
            self.live[key] = size, kind
            self.by_kind[before] -= size
            self.by_kind[kind] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _COLLECTIVES:
            self._collective(func, args)
        if func in _COALESCED:
            return torch._C._distributed_c10d.FakeWork().boxed()
        out = func(*args, **kwargs)
        for leaf in tree_leaves((args, kwargs, out)) if func in _COLLECTIVES else tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.is_cuda:
                self._see(leaf)
        self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = func._overloadpacket
        if packet in _PRODUCTS:
            # torch's formula takes the factors alone, and not the dtype of the result.
            self.add_flops(packet.__name__, flop_registry[packet](*args[: _PRODUCTS[packet]], out_val=out))
        if func.namespace == "torch_attn":
            self.add_flops(_ATTENTION[packet.__name__], _attention_flops(packet.__name__, args))
        if packet in _GROUPED:
            # Each row of the tokens is multiplied with one matrix; a matrix gradient sums products of rows.
            self.add_flops(packet.__name__, 2.0 * args[0].numel() * args[1].shape[-1])
        if func.is_view or func.namespace in ("c10d", "prim") or packet.__name__ in _NO_LAUNCH:
            return
        self.launches[self.scope] += 1

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        size = -(-storage.nbytes() // ROUND) * ROUND
        kind = "temporaries" if self._is_in_backward() else self.kind  # nothing new is kept for another pass
        self.live[key] = size, kind
        self._add(size, kind)
        weakref.finalize(storage, self._gone, key)

    def _add(self, size: int, kind: str) -> None:
        self.now += size
        self.by_kind[kind] += size
        phase = "loss" if kind == "logits" else "backward" if self._is_in_backward() else self.phase
        if self.now > self.peaks.get(phase, (0,))[0]:
            self.peaks[phase] = self.now, self.by_kind.copy()

    def _is_in_backward(self) -> bool:
        return self.kind != "logits" and torch._C._current_graph_task_id() != -1

    def _gone(self, key: int) -> None:
        size, kind = self.live.pop(key)
        self.now -= size
        self.by_kind[kind] -= size

    def _collective(self, func: Any, args: Any) -> None:
        operation, moved = _COLLECTIVES[func]
        tensors, boxed = moved(*args)
        group = dist.ProcessGroup.unbox(boxed)
        if group.size() == 1:
            return  # no message
        size = sum(tensor.nbytes for tensor in tree_leaves(tensors) if isinstance(tensor, torch.Tensor))
        # Megatron has further groups of all ranks, such as the optimizer's.
        name = self.group_names.get(group.group_name, "world" if group.size() == dist.get_world_size() else "other")
        self.collectives[self.scope, Collective(operation, name, group.size(), size)] += 1
