"""All adaptations of Megatron-core to a CPU, each with its reason; installed only when no GPU is chosen.

Megatron-core names the GPU in its source: `torch.cuda.*` calls, `device="cuda"` literals, tensor type strings. An
import hook rewrites these in the source of `megatron.core` modules when they are loaded; torch itself is not changed.
On a GPU nothing in this file runs.
"""

import contextlib
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from types import CodeType, ModuleType
from typing import Any

import torch
import torch.distributed as dist

from megamm.common.device import WEIGHT_GRADIENT_EXTENSION

_API_NAME = "_megamm_cpu_device"


class _Stream:
    """A stream or event that is always done: a CPU runs operations one after the other."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> "_Stream":
        return self


class _Random:
    """`torch.cuda.random` of the rewritten source: the CPU generator's state."""

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()


class _CpuDevice:
    """Replaces `torch.cuda` in the rewritten source; names that are not defined here are torch.cuda's own."""

    Stream = Event = _Stream
    random = _Random
    manual_seed = staticmethod(torch.manual_seed)
    set_rng_state = staticmethod(torch.set_rng_state)

    @staticmethod
    def current_device() -> torch.device:
        """Return the CPU, or within `with torch.device("meta")` the meta device without storage (fake_world.py)."""
        return torch.get_default_device()

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def current_stream(*_: Any) -> _Stream:
        return _STREAM

    default_stream = current_stream

    @staticmethod
    def stream(_: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def synchronize(*_: Any) -> None: ...

    @staticmethod
    def set_device(_: Any) -> None: ...

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def empty_cache() -> None: ...

    @staticmethod
    def all_gather(parts: list[torch.Tensor], own: torch.Tensor, group: dist.ProcessGroup) -> None:
        """Gather tensors with different first sizes: gloo gathers only equal sizes, but its all-to-all takes any."""
        received = torch.empty((sum(map(len, parts)), *own.shape[1:]), dtype=own.dtype)
        sizes = [len(part) for part in parts]
        dist.all_to_all_single(received, torch.cat([own] * len(parts)), sizes, [len(own)] * len(parts), group)
        for part, values in zip(parts, received.split(sizes), strict=True):
            part.copy_(values)

    @staticmethod
    def reduce_scatter(own: torch.Tensor, parts: list[torch.Tensor], group: dist.ProcessGroup) -> None:
        """Sum all ranks' parts for this rank; the first sizes of the parts may differ."""
        received = torch.empty((len(parts), *own.shape), dtype=own.dtype)
        sizes = [len(part) for part in parts]
        dist.all_to_all_single(received.flatten(0, 1), torch.cat(parts), [len(own)] * len(parts), sizes, group)
        own.copy_(received.sum(0))

    @staticmethod
    def new_group(ranks: list[int], backend: str | None, **options: Any) -> Any:
        """Return the existing group of the same ranks within `shared_groups`, also torch's value for non-members."""
        if _GROUPS is None:
            return dist.new_group(ranks, backend=backend, **options)
        key = (tuple(ranks), backend or dist.get_backend())
        if key not in _GROUPS:
            _GROUPS[key] = dist.new_group(ranks, backend=backend, **options)
        return _GROUPS[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


_GROUPS: dict[tuple[tuple[int, ...], str], Any] | None = None
_STREAM = _Stream()
_DEVICE = _CpuDevice()

_GPU_PACKAGES = rf"transformer_engine\w*|apex|amp_C|flash_?attn\w*|{WEIGHT_GRADIENT_EXTENSION}"
_EVERYWHERE: tuple[tuple[re.Pattern[str], str], ...] = (
    # Type strings that the optimizer and gradient clipping compare with.
    (re.compile(r"(['\"])torch\.cuda\.(\w+Tensor)\1"), r"'torch.\2'"),
    # Calls; import statements stay, torch.cuda exists in a CPU build.
    (re.compile(r"(?<!from )(?<!import )(?<!['\"\w.])torch\.cuda\b"), _API_NAME),
    # Device literals of allocations.
    (re.compile(r"(['\"])cuda\1"), '"cpu"'),
    # Copies to the device (an argument may itself hold one call).
    (re.compile(r"\.cuda\((?:[^()]|\([^()]*\))*\)"), f".to({_API_NAME}.current_device())"),
    # Packages of GPU kernels, which Megatron uses if they can be imported (some then raise): here the import fails.
    (re.compile(rf"^(\s*(?:import|from) )(?=(?:{_GPU_PACKAGES})\b)", re.MULTILINE), r"\1_not_on_a_cpu."),
    # Pinned memory exists only with a GPU.
    (re.compile(r"\.pin_memory\(\)"), ""),
    (re.compile(r"\bpin_memory=True"), "pin_memory=False"),
)
_PER_MODULE: dict[str, tuple[tuple[str, str], ...]] = {
    # Most of a process's twenty groups have the same few ranks, see `shared_groups`.
    "megatron.core.parallel_state": (("group = torch.distributed.new_group(", f"group = {_API_NAME}.new_group("),),
    # torch.compile of Megatron's small pointwise functions costs more than it saves on a CPU.
    "megatron.core.jit": (("jit_fuser = torch.compile", "jit_fuser = noop_decorator"),),
    # The region's generator *is* the CPU generator here, so it may have changed.
    "megatron.core.tensor_parallel.random": (
        ("if not torch.all(cpu_rng_state == torch.get_rng_state()).item():", "if False:"),
    ),
    # Experts split over tensor ranks gather tokens, and every rank has a different number of them.
    "megatron.core.tensor_parallel.mappings": (
        ("torch.distributed.all_gather(output_tensor_list", f"{_API_NAME}.all_gather(output_tensor_list"),
        ("torch.distributed.reduce_scatter(output, input_", f"{_API_NAME}.reduce_scatter(output, input_"),
    ),
    # The all-to-all dispatcher needs numpy split sizes even if the tensor is already on the CPU.
    "megatron.core.transformer.moe.moe_utils": (
        ("if torch.is_tensor(tensor) and tensor.is_cuda:", "if torch.is_tensor(tensor) and as_numpy:"),
        ("tensor.record_stream(", "(lambda _: None)("),
    ),
}


@contextlib.contextmanager
def shared_groups() -> Iterator[None]:
    """Share one process group between all of Megatron's groups with the same ranks.

    Each gloo group keeps three threads, one of which wakes a hundred times a second, and needs a round of messages to
    create. On a CPU every rank of a group issues its operations in the same order, so one group can serve them all.
    """
    global _GROUPS
    _GROUPS = {}
    try:
        yield
    finally:
        _GROUPS = None


def _set_rng_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    """Set the CPU generator at once; Megatron would queue this for a GPU that is never initialised."""
    torch.set_rng_state(state)


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


_PATTERNS = [(pattern.pattern, pattern.flags, replacement) for pattern, replacement in _EVERYWHERE]
_ADAPTATIONS = hashlib.sha256(repr((_PATTERNS, _PER_MODULE)).encode()).hexdigest()[:16]
"""Part of the name of cached bytecode: other adaptations have files of their own."""


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a megatron.core module from rewritten source, whose bytecode is kept beside that of the original source."""

    def source_to_code(  # type: ignore[override]  # typeshed: static as in the abstract class, here it is a method
        self, data: Any, path: Any, **options: Any
    ) -> CodeType:
        source = bytes(data).decode()
        for old, new in _PER_MODULE.get(self.name, ()):
            if old not in source:
                raise ImportError(f"{path}: expected {old!r}; this megatron-core version needs a new adaptation")
            source = source.replace(old, new)
        for pattern, replacement in _EVERYWHERE:
            source = pattern.sub(replacement, source)
        return super().source_to_code(source.encode(), path, **options)

    def get_data(self, path: str) -> bytes:
        return super().get_data(self._own_cache(path))

    def set_data(self, path: str, data: Any, **options: Any) -> None:
        super().set_data(self._own_cache(path), data, **options)

    def _own_cache(self, path: str) -> str:
        """Return the path, or in place of the module's bytecode that of the rewritten source."""
        if path != importlib.util.cache_from_source(self.path):
            return path
        return importlib.util.cache_from_source(self.path, optimization=f"megamm{_ADAPTATIONS}")

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__[_API_NAME] = _DEVICE
        super().exec_module(module)
        if module.__name__ == "megatron.core.tensor_parallel.random":
            module.__dict__["_set_cuda_rng_state"] = _set_rng_state
            module.__dict__["_get_cuda_rng_state"] = _get_rng_state


class _Finder(importlib.abc.MetaPathFinder):
    """Assigns `_Loader` to the source modules of megatron.core."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Install the hook once, before the first import of megatron.core; a later call is a programming error."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    loaded = [name for name in sys.modules if name.startswith("megatron.core")]
    assert not loaded, f"megatron.core was imported before megamm.mcore.cpu.install(): {loaded[:3]}"
    sys.meta_path.insert(0, _Finder())
