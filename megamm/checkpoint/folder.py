"""The folders of a run's checkpoints: which there are, whether they are whole, which one to resume, which to remove.

RUN/checkpoints/step_00001000/          a checkpoint; it has this name only once it is complete
RUN/checkpoints/.tmp-*, .old-*          being written, being removed: never read
RUN/checkpoints/damaged-step_*          set aside when its step was written again
"""

import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megamm.checkpoint import files, manifest
from megamm.errors import UserError

log = logging.getLogger(__name__)
READERS = 8
"""Threads that check files at a time (hashing lets other threads run)."""


def path_of(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint, there or not."""
    return run / "checkpoints" / f"step_{step:08d}"


def all_of(run: Path) -> list[Path]:
    """The run's checkpoints by step, damaged ones too."""
    return sorted((run / "checkpoints").glob("step_????????"))


def verify(folder: Path, up_to: float = math.inf) -> None:
    """Compare every file with the manifest, those of more bytes than `up_to` by their size alone.

    UserError names the first that is missing or differs.
    """
    listed = manifest.read(folder)
    with ThreadPoolExecutor(min(READERS, len(os.sched_getaffinity(0)))) as pool:
        for found in pool.map(lambda name: manifest.problem_of(folder, name, listed[name], up_to), listed):
            if found:
                raise manifest.damaged(found, folder)


def is_valid(folder: Path) -> bool:
    """Whether it verifies."""
    try:
        verify(folder)
    except UserError:
        return False
    return True


def newest(run: Path, up_to: float = math.inf) -> Path | None:
    """The newest checkpoint that verifies; None in a fresh run. UserError if there are some and all are damaged.

    up_to: see `verify`.
    """
    last_error: UserError | None = None
    for folder in reversed(all_of(run)):
        try:
            verify(folder, up_to)
            return folder
        except UserError as error:
            log.warning("passed over: %s", error)
            last_error = error
    if last_error is not None:
        raise last_error
    return None


def publish(temporary: Path, final: Path) -> None:
    """Give a complete, synced folder its name, durably.

    One of the same name that is damaged is kept under another; a whole one (the run went back and came here again)
    gives way.
    """
    old = final.with_name(f".old-{final.name}")
    if final.exists() and not is_valid(final):
        files.rename(final, aside(final))
    if final.exists() and files.exchange(temporary, final):
        files.rename(temporary, old)
    else:
        if final.exists():
            files.rename(final, old)
        files.rename(temporary, final)
    files.sync(final.parent)
    files.remove_tree(old)


def aside(final: Path) -> Path:
    """A name under which a damaged checkpoint is kept."""
    number = 1
    while (other := final.with_name(f"damaged-{final.name}-{number}")).exists():
        number += 1
    return other


def remove_leftovers(run: Path, attempt: str) -> None:
    """What killed saves and removals left. attempt: JOB-NUMBER of the save that begins, numbered within the job.

    With a local tier another rank may be at a later save already: that one's folders stay.
    """
    for pattern in (".tmp-*", ".old-*"):
        for folder in (run / "checkpoints").glob(pattern):
            if not _is_of_later(folder.name, attempt):
                files.remove_tree(folder)


def _is_of_later(name: str, attempt: str) -> bool:
    """Whether a temporary folder is of this save or of a later one of the same job."""
    job, _, number = attempt.rpartition("-")
    _, is_same_job, theirs = name.partition(f"-{job}-")
    return bool(is_same_job) and theirs.removesuffix(".parts") >= number
