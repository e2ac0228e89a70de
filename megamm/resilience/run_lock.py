"""One job at a time in a run's folder: two would take each other's checkpoints for leftovers and mix their metrics.

The agent that leads a job, or the process of a run without agents, holds RUN/lock (flock(2)); the kernel frees it at
any end of that process. NFS, Lustre (mounted with flock) and GPFS carry such locks to other hosts. Not where a file
system knows none: the log says so.
"""

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from megamm.errors import UserError

log = logging.getLogger(__name__)
LOCK = "lock"
_PATIENCE = 5.0
"""Seconds for a predecessor to come to its end."""


def hold(run: Path, job: str) -> int | None:
    """The lock's descriptor, until it is closed; None if another process of the same job has it, or there are no locks.

    job: the same in all processes of a job, and in no other one. UserError if another job has the run.
    """
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = _holder(descriptor)
            if holder.get("job") == job or time.monotonic() > deadline:
                os.close(descriptor)
                if holder.get("job") == job:
                    return None
                raise _refusal(run, holder) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): nothing keeps a second job out of it", run, error)
            os.close(descriptor)
            return None
        time.sleep(0.1)
    _tell(descriptor, job)
    return descriptor


def _tell(descriptor: int, job: str) -> None:
    told = {"job": job, "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(told).encode(), 0)
    except OSError as error:  # a full disk must not keep a run from going on
        log.warning("who holds the lock could not be written: %s", error)


def _holder(descriptor: int) -> dict[str, object]:
    """What the process that has the lock told; {} if it is only about to."""
    try:
        told = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _refusal(run: Path, holder: dict[str, object]) -> UserError:
    since = holder.get("since")
    when = time.strftime(" since %Y-%m-%d %H:%M:%S UTC", time.gmtime(since)) if isinstance(since, float) else ""
    return UserError(
        f"another job trains in this folder, process {holder.get('pid')} on {holder.get('host')}{when}",
        where=run,
        remedy="end that job first, or give this one another output",
    )
