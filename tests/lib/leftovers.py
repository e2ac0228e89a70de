"""No leftovers: temporary files of a session are in its own folder, which must be empty at the end.

Files that the tests leave there or in shared memory fail the session and are named, and so do processes that have not
ended. pytest's own folders and that of torch.compile are removed with the folder if all tests passed, and kept for
inspection otherwise.
"""

import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

EXPECTED = ("pytest-of-", "torchinductor_")
SHARED_MEMORY = Path("/dev/shm")
END_SECONDS = 60.0
"""Seconds within which every process of the session ends after its last test; usually none is left by then."""


class Helpers:
    """Ends Python's helper processes of a worker with its last test.

    They remove files when they end. Python would end them when the worker exits; pytest-xdist kills a worker that takes
    long to exit.
    """

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        multiprocessing.forkserver._forkserver._stop()
        multiprocessing.util._exit_function()
        multiprocessing.resource_tracker._resource_tracker._stop()


class Leftovers:
    """Watches one session, in the process that the user started (not in the workers)."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="megamm-"))
        self.folder.chmod(0o711)  # munge requires search permission for all on the folders above its socket
        self.shared_before = _shared_memory()
        os.environ["TMPDIR"] = str(self.folder)
        tempfile.tempdir = None  # read TMPDIR again

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        """Look after the workers have ended, and before pytest's summary, which stays the last line."""
        yield
        running = self._end_of_processes()
        files = [path for path in sorted(self.folder.iterdir()) if not path.name.startswith(EXPECTED)]
        shared = _shared_memory() - self.shared_before
        left = [*files, *sorted(shared - _used(shared)), *running]
        if left:
            print(f"\nThe tests left behind: {', '.join(map(str, left))}")
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
        if session.exitstatus == pytest.ExitCode.OK:
            shutil.rmtree(self.folder)
        else:
            print(f"\nTemporary files of the tests are kept in {self.folder}")

    def _end_of_processes(self) -> list[str]:
        """Wait for the processes of the session; kill those that do not end by themselves, and return them."""
        until, mark, kept = time.monotonic() + END_SECONDS, f"TMPDIR={self.folder}".encode(), []
        while running := _with_variable(mark):
            for number in running:
                with suppress(ProcessLookupError):
                    process = os.pidfd_open(number)
                    left = max(0.0, until - time.monotonic())
                    if not select.select([process], [], [], left)[0]:
                        kept.append(f"process {number} ({_command(number)})")
                        signal.pidfd_send_signal(process, signal.SIGKILL)
                        select.select([process], [], [])
                    os.close(process)
        return kept


def _with_variable(start: bytes) -> list[int]:
    """Return the living processes, other than this one, that were started with a variable that begins so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            variables = path.read_bytes().split(b"\0")
            if any(variable.startswith(start) for variable in variables) and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def _command(number: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return "ended"


def _shared_memory() -> set[Path]:
    """Return this user's files in shared memory."""
    found = set()
    for path in SHARED_MEMORY.glob("*"):
        with suppress(FileNotFoundError):
            if path.lstat().st_uid == os.getuid():
                found.add(path)
    return found


def _used(paths: set[Path]) -> set[Path]:
    """Return those that a living process has mapped: they belong to other programs of this user."""
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps") if paths else ():
        with suppress(OSError):
            text = maps.read_text()
            used |= {path for path in paths if str(path) in text}
    return used
