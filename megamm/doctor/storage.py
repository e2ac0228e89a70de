"""Check the folders that a run writes to: writable, enough space, fast enough, and the clock of their file system.

In: folders that need not exist yet. Out: findings; sizes in GiB, speeds in MB/s (10^6 bytes), times in seconds. The
files that are written have no name in the file system, so a killed probe leaves nothing behind.
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
"""Time limit of writing; the speed is that of the bytes written until then."""
READINGS = 5
"""Readings of the clocks; the one with the shortest write counts."""
CLOCK_REMEDY = "fix the time service (timedatectl, chronyc tracking)"
MAX_SKEW = 1.0
"""Seconds between two clocks; nodes with keep-alive messages every 2 s and a limit of 6 s tolerate no more."""


def look(name: str, folder: str, least_free: float, least_speed: float) -> list[Finding]:
    """Check a folder. name: shown to users; least_free in GiB, least_speed in MB/s."""
    path = Path(folder).absolute()
    place = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(place).free / 2**30
    text = f"{folder}: {free:.1f} GiB free"
    remedy = f"free space there (df -h {place}), or use another folder"
    try:
        speed, skew = _write(place)
    except OSError as error:
        return [Finding.judged(name, text, f"not writable ({error.strerror})", remedy)]
    if free < least_free:
        return [Finding.judged(name, text, f"{least_free:g} GiB needed", remedy)]
    slow = f"below {least_speed:g} MB/s" if speed < least_speed else None
    found = [Finding.judged(name, f"{text}, written at {speed:.0f} MB/s", slow, "check the disk or its server")]
    fault = f"more than {MAX_SKEW:g} s" if abs(skew) > MAX_SKEW else None
    text = f"{skew:+.2f} s from the clock of {place}"
    return [*found, Finding.judged("clock", text, fault, CLOCK_REMEDY)]


def _dated(file: IO[bytes]) -> tuple[float, float, float]:
    """Return this node's clock before a write, the time that the file system records for it, and the clock after it."""
    before = time.time()
    file.write(b"\0")
    os.fsync(file.fileno())
    return before, os.fstat(file.fileno()).st_mtime, time.time()


def _write(place: Path) -> tuple[float, float]:
    """Return MB/s of a file written to disk, and the seconds that this node's clock is ahead of the file system's."""
    block = os.urandom(BLOCK)  # random, as a file system may compress
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
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
