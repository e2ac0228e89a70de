"""Process tree of a job: no process outlives its parent (prctl(2)); process states are read from proc(5).

The tree: launcher > agent, fork server, prefork parent > ranks > their helpers. Each asks the kernel for SIGKILL when
its parent exits (PR_SET_PDEATHSIG), which also kills a process that is stopped or holds the GIL.
"""

import ctypes
import multiprocessing.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megamm.common.errors import UserError

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SWEEP_SECONDS = 30.0
"""A killed process that still exists after this time hangs in the kernel."""
CLEANING_SECONDS = 5.0
"""Seconds within which a resource tracker removes the semaphores of processes that have exited, and exits."""
_TRACKER, _FORK_SERVER = b"multiprocessing.resource_tracker", b"multiprocessing.forkserver"
"""In the command lines of Python's helper processes."""
WORKERS_FOLDER = "MEGAMM_WORKERS_FOLDER"
"""The environment variable of a fork server of data workers, with the folder of their sockets."""
_SOCKET_PATH, _SOCKET_NAME = 107, "/pymp-12345678/listener-12345678"
"""Bytes of a Unix socket's path (sockaddr_un of Linux), and the names that multiprocessing appends to a folder."""
SHARED_MEMORY = Path("/dev/shm")
_SHORT_FOLDERS = ("/tmp", "/var/tmp", str(SHARED_MEMORY))
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals with which users and schedulers stop a job; only the launcher handles them, other processes ignore them."""


def start_module(module: str, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
    """Start `python -m MODULE ARGUMENTS` with this interpreter; options are those of subprocess.Popen."""
    return subprocess.Popen([sys.executable, "-m", module, *arguments], **options)


def die_with_parent(parent: int) -> None:
    """Exit at once when process `parent`, which started this one, exits. Call it first in a new process."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it exited before the call
        os._exit(1)


def adopt_orphans(do: bool = True) -> None:
    """Become the parent of all descendants whose own parent exits; do=False ends this."""
    _prctl(PR_SET_CHILD_SUBREAPER, int(do))


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def ignore_stop_signals() -> None:
    """Ignore the stop signals, which the launcher handles: a scheduler may send them to every process of a job."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def without_blas_threads() -> Iterator[None]:
    """Start a process, or import numpy and scipy for the first time, without OpenBLAS threads.

    OpenBLAS starts one thread per core when it is loaded, unless OPENBLAS_NUM_THREADS or OMP_NUM_THREADS is 1. A
    process that forks must not have them: a fork copies only the calling thread.
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


def socket_folder() -> str:
    """Return the folder for multiprocessing's sockets, of this process and of those that it starts.

    It is in the folder for temporary files, unless the path of a socket there would be too long for the kernel: then in
    the first of _SHORT_FOLDERS that can be written to. Only sockets are stored there, no data. UserError if none can.
    """
    usual = tempfile.gettempdir()
    try:
        if _has_room(usual):
            return multiprocessing.util.get_temp_dir()
        for folder in filter(None, (os.environ.get("XDG_RUNTIME_DIR"), *_SHORT_FOLDERS)):
            if _has_room(folder) and os.access(folder, os.W_OK | os.X_OK):
                tempfile.tempdir = folder
                return multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = usual
    most = _SOCKET_PATH - len(_SOCKET_NAME)
    raise UserError(
        f"the folder for temporary files has a path of {len(os.fsencode(usual))} bytes: too long for sockets",
        where=usual,
        remedy=f"set TMPDIR to one of at most {most} bytes, or allow writing to {' or '.join(_SHORT_FOLDERS)}",
    )


def _has_room(folder: str) -> bool:
    return len(os.fsencode(os.path.abspath(folder))) + len(_SOCKET_NAME) <= _SOCKET_PATH


def threads() -> list[str]:
    """Return the names of this process's threads as listed by the kernel, including those started by libraries."""
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def children(process: int) -> list[int]:
    """Return the child processes of a process, including zombies."""
    found: list[int] = []
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += [int(child) for child in thread.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def sweep(kept: Collection[int] = (), on_exit: Callable[[int, int], None] = lambda *_: None) -> int:
    """Kill and reap all child processes except `kept`; return their number.

    When they exit, their own children become children of this process (adopt_orphans), so it repeats until none is
    left. on_exit: called with each process and its waitpid status. A process that hangs in the kernel is given up after
    SWEEP_SECONDS. Resource trackers exit on their own when all others have; they are killed only if they do not within
    CLEANING_SECONDS. A fork server of data workers may still be importing, so its folder of sockets is removed here.
    """
    count, empty, deadline = 0, 0, time.monotonic() + SWEEP_SECONDS
    patience = time.monotonic() + CLEANING_SECONDS
    while empty < 2 and time.monotonic() < deadline:  # twice: the kernel's list may miss one while another ends
        left = [process for process in children(os.getpid()) if process not in kept]
        empty = 0 if left else empty + 1
        killed = [process for process in left if not _is_helper(process, _TRACKER)]
        patience = time.monotonic() + CLEANING_SECONDS if killed else patience
        for process in killed if time.monotonic() < patience else left:
            folder = _variable(process, WORKERS_FOLDER) if _is_helper(process, _FORK_SERVER) else None
            os.kill(process, signal.SIGKILL)  # not reaped yet: no other process can have its id
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        for process in left:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                on_exit(process, status)
                count += 1
        if left:
            time.sleep(0.0005)
    return count


def _is_helper(process: int, name: bytes) -> bool:
    """Whether a process is that helper of Python's multiprocessing."""
    try:
        return name in Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _variable(process: int, name: str) -> str | None:
    """Return a variable of the environment with which a process was started; None if it has none."""
    try:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    prefix = f"{name}=".encode()
    return next((os.fsdecode(entry[len(prefix) :]) for entry in variables if entry.startswith(prefix)), None)


def remove_shared_tensors(process: int) -> None:
    """Remove what a killed process has left in shared memory; call it before its id can be another process's.

    torch hands over a tensor in a file torch_PID_..., which it maps and then unlinks; a kill in between leaves it.
    """
    for path in SHARED_MEMORY.glob(f"torch_{process}_*"):
        path.unlink(missing_ok=True)


def signal_main_thread(process: int, number: int) -> None:
    """Send a signal to the main thread of a process, even if it is stopped; with os.kill any thread may receive it."""
    if ctypes.CDLL(None, use_errno=True).tgkill(process, process, number):
        raise OSError(ctypes.get_errno(), "tgkill")  # ESRCH: ProcessLookupError


def state(process: int) -> str:
    """Return one letter: R running, S sleeping, D in the kernel, T stopped, Z zombie; "" if it does not exist."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def how_it_ended(status: int) -> str:
    """Return "signal 9 (SIGKILL)" or "exit code 1" for an exit code of subprocess, which is negative for a signal."""
    if status >= 0:
        return f"exit code {status}"
    return f"signal {-status} ({signal.Signals(-status).name})"
