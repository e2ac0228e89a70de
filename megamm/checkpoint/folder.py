"""The checkpoint folders of a run: lists and verifies them, finds the newest valid one, publishes, removes leftovers.

RUN/checkpoints/step_00001000/          a checkpoint; it gets this name only when it is complete
RUN/checkpoints/.tmp-*, .old-*          being written, being removed: never read
RUN/checkpoints/damaged-step_*          a damaged checkpoint, renamed when its step was written again
"""

import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megamm.checkpoint import files, manifest
from megamm.common.errors import UserError

log = logging.getLogger(__name__)
READERS = 8
"""Maximum number of threads that check files (hashing releases the GIL)."""


def path_of(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint, whether or not it exists."""
    return run / "checkpoints" / f"step_{step:08d}"


def all_of(run: Path) -> list[Path]:
    """Return the run's checkpoints by step, including damaged ones."""
    return sorted((run / "checkpoints").glob("step_????????"))


def verify(folder: Path, up_to: float = math.inf) -> None:
    """Compare every file with the manifest; of files larger than `up_to` bytes only the size.

    UserError for the first file that is missing or differs.
    """
    listed = manifest.read(folder)
    with ThreadPoolExecutor(min(READERS, len(os.sched_getaffinity(0)))) as pool:
        for found in pool.map(lambda name: manifest.problem_of(folder, name, listed[name], up_to), listed):
            if found:
                raise manifest.damaged(found, folder)


def is_valid(folder: Path) -> bool:
    """Whether `verify` succeeds."""
    try:
        verify(folder)
    except UserError:
        return False
    return True


def newest(run: Path, up_to: float = math.inf) -> Path | None:
    """Return the newest valid checkpoint; None in a fresh run. UserError if there are checkpoints but all are damaged.

    up_to: see `verify`.
    """
    last_error: UserError | None = None
    for folder in reversed(all_of(run)):
        try:
            verify(folder, up_to)
            return folder
        except UserError as error:
            log.warning("skipped: %s", error)
            last_error = error
    if last_error is not None:
        raise last_error
    return None


def publish(temporary: Path, final: Path) -> None:
    """Rename a complete, synced folder to its final name, durably.

    A damaged checkpoint with that name is renamed and kept; a valid one is replaced (the run was rolled back and has
    reached this step again).
    """
    old = final.with_name(f".old-{final.name}")
    if final.exists() and not is_valid(final):
        files.rename(final, aside(final))
    # Exchanged in one step, the name always has a valid checkpoint; otherwise it is missing between two renames.
    if final.exists() and files.exchange(temporary, final):
        files.rename(temporary, old)
    else:
        if final.exists():
            files.rename(final, old)
        files.rename(temporary, final)
    files.sync(final.parent)  # before the old one is removed
    files.remove_tree(old)


def aside(final: Path) -> Path:
    """Return a free name under which a damaged checkpoint is kept."""
    number = 1
    while (other := final.with_name(f"damaged-{final.name}-{number}")).exists():
        number += 1
    return other


def remove_leftovers(run: Path, attempt: str) -> None:
    """Remove what killed saves and removals left. attempt: JOB-NUMBER of the current save, numbered within the job.

    With local storage another rank may already be at a later save: the folders of that save stay.
    """
    for pattern in (".tmp-*", ".old-*"):
        for folder in (run / "checkpoints").glob(pattern):
            if not _is_of_later(folder.name, attempt):
                files.remove_tree(folder)


def _is_of_later(name: str, attempt: str) -> bool:
    """Whether a temporary folder belongs to this save or a later one of the same job."""
    # Names are .tmp-step_X-JOB-NUMBER and the same with .parts; numbers have six digits, so text compares like numbers.
    job, _, number = attempt.rpartition("-")
    _, is_same_job, theirs = name.partition(f"-{job}-")
    return bool(is_same_job) and theirs.removesuffix(".parts") >= number


def find_checkpoint(run_or_checkpoint: Path, up_to: float = math.inf) -> Path:
    """A run's newest valid checkpoint, or the given checkpoint folder, verified; up_to: see verify."""
    if (run_or_checkpoint / manifest.STATE).exists():
        verify(run_or_checkpoint, up_to)
        return run_or_checkpoint
    found = newest(run_or_checkpoint, up_to)
    if found is None:
        raise UserError("no checkpoint found", where=run_or_checkpoint, remedy="give a run's `output` folder")
    return found
