"""Check memory, process limits, InfiniBand ports and folders of this node.

Sizes in GiB, speeds in MB/s (10^6 bytes), times in seconds. InfiniBand: /sys/class/infiniband/HCA/ports/PORT (Linux,
Documentation/ABI/stable/sysfs-class-infiniband). `look` only reads what Linux reports. `look_at_folder` writes files
without a name in the file system, so a killed probe leaves nothing behind; it may hang with the file system (probe.py).
"""

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megamm.doctor.findings import Finding

INFINIBAND = Path("/sys/class/infiniband")
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
LEAST_GIB, LEAST_SHARE = 1.0, 0.1
"""Memory that must be free before a run starts: at least both."""
HCAS = "NCCL_IB_HCA"
FILES = (512, 4096)
"""Open files: below the first a run fails, below the second a large run (rank 0 has a connection to every rank)."""

BLOCK, BLOCKS = 2**22, 8
SECONDS = 5.0
"""Time limit of writing; the speed is that of the bytes written until then."""
READINGS = 5
"""Readings of the clocks; the one with the shortest write counts."""
CLOCK_REMEDY = "fix the time service (timedatectl, chronyc tracking)"
MAX_SKEW = 1.0
"""Seconds between two clocks; nodes with keep-alive messages every 2 s and a limit of 6 s tolerate no more."""


def look() -> list[Finding]:
    """Check memory, process limits and InfiniBand ports."""
    ports = list(_ports())
    return [_memory(), *_limits(has_infiniband=bool(ports)), *_infiniband(ports)]


def _memory() -> Finding:
    import psutil

    found = psutil.virtual_memory()
    free, total = found.available / 2**30, found.total / 2**30
    limit = _cgroup_memory()
    if limit is not None:
        free, total = min(free, limit[0]), min(total, limit[1])
    least = max(LEAST_GIB, LEAST_SHARE * total)
    fault = f"less than {least:.1f} GiB" if free < least else None
    return Finding.judged(
        "memory",
        f"{free:.1f} of {total:.1f} GiB free",
        fault,
        "stop processes that use it (ps aux --sort=-rss), or request more memory",
    )


def _cgroup_memory() -> tuple[float, float] | None:
    """Return free and allowed GiB of the control group (version 2) of a container or job; None without a limit."""
    own = next((line[3:] for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::")), "/")
    for folder in (CGROUPS / own.lstrip("/"), CGROUPS):
        try:
            most = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
            lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if most != "max":
            cache = int(lines.get("inactive_file", "0"))  # released when memory is short
            return (int(most) - used + cache) / 2**30, int(most) / 2**30
    return None


def _limits(has_infiniband: bool) -> Iterator[Finding]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = FILES[1] if files == resource.RLIM_INFINITY else files
    if files < FILES[1]:
        fails, suffices = FILES
        remedy = f"ulimit -n {16 * suffices} (limits.conf, LimitNOFILE)"
        yield Finding("limits", f"{files} open files", "wrong" if files < fails else "warning", remedy)
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if size != resource.RLIM_INFINITY:
        yield Finding("limits", f"files limited to {size / 2**30:.2f} GiB", "wrong", "ulimit -f unlimited")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if has_infiniband and locked != resource.RLIM_INFINITY:
        text = f"{locked / 2**20:.0f} MiB of locked memory, but InfiniBand needs it unlimited"
        yield Finding("limits", text, "wrong", "ulimit -l unlimited (limits.conf, LimitMEMLOCK)")
    yield Finding("limits", "open files, file size and locked memory checked")


def _ports() -> Iterator[tuple[str, int, str, str]]:
    """Yield HCA, port, state ("ACTIVE") and rate of every port."""
    for port in sorted(INFINIBAND.glob("*/ports/*")):
        state, rate = ((port / name).read_text().strip() for name in ("state", "rate"))
        yield port.parts[-3], int(port.name), state.rpartition(":")[2].strip(), rate


def _infiniband(ports: list[tuple[str, int, str, str]]) -> Iterator[Finding]:
    """Check that ports for NCCL are active; ports that the variable does not name may be unused."""
    setting = os.environ.get(HCAS, "")
    if not ports and not setting:
        yield Finding("InfiniBand", "no ports")
        return
    absent = (
        [] if setting.startswith("^") else [t for t in _tokens(setting) if not any(_is(t, p, setting) for p in ports)]
    )
    if absent:
        yield Finding("InfiniBand", f"{', '.join(absent)} of {HCAS} not found", "wrong", "check lspci and ibstat")
    chosen = [port for port in ports if _is_chosen(port, setting)]
    active = [port for port in chosen if port[2] == "ACTIVE"]
    down = [f"{hca}:{number} is {state}" for hca, number, state, _ in chosen if state != "ACTIVE"]
    if down:
        remedy = f"check ibstat, cable and switch, or exclude it with {HCAS}"
        yield Finding("InfiniBand", ", ".join(down), "wrong" if setting or not active else "warning", remedy)
    rates = sorted({rate for *_, rate in active})
    yield Finding("InfiniBand", f"{len(active)} of {len(chosen)} ports active" + "".join(f", {rate}" for rate in rates))


def _tokens(setting: str) -> list[str]:
    return [token for token in setting.lstrip("^=").split(",") if token]


def _is(token: str, port: tuple[str, int, str, str], setting: str) -> bool:
    """Whether a token of NCCL_IB_HCA selects the port: "mlx5" or "mlx5_0:1"; a prefix, or the exact name after "="."""
    hca, _, number = token.partition(":")
    same = port[0] == hca if setting.lstrip("^").startswith("=") else port[0].startswith(hca)
    return same and number in ("", str(port[1]))


def _is_chosen(port: tuple[str, int, str, str], setting: str) -> bool:
    named = any(_is(token, port, setting) for token in _tokens(setting))
    return not setting or named != setting.startswith("^")


def look_at_folder(name: str, folder: str, least_free: float, least_speed: float) -> list[Finding]:
    """Check a folder. name: shown to users; least_free in GiB, least_speed in MB/s."""
    path = Path(folder).absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())  # a run creates the folder
    free = shutil.disk_usage(existing).free / 2**30
    text = f"{folder}: {free:.1f} GiB free"
    remedy = f"free space there (df -h {existing}), or use another folder"
    try:
        speed, skew = _write(existing)
    except OSError as error:
        return [Finding.judged(name, text, f"not writable ({error.strerror})", remedy)]
    if free < least_free:
        return [Finding.judged(name, text, f"{least_free:g} GiB needed", remedy)]
    slow = f"below {least_speed:g} MB/s" if speed < least_speed else None
    found = [Finding.judged(name, f"{text}, written at {speed:.0f} MB/s", slow, "check the disk or its server")]
    fault = f"more than {MAX_SKEW:g} s" if abs(skew) > MAX_SKEW else None
    text = f"{skew:+.2f} s from the clock of {existing}"
    return [*found, Finding.judged("clock", text, fault, CLOCK_REMEDY)]


def _dated(file: IO[bytes]) -> tuple[float, float, float]:
    """Return this node's clock before a write, the time that the file system records for it, and the clock after it."""
    before = time.time()
    file.write(b"\0")
    os.fsync(file.fileno())
    return before, os.fstat(file.fileno()).st_mtime, time.time()


def _write(folder: Path) -> tuple[float, float]:
    """Return MB/s of a file written to disk, and the seconds that this node's clock is ahead of the file system's."""
    block = os.urandom(BLOCK)  # random, as a file system may compress
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        begin = time.monotonic()
        written = 0
        while written < BLOCKS * BLOCK and time.monotonic() - begin < SECONDS:
            written += file.write(block)
        os.fsync(file.fileno())
        seconds = time.monotonic() - begin
        # Use the readings around the shortest write: a busy node or disk may delay any of them.
        before, dated, after = min((_dated(file) for _ in range(READINGS)), key=lambda reading: reading[2] - reading[0])
    # A difference within the two readings is not measurable; kernels date files with a clock of 10 ms ticks.
    skew = before - dated if dated < before - 0.02 else min(after - dated, 0.0)
    return written / 1e6 / max(seconds, 1e-9), skew if abs(skew) > 0.02 else 0.0
