"""Processes of a job's tree: none outlives the one above it, and how Linux sees one (prctl(2), proc(5)).

The tree: command > agent, fork server, template > ranks > their helpers. Each asks the kernel for SIGKILL when the one
above ends, which also reaches a process that is stopped or holds the GIL.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SWEEP_SECONDS = 30.0
"""A killed process that is still there after this long hangs in the kernel."""
CLEANING_SECONDS = 5.0
"""Within which a process ends by itself that removes what a killed one has left outside of itself."""
_CLEANERS = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")
"""In their command lines: they see that their starter has ended, and remove its semaphores and its sockets' folder."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Sent to a job by people and schedulers; the command alone acts on them, the rest of the tree ignores them."""


def start_module(module: str, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
    """`python -m MODULE ARGUMENTS` with this interpreter; options are those of subprocess.Popen."""
    return subprocess.Popen([sys.executable, "-m", module, *arguments], **options)


def die_with_parent(parent: int) -> None:
    """End at once when process `parent`, which started this one, does. To be called by a process's first lines."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew
        os._exit(1)


def adopt_orphans(do: bool = True) -> None:
    """Become the parent of all processes below this one whose own parent ends, or no longer."""
    _prctl(PR_SET_CHILD_SUBREAPER, int(do))


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def ignore_stop_signals() -> None:
    """Leave these to the command: a scheduler may send them to every process of a job."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def without_blas_threads() -> Iterator[None]:
    """Start a process, or import numpy and scipy for the first time, without the threads of their OpenBLAS.

    OpenBLAS starts one thread a core when it is loaded, unless OPENBLAS_NUM_THREADS or OMP_NUM_THREADS is 1. A process
    that forks must not have them: a fork copies the calling thread only.
    """
    key = "OPENBLAS_NUM_THREADS"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def threads() -> list[str]:
    """Names of this process's threads as the kernel lists them, also those that libraries have started."""
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def children(process: int) -> list[int]:
    """Processes whose parent is that one, zombies too."""
    found: list[int] = []
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += [int(child) for child in thread.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def sweep(kept: Collection[int] = (), told: Callable[[int, int], None] = lambda *_: None) -> int:
    """Kill and reap all processes below this one but those kept; the number of them.

    What they had started comes to this process when they end (adopt_orphans), so: until none is left. told: each
    process and its status as waitpid gives it. One that hangs in the kernel is given up after SWEEP_SECONDS.
    Those that clean up for others have CLEANING_SECONDS to do so.
    """
    count, empty, deadline = 0, 0, time.monotonic() + SWEEP_SECONDS
    patience = time.monotonic() + CLEANING_SECONDS
    while empty < 2 and time.monotonic() < deadline:  # twice: the kernel's list may miss one while another ends
        left = [process for process in children(os.getpid()) if process not in kept]
        empty = 0 if left else empty + 1
        for process in left:
            if time.monotonic() > patience or not _cleans_up(process):
                os.kill(process, signal.SIGKILL)  # not reaped yet: nobody else can have its number
        for process in left:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                told(process, status)
                count += 1
        if left:
            time.sleep(0.0005)
    return count


def _cleans_up(process: int) -> bool:
    """Whether it ends by itself, once it has removed what its starter has left."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(name in command for name in _CLEANERS)


def signal_main_thread(process: int, number: int) -> None:
    """Send a signal that the main thread of a process takes, also once it is woken; os.kill lets any thread take it."""
    if ctypes.CDLL(None, use_errno=True).tgkill(process, process, number):
        raise OSError(ctypes.get_errno(), "tgkill")  # ESRCH: ProcessLookupError


def state(process: int) -> str:
    """One letter: R running, S sleeping, D in the kernel, T stopped, Z ended; "" if there is none such."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def how_it_ended(status: int) -> str:
    """ "signal SIGKILL" or "exit code 1" of an exit code as subprocess gives it: negative for a signal."""
    if status >= 0:
        return f"exit code {status}"
    return f"signal {-status} ({signal.Signals(-status).name})"
