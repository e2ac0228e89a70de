"""Progress of a long command: bytes, bytes per second, time left.

On a terminal one line is overwritten; otherwise a new line is printed now and then. Both go to standard error.
"""

import sys
import time

SECONDS = (0.2, 10.0)
"""Seconds between lines, on a terminal and elsewhere."""


class Progress:
    """Progress of a command with `total` bytes; use it in a `with`."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done, self.old = name, total, 0, 0
        self.is_terminal = sys.stderr.isatty()
        self.began = self.printed = time.monotonic()

    def add(self, size: int, is_old: bool = False) -> None:
        """Count `size` more bytes as done; is_old: they were done before this start."""
        self.done += size
        self.old += size if is_old else 0
        if time.monotonic() - self.printed > SECONDS[not self.is_terminal]:
            self._print()

    def line(self, seconds: float) -> str:
        """The line to print after this many seconds."""
        speed = (self.done - self.old) / max(seconds, 1e-9)
        left = f"{(self.total - self.done) / speed:.0f} s left" if speed else "time left unknown"
        return f"{self.name}: {self.done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB, {speed / 1e6:,.0f} MB/s, {left}"

    def _print(self) -> None:
        self.printed = time.monotonic()
        line = self.line(self.printed - self.began)
        print(f"\r\x1b[K{line}" if self.is_terminal else line, end="" if self.is_terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._print()
        if self.is_terminal:
            print(file=sys.stderr)
