"""Folders that a run writes to: whether they can be written, have room, are quick, and tell the same time.

In: folders that need not exist yet. Out: findings; sizes in GiB, speeds in MB/s (10^6 bytes), times in seconds. What
is written has no name in the file system, so a probe that is killed leaves nothing.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO

from megamm.doctor.findings import Finding

BLOCK, BLOCKS = 2**22, 8
SECONDS = 5.0
"""Writing stops then, and the speed is of what was written."""
READINGS = 5
"""Of the clocks; that with the shortest write counts."""
CLOCK_REMEDY = "mend the time service (timedatectl, chronyc tracking)"
MAX_SKEW = 1.0
"""Seconds between two clocks; nodes that keep alive every 2 s and are lost after 6 tolerate no more than that."""


def look(name: str, folder: str, least_free: float, least_speed: float) -> list[Finding]:
    """name: of the folder, for people; least_free in GiB, least_speed in MB/s."""
    path = Path(folder).absolute()
    place = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(place).free / 2**30
    text = f"{folder}: {free:.1f} GiB free"
    remedy = f"make room there (df -h {place}), or use another folder"
    try:
        speed, skew = _write(place)
    except OSError as error:
        return [Finding.judged(name, text, f"cannot be written ({error.strerror})", remedy)]
    if free < least_free:
        return [Finding.judged(name, text, f"{least_free:g} GiB are needed", remedy)]
    slow = f"below {least_speed:g} MB/s" if speed < least_speed else None
    found = [Finding.judged(name, f"{text}, written at {speed:.0f} MB/s", slow, "look at the disk or its server")]
    fault = f"more than {MAX_SKEW:g} s" if abs(skew) > MAX_SKEW else None
    text = f"{skew:+.2f} s from that of {place}"
    return [*found, Finding.judged("clock", text, fault, CLOCK_REMEDY)]


def _dated(file: IO[bytes]) -> tuple[float, float, float]:
    """This node's clock before a write, the date that the file system gives the write, and the clock after it."""
    before = time.time()
    file.write(b"\0")
    os.fsync(file.fileno())
    return before, os.fstat(file.fileno()).st_mtime, time.time()


def _write(place: Path) -> tuple[float, float]:
    """MB/s of a file that reaches the disk, and how far this node's clock is ahead of the one that dated it."""
    block = os.urandom(BLOCK)  # a file system may compress
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        begin = time.monotonic()
        written = 0
        while written < BLOCKS * BLOCK and time.monotonic() - begin < SECONDS:
            written += file.write(block)
        os.fsync(file.fileno())
        seconds = time.monotonic() - begin
        # The readings around a write that took the least time: a busy node or disk may hold up any one of them.
        before, dated, after = min((_dated(file) for _ in range(READINGS)), key=lambda reading: reading[2] - reading[0])
    # Within the two readings nothing can be told; kernels date files by a clock that ticks in hundredths.
    skew = before - dated if dated < before - 0.02 else min(after - dated, 0.0)
    return written / 1e6 / max(seconds, 1e-9), skew if abs(skew) > 0.02 else 0.0
