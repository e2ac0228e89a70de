"""The checkpoint writer with every change to the file system counted: it kills itself at one, or lists them all.

`python -S writer_faults.py DESCRIPTOR BYTES PARENT` as megamm.checkpoint.writer; the environment has KILL_AT (which
call it ends before with SIGKILL; a write is half done then) or TRACE (a file that gets one JSON line per call).
"""

import json
import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamm.checkpoint import files, writer


class CountedOs:
    """Replaces `os` in megamm.checkpoint.files."""

    def __init__(self) -> None:
        self.calls, self.paths = 0, dict[int, str]()
        self.kill_at = int(os.environ.get("KILL_AT", "0"))
        self.trace = os.environ.get("TRACE")

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir"):
            return real
        return self.counted(name, real)

    def counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call, counted."""

        def counted(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == self.kill_at:
                if name == "write":  # whole pages, as O_DIRECT requires
                    half = len(arguments[1]) // 2
                    real(arguments[0], arguments[1][: half - half % mmap.PAGESIZE or half])
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments)
            what = self.paths[arguments[0]] if name in ("write", "fsync") else str(arguments[0])
            if name == "open":
                self.paths[result] = what
            if self.trace is not None:
                with Path(self.trace).open("a") as file:
                    file.write(json.dumps([name, what, str(arguments[1]) if name == "rename" else ""]) + "\n")
            return result

        return counted


if __name__ == "__main__":
    files.os = CountedOs()
    # Not in os: counted under its own name; NO_EXCHANGE simulates a file system without it.
    real = files.renameat2 if "NO_EXCHANGE" not in os.environ else lambda *_: -1
    files.renameat2 = files.os.counted("exchange", lambda *a: real(*a))
    writer.main()
