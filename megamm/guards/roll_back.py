"""Roll-back to a checkpoint from before some rows: chooses it, and renames later ones, so that no restart uses them."""

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megamm import checkpoint
from megamm.checkpoint import manifest, retention
from megamm.checkpoint.storage.remote import RemoteCheckpoints, RemoteError
from megamm.common.errors import UserError

log = logging.getLogger(__name__)


def checkpoint_before(run: Path, row: int, remote_url: str | None, keep_best: bool) -> Path | None:
    """Return the newest valid checkpoint from before row `row`; None if there is none. Every rank calls it.

    Later ones are renamed to rolled_back-step_XXXXXXXX-N and kept for inspection; in remote storage
    (remote_url, to which nothing may be uploaded meanwhile) they are withdrawn. UserError on all ranks if it does not
    respond.
    """
    shared: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            shared[0] = _choose(run, row, remote_url)
            retention.renew(run, keep_best)
        except RemoteError as error:
            shared[1] = {"what": f"cannot roll back: {error.what}", "where": error.where, "remedy": error.remedy}
    dist.broadcast_object_list(shared, src=0)
    if shared[1] is not None:
        # If the newer ones stayed, a restart would undo the roll-back. This error ends the run before the roll-back.
        raise UserError(**shared[1], on_all_ranks=True, is_transient=True)
    return shared[0]


def _choose(run: Path, row: int, remote_url: str | None) -> Path | None:
    folders = sorted((run / "checkpoints").glob("step_????????"), reverse=True)
    found = next((folder for folder in folders if _is_before(folder, row)), None)
    if found is None:
        return None
    if remote_url:
        remote = RemoteCheckpoints(remote_url)
        for name in remote.complete():
            if manifest.step_of(name) > manifest.step_of(found.name):
                remote.withdraw(name)
                log.info("withdrew %s from %s", name, remote.store.url)
    for folder in folders[: folders.index(found)]:
        number = len(list(folder.parent.glob(f"rolled_back-{folder.name}-*"))) + 1
        folder.rename(folder.with_name(f"rolled_back-{folder.name}-{number}"))
    return found


def _is_before(folder: Path, row: int) -> bool:
    try:
        checkpoint.verify(folder)
    except UserError as error:
        log.warning("skipped: %s", error)
        return False
    return checkpoint.read_state(folder).consumed_rows <= row
