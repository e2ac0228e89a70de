"""Progress of a stage: samples and units done, samples per second, time left; to standard error."""

import sys
import time

from megamm.common.progress import SECONDS


class StageProgress:
    """Progress of a stage with `total` units; use it in a `with`. A stage of less than ten seconds prints nothing."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.kept = self.done = self.samples = 0
        self.is_terminal = sys.stderr.isatty()
        self.began = self.printed = time.monotonic()

    def keep(self) -> None:
        """Count a unit that an earlier attempt has done."""
        self.kept += 1

    def add(self, samples: int) -> None:
        """Count a unit as done, with its samples."""
        self.done += 1
        self.samples += samples
        if time.monotonic() - self.printed > SECONDS[not self.is_terminal]:
            self._print()

    def line(self, seconds: float) -> str:
        """The line to print after this many seconds."""
        speed = self.samples / max(seconds, 1e-9)
        left = (self.total - self.kept - self.done) * seconds / self.done if self.done else None
        time_left = "time left unknown" if left is None else f"{left:.0f} s left"
        line = f"{self.name}: {self.kept + self.done} of {self.total} units, {self.samples:,} samples"
        return f"{line}, {speed:,.0f} samples/s, {time_left}" + (f", {self.kept} units kept" if self.kept else "")

    def _print(self) -> None:
        self.printed = time.monotonic()
        line = self.line(self.printed - self.began)
        print(f"\r\x1b[K{line}" if self.is_terminal else line, end="" if self.is_terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def __enter__(self) -> "StageProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.printed > self.began:
            self._print()
            if self.is_terminal:
                print(file=sys.stderr)
