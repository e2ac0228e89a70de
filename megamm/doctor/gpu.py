"""Check the GPUs of this node with NVML (nvidia-ml-py) and the kernel log; no GPU is initialised, nothing runs on them.

Xid messages: NVIDIA, "Xid Errors" (docs.nvidia.com/deploy/xid-errors); only hardware errors count, since the others are
mostly caused by programs. Memory in GiB.
"""

import importlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megamm.doctor.findings import Finding

KERNEL_LOG, UPTIME = Path("/dev/kmsg"), Path("/proc/uptime")
XIDS = {
    48: "double bit ECC error",
    62: "internal micro-controller halt",
    64: "row remapping failed",
    74: "NVLink error",
    79: "fallen off the bus",
    92: "many single bit ECC errors",
    95: "uncontained ECC error",
    119: "GSP timeout",
    120: "GSP error",
    140: "unrecovered ECC error",
}
XID = re.compile(r"^\d+,\d+,(\d+),.*?;NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)", re.MULTILINE)
RECENT = 86400.0
"""Seconds that a kernel message counts; without a limit, a repaired fault would count until the node restarts."""
SLOWDOWNS = {0x8: "hardware", 0x20: "heat (software)", 0x40: "heat", 0x80: "power brake"}
"""Bits of NVML's reasons for lower clocks, without the normal ones (idle, power cap, user settings)."""
USED_GIB = 2.0
"""Memory that may be in use before a run starts, by driver and display."""
RESET = "reset it (nvidia-smi --gpu-reset) or restart the node; replace the GPU if the error returns"


def look(expected: int | None, visible: list[str] | None) -> list[Finding]:
    """Check the GPUs. expected: number of GPUs, None for any; visible: indices or UUIDs for a run, None for all."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        text = "not checked: nvidia-ml-py is not installed"
        return [Finding("GPU", text, "unknown" if expected is None else "wrong", "pip install nvidia-ml-py")]
    try:
        nvml.nvmlInit()
        handles = dict(_handles(nvml, visible))
        return [
            _count(len(handles), expected),
            *_each(nvml, handles),
            *_links(nvml, handles),
            *_kernel_log(),
        ]
    except nvml.NVMLError as error:
        return [Finding("GPU", f"NVML fails: {error}", "wrong", "check nvidia-smi and dmesg; restart the node")]


def _handles(nvml: Any, visible: list[str] | None) -> Iterator[tuple[str, Any]]:
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = nvml.nvmlDeviceGetUUID(handle)
        if visible is None or any(name == str(index) or uuid.startswith(name) for name in visible):
            yield f"GPU {index}", handle


def _count(found: int, expected: int | None) -> Finding:
    if expected is None:
        return Finding("GPU", f"{found} found")
    fault = None if found == expected else f"{expected} expected"
    return Finding.judged("GPU", f"{found} found", fault, "check nvidia-smi and dmesg; restart the node")


def _each(nvml: Any, handles: dict[str, Any]) -> Iterator[Finding]:
    """Yield the faults of each GPU, and one line that it was checked."""
    for name, handle in handles.items():
        ask = _Asker(nvml, handle)
        errors = ask("TotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
        if errors:
            yield Finding("ECC", f"{name} has {errors} uncorrected errors", "wrong", RESET)
        _, _, pending, failed = ask("RemappedRows") or (0, 0, 0, 0)
        if failed:
            yield Finding("ECC", f"{name} could not remap a row of memory", "wrong", "replace the GPU")
        elif pending:
            yield Finding("ECC", f"{name} has rows of memory to remap", "wrong", RESET)
        reasons = ask("CurrentClocksEventReasons") or 0
        slow = [why for bit, why in SLOWDOWNS.items() if reasons & bit]
        if slow:
            remedy = "check cooling and power (nvidia-smi -q -d PERFORMANCE)"
            yield Finding("GPU clocks", f"{name} is slowed down by {', '.join(slow)}", "wrong", remedy)
        memory = ask("MemoryInfo")
        if memory is not None and memory.used > USED_GIB * 2**30:
            text = f"{name} has {memory.used / 2**30:.1f} GiB in use before the run starts"
            yield Finding("GPU memory", text, "wrong", "stop the processes that use it (nvidia-smi)")
        if ask("PersistenceMode") == 0:
            text = f"{name} is not in persistence mode: each first use waits for the driver"
            yield Finding("persistence", text, "warning", "nvidia-smi -pm 1")
        unknown = "; it does not report " + ", ".join(ask.unknown) if ask.unknown else ""
        yield Finding("GPU", f"{name} checked{unknown}")


class _Asker:
    """Queries of one GPU; an unsupported query returns None and is remembered in `unknown`."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle
        self.unknown: list[str] = []

    def __call__(self, what: str, *arguments: Any) -> Any:
        function: Callable[..., Any] = getattr(self.nvml, f"nvmlDeviceGet{what}")
        try:
            return function(self.handle, *arguments)
        except (self.nvml.NVMLError_NotSupported, self.nvml.NVMLError_FunctionNotFound):
            self.unknown.append(what)
            return None


def _links(nvml: Any, handles: dict[str, Any]) -> Iterator[Finding]:
    """Check NVLink: every GPU must have as many active links as the GPU with the most; 0 is a node without NVLink."""
    active = {name: sum(_link_states(nvml, handle)) for name, handle in handles.items()}
    most = max(active.values(), default=0)
    for name, count in active.items():
        if count < most:
            text = f"{name} has {count} active links, another GPU has {most}"
            yield Finding(
                "NVLink", text, "wrong", "check nvidia-smi nvlink -s and nvidia-fabricmanager; restart the node"
            )
    yield Finding("NVLink", f"up to {most} active links per GPU")


def _link_states(nvml: Any, handle: Any) -> Iterator[bool]:
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            yield nvml.nvmlDeviceGetNvLinkState(handle, link) == nvml.NVML_FEATURE_ENABLED
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_InvalidArgument):
            return


def _kernel_log() -> Iterator[Finding]:
    try:
        text = _read_kernel_log()
    except OSError as error:
        text = f"cannot read the kernel log ({error.strerror})"
        yield Finding("Xid", text, "unknown", "allow this user to read it (kernel.dmesg_restrict)")
        return
    now = float(UPTIME.read_text().split()[0])
    found = [(int(at) / 1e6, bus, int(xid)) for at, bus, xid in XID.findall(text)]
    faults = {(bus, xid) for at, bus, xid in found if xid in XIDS and now - at < RECENT}
    for bus, xid in sorted(faults):
        yield Finding("Xid", f"{xid} ({XIDS[xid]}) of the GPU at {bus} within a day", "wrong", RESET)
    if not faults:
        yield Finding("Xid", "no hardware errors within a day")


def _read_kernel_log() -> str:
    """Read "priority,number,microseconds since start,flags;text" lines (Linux, Documentation/ABI/testing/dev-kmsg)."""
    descriptor = os.open(KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK)
    parts, deadline = list[bytes](), time.monotonic() + 5.0
    try:
        while time.monotonic() < deadline:
            try:
                part = os.read(descriptor, 8192)
            except BrokenPipeError:  # a record was overwritten before it was read
                continue
            except BlockingIOError:
                break
            if not part:
                break
            parts.append(part)
    finally:
        os.close(descriptor)
    return b"".join(parts).decode(errors="replace")
