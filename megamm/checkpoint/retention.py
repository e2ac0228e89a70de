"""Retention: which checkpoints are kept, and the two pointers to them.

The newest `keep` are kept, the one with the lowest held-out loss if requested, and the one that is being uploaded. The
loss is read from each checkpoint's own state.json: there is no second record that could contradict it.

    RUN/checkpoints/latest, best    text files with a folder's name, replaced atomically by rename: always valid, and
                                    the same on a file system without links and on an object store
"""

import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from megamm.checkpoint import files, manifest

log = logging.getLogger(__name__)
LATEST, BEST = "latest", "best"
_UPLOADING = "uploads/current"


def doomed(names: Sequence[str], keep: int, kept: Collection[str]) -> list[str]:
    """Return the complete checkpoints to remove: never the newest `keep` (at least one), never those in `kept`."""
    return [name for name in sorted(names)[: -max(keep, 1)] if name not in kept]


def best_of(losses: Mapping[str, float | None]) -> str | None:
    """Return the checkpoint with the lowest held-out loss, the newest of equal ones; None if none has a loss."""
    # The negative step makes the newest of equal ones the minimum.
    known = [(loss, -manifest.step_of(name), name) for name, loss in losses.items() if loss is not None]
    return min(known)[2] if known else None


def heldout_loss(state: bytes) -> float | None:
    """Return the held-out loss recorded in a state.json; None if it was not measured or is not a number."""
    try:
        loss = json.loads(state).get("heldout_loss")
    except (ValueError, AttributeError):
        return None
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None


def complete(run: Path) -> list[str]:
    """Return the names of the run's finished checkpoints (unverified), by step."""
    folders = (run / "checkpoints").glob("step_????????")
    return sorted(f.name for f in folders if manifest.STEP_FOLDER.fullmatch(f.name) and (f / manifest.NAME).is_file())


def best(run: Path) -> str | None:
    """Return the run's checkpoint with the lowest held-out loss."""
    return best_of({name: heldout_loss(_read(run / "checkpoints" / name / manifest.STATE)) for name in complete(run)})


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def apply(run: Path, keep: int, keep_best: bool) -> list[str]:
    """Update the pointers, then remove checkpoints that are not kept; return their names.

    One process calls this after a save. If the disk is too full for a pointer, checkpoints without a pointer are
    removed first.
    """
    names, best_now = complete(run), best(run) if keep_best else None
    gone = doomed(names, keep, {name for name in (best_now, uploading(run)) if name})
    try:
        renew(run, keep_best)
    except OSError as error:
        log.warning("cannot update the pointers to checkpoints: %s; removing old checkpoints first", error)
        pointed = {_read(run / "checkpoints" / pointer).decode().strip() for pointer in (LATEST, BEST)}
        _remove(run, [name for name in gone if name not in pointed])
        renew(run, keep_best)
    _remove(run, gone)
    return gone


def _remove(run: Path, names: Sequence[str]) -> None:
    for name in names:
        if (run / "checkpoints" / name).exists():
            remove(run / "checkpoints" / name)


def renew(run: Path, keep_best: bool) -> str | None:
    """Update the pointers to the current checkpoints; the best one only with keep_best."""
    names, best_now = complete(run), best(run) if keep_best else None
    if names:
        point(run, LATEST, names[-1])
    if best_now:
        point(run, BEST, best_now)
    return best_now


def point(run: Path, pointer: str, name: str) -> None:
    """Make a pointer name a checkpoint, atomically and durably."""
    path = run / "checkpoints" / pointer
    if not path.is_file() or path.read_text().strip() != name:
        replace(path, f"{name}\n".encode())


def replace(path: Path, data: bytes) -> None:
    """Write a small file under a fixed temporary name (a kill leaves at most one such file), then rename it."""
    temporary = path.with_name(f".{path.name}.new")
    files.write(temporary, [data])
    files.rename(temporary, path)


def remove(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first: a partly removed folder must not look like a checkpoint."""
    aside = folder.with_name(f".old-{folder.name}")
    files.remove_tree(aside)
    files.rename(folder, aside)
    files.remove_tree(aside)


def set_uploading(run: Path, name: str) -> None:
    """Keep this checkpoint while it is being uploaded, until another is set ("" for none)."""
    path = run / _UPLOADING
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, name.encode())


def uploading(run: Path) -> str:
    """Return the checkpoint that must be kept because it is being uploaded."""
    return _read(run / _UPLOADING).decode(errors="replace")
