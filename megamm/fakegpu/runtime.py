"""Replaces torch.cuda in this process by a GPU that exists only by name: no work is ever pending on its streams.

The patches cannot be undone, so `install` may only be called in a process of its own (process.py).
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # it lists torch's functions when it is loaded: those, and not their replacements
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megamm.common.gpu_constants import GpuConstants
from megamm.fakegpu.results import GPUS_OF_NODE

DEVICE = torch.device("cuda", 0)
_TYPE_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.uint8: "Byte",
    torch.bool: "Bool",
}


class FakeStream:
    """A stream, or an event on it, whose work is always done."""

    cuda_stream = 0
    device = DEVICE
    device_index = stream_id = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "FakeStream":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def record_event(self, *_: Any) -> "FakeStream":
        return FakeStream()

    def wait(self, *_: Any) -> None: ...

    wait_stream = wait_event = wait

    def query(self) -> bool:
        return True

    @staticmethod
    def wait_on_host() -> None: ...

    def synchronize(self) -> None:
        self.wait_on_host()

    def elapsed_time(self, _: "FakeStream") -> float:
        return 1.0


class _FakeGenerator:
    """A generator of the GPU: Megatron keeps its states, but nothing is ever drawn."""

    def __init__(self) -> None:
        self.state = torch.zeros(16, dtype=torch.uint8)

    def get_state(self) -> torch.Tensor:
        return self.state.clone()

    def set_state(self, state: torch.Tensor) -> None:
        self.state = state

    def graphsafe_get_state(self) -> "_FakeGenerator":
        return self

    def graphsafe_set_state(self, _: "_FakeGenerator") -> None: ...

    clone_state = graphsafe_get_state

    def manual_seed(self, _: int) -> "_FakeGenerator":
        return self

    def initial_seed(self) -> int:
        return 0


def install(gpu: GpuConstants, wait: Callable[[str], None]) -> None:
    """Let torch report this GPU, and let FakeTensors on it behave like its tensors.

    wait: called where the host would wait for the device, with the kind of wait.
    """
    FakeStream.wait_on_host = staticmethod(lambda: wait("synchronize"))  # type: ignore[assignment, method-assign]
    generators = tuple(_FakeGenerator() for _ in range(GPUS_OF_NODE))
    torch.cuda.default_generators = generators  # type: ignore[assignment, method-assign, attr-defined]
    for name, value in (_functions(gpu) | _random(generators[0])).items():
        setattr(torch.cuda, name, value)
        if hasattr(torch.cuda.random, name):
            setattr(torch.cuda.random, name, value)
    torch.version.cuda = "13.0"
    # torch.tensor(..., device=...) would otherwise initialise the device.
    FakeTensorMode.avoid_device_init = property(lambda _: True)  # type: ignore[assignment, method-assign, attr-defined]
    # Compiling cannot run on a machine without the device, and would not change which tensors a step keeps.
    torch.compile = _uncompiled  # type: ignore[assignment, method-assign, attr-defined]
    FakeTensor.type = _type  # type: ignore[assignment, method-assign, attr-defined]
    FakeTensor.data_ptr = _address  # type: ignore[assignment, method-assign, attr-defined]
    _count_constants(wait)


def _functions(gpu: GpuConstants) -> dict[str, Any]:
    def nothing(*_: Any, **__: Any) -> None: ...

    def stream(*_: Any) -> FakeStream:
        return FakeStream()

    major, minor = map(int, gpu.compute_capability.split("."))
    properties = SimpleNamespace(
        name=gpu.device_name,
        total_memory=int(gpu.memory),
        major=major,
        minor=minor,
        multi_processor_count=int(gpu.multiprocessors),
        warp_size=32,
        max_threads_per_multi_processor=2048,
    )
    return dict(
        is_available=lambda: True,
        is_initialized=lambda: True,
        is_bf16_supported=lambda *_, **__: True,
        is_current_stream_capturing=lambda: False,
        init=nothing,
        _lazy_init=nothing,
        device_count=lambda: GPUS_OF_NODE,
        current_device=lambda: 0,
        set_device=nothing,
        synchronize=lambda *_: FakeStream.wait_on_host(),
        empty_cache=nothing,
        get_device_name=lambda *_: gpu.device_name,
        get_device_properties=lambda *_: properties,
        get_device_capability=lambda *_: (major, minor),
        current_stream=stream,
        default_stream=stream,
        stream=stream,
        Stream=FakeStream,
        Event=FakeStream,
        memory_allocated=lambda *_: 0,
        max_memory_allocated=lambda *_: 0,
        memory_reserved=lambda *_: 0,
        mem_get_info=lambda *_: (int(gpu.memory), int(gpu.memory)),
        # Host memory that does not exist can be page-locked.
        cudart=lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0),
    )


def _random(generator: _FakeGenerator) -> dict[str, Any]:
    def nothing(*_: Any, **__: Any) -> None: ...

    names = ("manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state")
    return dict.fromkeys(names, nothing) | {"get_rng_state": lambda *_, **__: generator.get_state()}


def _uncompiled(function: Any = None, **_: Any) -> Any:
    """Stand in for torch.compile, also as a decorator with arguments."""
    return (lambda wrapped: wrapped) if function is None else function


_real_type = torch.Tensor.type


def _type(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
    """Return the name of a tensor's type, which Megatron compares with those of GPU tensors."""
    if arguments or options or tensor.device != DEVICE:
        return _real_type(tensor, *arguments, **options)
    return f"torch.cuda.{_TYPE_NAMES[tensor.dtype]}Tensor"


def _address(tensor: torch.Tensor) -> int:
    """Return a number that is the same for two tensors if and only if they begin at the same element in memory."""
    return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.itemsize


def _count_constants(wait: Callable[[str], None]) -> None:
    """Count torch.tensor(values, device=GPU) as a wait: it copies from memory that is not page-locked."""
    make = torch.tensor

    def tensor(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = make(*arguments, **options)  # only a real GPU can page-lock memory
        if made.is_cuda:
            wait("copy from host")
        return made

    torch.tensor = tensor  # type: ignore[assignment]
