"""The device, communication backend and number format of a process: chosen once, with the reason in the log.

This is the only file outside csrc/, ops/ and mcore/cpu.py that names a GPU.
"""

import ctypes
import logging
import os
import platform
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megamm.common import gpu_constants
from megamm.common.errors import UserError

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""dtypes of parameters and activations in each precision; fp8 converts the factors of products only."""
PEAK_FLOPS_OF_VARIANTS = (
    # NVIDIA GB200 NVL72 data sheet: 360 PFLOP/s of 72 GPUs with sparsity.
    ("GB200", 2500e12),
    # NVIDIA GH200 data sheet: 1,979 TFLOP/s with sparsity, as H100 SXM.
    ("GH200", 989e12),
    # NVIDIA H200 data sheet, column NVL: 1,671 TFLOP/s with sparsity.
    ("H200 NVL", 835e12),
    # NVIDIA H100 data sheet, columns NVL and PCIe (edition of 2022): 1,671 and 1,513 TFLOP/s with sparsity.
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
)
"""Words of a GPU's name, and its dense bf16 peak FLOP/s (half of that with sparsity), of GPUs without a file in gpus/.
The first match counts."""
FP8_SPEEDUP = 2
"""Ratio of the peaks of FP8 and bf16, in the same data sheets; an A100 has no FP8."""
FP8_CAPABILITY = (8, 9)
"""Least compute capability with products in FP8, of torch._scaled_mm."""
GROUPED_FP8_CAPABILITIES = ((9, 0), (10, 0))
"""Compute capabilities for which torch has grouped products in FP8, torch._scaled_grouped_mm."""
_SHARE_OF_GPU = re.compile(r"\bMIG\b")
"""In the name of a part of a GPU (multi-instance GPU), which has no peak of its own in a data sheet."""
WEIGHT_GRADIENT_EXTENSION = "fused_weight_gradient_mlp_cuda"
"""The apex module that Megatron-core calls for `gradient_accumulation_fusion`."""
ALLOCATOR, CONNECTIONS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), "CUDA_DEVICE_MAX_CONNECTIONS"
"""Variables of torch's allocator (its earlier name is read by every version), and of the driver: its work queues."""
DRIVER = Path("/proc/driver/nvidia/version")
CPU_INFO = Path("/proc/cpuinfo")
MEMORY_MAP, RUNTIME_LIBRARY = Path("/proc/self/maps"), "libcudart"
OPEN_FILES, UNIFIED_MEMORY = Path("/proc/self/fd"), "/dev/nvidia-uvm"
DeviceEvent = float | torch.cuda.Event
"""A point in the device's work: seconds of the process's clock on a CPU, an event on its stream on a GPU."""


@dataclass(frozen=True)
class MemoryFigures:
    """Memory of a GPU in bytes: peaks of tensors and of torch's allocator, and all of it. retries: of allocations."""

    allocated: int
    reserved: int
    total: int
    retries: int


@dataclass(frozen=True)
class Device:
    """The device of a process; `backend` is the torch.distributed backend for it."""

    torch_device: torch.device
    backend: Literal["gloo", "nccl"]

    @property
    def is_gpu(self) -> bool:
        return self.torch_device.type == "cuda"

    def peak_flops(self, precision: str) -> float | None:
        """Return the peak FLOP/s of products in FP8 if this is the precision, else in bf16; None if unknown.

        Without a peak no MFU is reported.
        """
        if not self.is_gpu:
            return None
        peak = peak_flops_of(torch.cuda.get_device_name(self.torch_device))
        return FP8_SPEEDUP * peak if peak is not None and precision == "fp8" else peak

    @property
    def why_no_fp8(self) -> str:
        """Why the device has no products in FP8; empty if it has them, as the CPU by emulation."""
        if not self.is_gpu or torch.cuda.get_device_capability(self.torch_device) >= FP8_CAPABILITY:
            return ""
        found, needed = torch.cuda.get_device_capability(self.torch_device), FP8_CAPABILITY
        name = torch.cuda.get_device_name(self.torch_device)
        return (
            f"{name} has no FP8: its compute capability is {found[0]}.{found[1]}, not {needed[0]}.{needed[1]} or later"
        )

    @property
    def why_no_grouped_fp8(self) -> str:
        """Why the device has no grouped products in FP8; empty if it has them, as the CPU by emulation."""
        found = self.compute_capability
        if found is None or found in GROUPED_FP8_CAPABILITIES:
            return ""
        needed = " or ".join(f"{major}.{minor}" for major, minor in GROUPED_FP8_CAPABILITIES)
        return f"torch's grouped products in FP8 need compute capability {needed}, not {found[0]}.{found[1]}"

    @property
    def name(self) -> str:
        """Name of the GPU, or of the processor and its instructions that torch uses."""
        if self.is_gpu:
            return torch.cuda.get_device_name(self.torch_device)
        text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
        names = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
        return f"{next(names, platform.machine())}, {torch.backends.cpu.get_cpu_capability()}"

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """Generation of the GPU, (9, 0) for Hopper; None on a CPU."""
        return torch.cuda.get_device_capability(self.torch_device) if self.is_gpu else None

    def synchronize(self) -> None:
        """Wait for queued work, so that a clock read afterwards is correct."""
        if self.is_gpu:
            torch.cuda.synchronize(self.torch_device)

    def record_event(self) -> DeviceEvent:
        """Return an event at the current point in the device's work."""
        if not self.is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, begin: DeviceEvent, end: DeviceEvent) -> float:
        """Return the seconds between two events that the device has passed (call `synchronize` first)."""
        if isinstance(begin, float) and isinstance(end, float):
            return end - begin
        assert not isinstance(begin, float) and not isinstance(end, float), "two events of one device"
        return begin.elapsed_time(end) / 1e3

    def pci_address(self) -> str | None:
        """Return the GPU's address on the PCI bus, 0000:1b:00.0; None if torch's build has no shared CUDA runtime."""
        path = _runtime_library()
        if path is None:
            return None
        text = ctypes.create_string_buffer(32)
        code = int(ctypes.CDLL(path).cudaDeviceGetPCIBusId(text, len(text), self.torch_device.index))
        if code:
            _clear_last_error()
            return None
        return text.value.decode().lower()

    def memory_figures(self) -> MemoryFigures | None:
        """Return the peaks since the last call, and begin new ones; None on a CPU."""
        if not self.is_gpu:
            return None
        stats = torch.cuda.memory_stats(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        allocated, reserved = (stats[f"{kind}_bytes.all.peak"] for kind in ("allocated", "reserved"))
        total = torch.cuda.get_device_properties(self.torch_device).total_memory
        return MemoryFigures(allocated, reserved, total, stats["num_alloc_retries"])

    def profile_range(self, is_begin: bool) -> None:
        """Begin or end what `nsys profile --capture-range=cudaProfilerApi` records; on a CPU do nothing."""
        if self.is_gpu:
            (torch.cuda.profiler.start if is_begin else torch.cuda.profiler.stop)()

    def pin_memory(self, memory: torch.Tensor) -> bool:
        """Page-lock host memory, so that the GPU can copy to it directly; return whether it is locked.

        If the system does not allow it, copies are slower, which is logged. On a CPU there is nothing to do.
        """
        if not self.is_gpu:
            return False
        code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if code:
            # The runtime keeps this error and reports it at the next kernel launch, which has nothing to do with it.
            _clear_last_error()
            log.warning("cannot page-lock the memory for checkpoints (error %d): copies will be slower", code)
        return code == 0

    def unpin_memory(self, memory: torch.Tensor) -> None:
        """Undo a `pin_memory` that returned True."""
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def rng_state(self) -> torch.Tensor:
        """Return the state of the device's default generator, uint8 `[n]`; on a CPU it is torch's own."""
        return torch.cuda.get_rng_state(self.torch_device) if self.is_gpu else torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Restore what `rng_state` returned."""
        if self.is_gpu:
            torch.cuda.set_rng_state(state, self.torch_device)
        else:
            torch.set_rng_state(state)


def peak_flops_of(name: str) -> float | None:
    """Return the bf16 peak FLOP/s of the GPU of this name, as torch reports it; None if unknown."""
    if _SHARE_OF_GPU.search(name):
        return None
    kinds = ((kind.name.partition("-")[0].upper(), kind.peak_flops) for kind in gpu_constants.all_kinds())
    peaks = (*PEAK_FLOPS_OF_VARIANTS, *kinds)
    return next((flops for key, flops in peaks if re.search(rf"\b{key}\b", name)), None)


def _clear_last_error() -> None:
    """Take the last error from the runtime library that torch has loaded; torch has no function for this.

    UserError if torch was built with a static library, which cannot be called.
    """
    path = _runtime_library()
    if path is None:
        what = "cannot page-lock the memory for checkpoints, and torch's build has no shared CUDA runtime"
        raise UserError(what, remedy="raise the limit of locked memory (ulimit -l unlimited), or use a shared build")
    # Loading it again returns the same library, with the same state.
    ctypes.CDLL(path).cudaGetLastError()


def _runtime_library() -> str | None:
    """Return the path of the CUDA runtime that torch has loaded; None if it is a part of torch's own libraries."""
    mapped = (line.rpartition(" ")[2] for line in MEMORY_MAP.read_text().splitlines())
    return next((name for name in mapped if RUNTIME_LIBRARY in Path(name).name), None)


def choose(wanted: Literal["auto", "cpu", "gpu"] = "auto") -> Device:
    """Choose this process's device; `LOCAL_RANK` selects the GPU. UserError if a GPU is requested but not available."""
    if wanted == "gpu" and not torch.cuda.is_available():
        raise UserError("device: gpu, but torch sees no GPU", remedy="set device: auto or cpu, or install a GPU build")
    if wanted == "cpu" or not torch.cuda.is_available():
        reason = "as configured" if wanted == "cpu" else "torch sees no GPU"
        chosen = Device(torch.device("cpu"), "gloo")
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        chosen = Device(torch.device("cuda", torch.cuda.current_device()), "nccl")
        reason = torch.cuda.get_device_name()
    log.info("device %s, backend %s: %s", chosen.torch_device, chosen.backend, reason)
    return chosen


def prepare_gpu(wanted: Literal["auto", "cpu", "gpu"], launches_in_order: bool) -> list[str]:
    """Set the environment variables that are read when a process first uses its GPU; return lines for the log.

    Call it before `choose`. launches_in_order: start kernels in the order of their launches, also those of different
    streams. What the environment sets already stays. On a CPU nothing is set.
    """
    if not will_be_gpu(wanted):
        return []
    reason = "the allocator's blocks can grow, so that tensors of varying sizes fragment memory less"
    lines = [_default(ALLOCATOR, "expandable_segments:True", reason)]
    if launches_in_order:
        reason = "a collective of tensor parallelism starts before the product that is to run beside it"
        lines.append(_default((CONNECTIONS,), "1", reason))
    return lines


def _default(names: tuple[str, ...], value: str, reason: str) -> str:
    """Set the first variable unless one of them is set; return what is set."""
    given = next((name for name in names if name in os.environ), None)
    if given is not None:
        return f"{given}={os.environ[given]}: as given"
    os.environ[names[0]] = value
    return f"{names[0]}={value}: {reason}"


def will_be_gpu(wanted: Literal["auto", "cpu", "gpu"]) -> bool:
    """Whether `choose` will choose a GPU in a process forked from this one; does not touch the driver."""
    # Then only NVML is queried: the runtime's own count would leave every fork without a GPU.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    return wanted != "cpu" and torch.cuda.is_available()


def is_initialized() -> bool:
    """Whether this process has initialised a GPU; if so, it cannot fork processes that use it.

    A library can do so without torch: the driver then has its device of unified memory open. NVML does not open it.
    """
    return torch.cuda.is_initialized() or any(_target(link) == UNIFIED_MEMORY for link in OPEN_FILES.iterdir())


def _target(link: Path) -> str | None:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile: the folder that is read has a descriptor too
        return None


def gpus() -> list[str]:
    """Return name, memory and compute capability of every GPU that torch sees."""
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}" for p in found]


def visible() -> list[str] | None:
    """Return indices or UUIDs of the GPUs that this process may use, None for all; does not touch the driver."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if given is None else [name.strip() for name in given.split(",") if name.strip()]


def torch_build() -> str:
    """Return what torch was built for: "CPU" or a version of the GPU toolkit."""
    return "CPU" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, None if none is loaded."""
    if not DRIVER.exists():
        return None
    found = re.search(r"\d{3,}\.\d+(\.\d+)?", DRIVER.read_text())
    return found[0] if found else "of unknown version"


def gpu_compiler() -> str | None:
    """Return the path of nvcc, as torch's extension builder finds it: CUDA_HOME, then PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
