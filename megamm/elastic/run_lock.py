"""Lock of a run's folder: two jobs in it would treat each other's checkpoints as leftovers and mix their metrics.

The agent that leads a job, or the process of a run without agents, holds RUN/lock (flock(2)); the kernel releases it
whenever that process exits. NFS, Lustre (mounted with flock) and GPFS share such locks between hosts. If a file system
does not support locks, the run continues without one and logs a warning.
"""

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from megamm.common.errors import UserError

log = logging.getLogger(__name__)
LOCK = "lock"
_PATIENCE = 5.0
"""Seconds to wait for the previous job to exit."""


def hold(run: Path, job: str) -> int | None:
    """Return the descriptor that holds the lock; None if another process of this job holds it, or locks do not work.

    Closing the descriptor releases the lock. job: a name that is the same in all processes of the job and different
    for other jobs. UserError if another job holds the lock.
    """
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            # The job's previous leader may still hold it: that is this job's own lock. Another job gets time to exit.
            holder = _holder(descriptor)
            if holder.get("job") == job or time.monotonic() > deadline:
                os.close(descriptor)
                if holder.get("job") == job:
                    return None
                raise _refusal(run, holder) from None
        except OSError as error:
            log.warning("cannot lock %s (%s): a second job could use it at the same time", run, error)
            os.close(descriptor)
            return None
        time.sleep(0.1)
    _write_holder(descriptor, job)
    return descriptor


def _write_holder(descriptor: int, job: str) -> None:
    holder = {"job": job, "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except OSError as error:  # a full disk must not stop a run
        log.warning("cannot write the holder of the lock: %s", error)


def _holder(descriptor: int) -> dict[str, object]:
    """Return what the holder of the lock wrote into it; {} if it has not written it yet."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _refusal(run: Path, holder: dict[str, object]) -> UserError:
    since = holder.get("since")
    when = time.strftime(" since %Y-%m-%d %H:%M:%S UTC", time.gmtime(since)) if isinstance(since, float) else ""
    return UserError(
        f"another job trains in this folder, process {holder.get('pid')} on {holder.get('host')}{when}",
        where=run,
        remedy="stop that job first, or set output to another folder",
    )
