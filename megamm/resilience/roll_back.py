"""Back to a checkpoint of before some rows: choose it, and set those after it aside, so that no restart takes them."""

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megamm import checkpoint
from megamm.errors import UserError

log = logging.getLogger(__name__)


def checkpoint_before(run: Path, row: int) -> Path | None:
    """The newest valid checkpoint of which row `row` is not a part; None if there is none. Every rank calls it.

    Later ones are renamed to rolled_back-step_XXXXXXXX-N and kept for whoever looks into it.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        found[0] = _choose(run, row)
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _choose(run: Path, row: int) -> Path | None:
    folders = sorted((run / "checkpoints").glob("step_????????"), reverse=True)
    found = next((folder for folder in folders if _is_before(folder, row)), None)
    if found is not None:
        for folder in folders[: folders.index(found)]:
            number = len(list(folder.parent.glob(f"rolled_back-{folder.name}-*"))) + 1
            folder.rename(folder.with_name(f"rolled_back-{folder.name}-{number}"))
    return found


def _is_before(folder: Path, row: int) -> bool:
    try:
        checkpoint.verify(folder)
    except UserError as error:
        log.warning("passed over: %s", error)
        return False
    return checkpoint.read_state(folder).consumed_rows <= row
