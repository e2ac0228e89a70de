"""Chooses the checkpoint to resume: the newest valid one in local storage, RUN/checkpoints and remote storage.

Every rank calls `choose` and gets the same folder. Skipped checkpoints are logged and recorded as events. A checkpoint
of remote storage is first copied into RUN/checkpoints; each rank downloads a share of the files.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megamm import checkpoint
from megamm.checkpoint import files, manifest, retention
from megamm.checkpoint.folder import aside
from megamm.checkpoint.storage.local import LocalStorage, Needed
from megamm.checkpoint.storage.remote import RemoteCheckpoints, RemoteError
from megamm.common import events
from megamm.common.collectives import Collectives
from megamm.common.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The checkpoint to resume. storage: "local", "run" or "remote" (already copied to `folder`)."""

    folder: Path
    step: int
    storage: str


@dataclass(frozen=True)
class _Candidate:
    step: int
    storage: str

    def sort_key(self) -> tuple[int, int]:
        """Sort by step, newest first, then by storage, nearest first."""
        return -self.step, ("local", "run", "remote").index(self.storage)


class _Chooser(Collectives):
    """The search, together on all ranks."""

    def __init__(self, run: Path, remote_url: str | None, local: LocalStorage | None, needed: Needed) -> None:
        super().__init__()
        self.run, self.local, self.needed = run, local, needed
        self.remote = RemoteCheckpoints(remote_url) if remote_url else None

    def candidates(self) -> list[_Candidate]:
        """Return all checkpoints in the order to try. UserError if none is found and remote storage fails."""
        local = self.local.steps() if self.local else []

        def look() -> list[_Candidate]:
            found = [_Candidate(step, "local") for step in local]
            folders = (self.run / "checkpoints").glob("step_????????")
            # Including unfinished ones: verification reports that they are damaged.
            found += [_Candidate(manifest.step_of(f.name), "run") for f in folders]
            try:
                names = self.remote.complete() if self.remote else []
            except RemoteError as error:
                if not found:
                    raise  # starting from scratch although checkpoints may exist there would be the worst result
                log.warning("resuming without remote storage: %s", error)
                events.record(self.run, "skipped_checkpoint", folder=error.where, why=error.what, tier="remote")
                names = []
            found += [_Candidate(manifest.step_of(name), "remote") for name in names]
            return sorted(found, key=_Candidate.sort_key)

        return self.on_first(look)

    def attempt(self, candidate: _Candidate) -> Path:
        """Return the complete, verified folder. The same UserError on all ranks if it is not valid."""
        name = f"step_{candidate.step:08d}"
        folder = self.run / "checkpoints" / name
        if candidate.storage == "local":
            assert self.local is not None
            return self.local.restore(candidate.step, self.needed)
        if candidate.storage == "run":
            self.on_first(lambda: checkpoint.verify(folder))
            return folder
        assert self.remote is not None
        return self._download(self.remote, name)

    def _download(self, remote: RemoteCheckpoints, name: str) -> Path:
        log.info("copying %s/%s", remote.store.url, name)
        final = self.run / "checkpoints" / name
        temporary = final.with_name(f".tmp-download-{name}")
        listed = self.on_first(lambda: remote.listed(name))
        by_size = sorted(listed, key=lambda file: (-listed[file].size, file))
        self.together(lambda: remote.download(name, temporary, by_size[self.rank :: dist.get_world_size()]))

        def publish() -> None:
            # Each rank has read the manifest at another moment: all must have used this one.
            data = remote.store.read(f"{name}/{manifest.NAME}") or b""
            if manifest.parse(data, remote.store.url) != listed:
                raise RemoteError(f"{name} was replaced while it was being copied", remote.store.url)
            retention.replace(temporary / manifest.NAME, data)
            # It was tried first (run before remote) and is damaged.
            if final.exists():
                files.rename(final, aside(final))
            temporary.rename(final)
            checkpoint.verify(final)

        self.on_first(publish)
        return final


def choose(
    run: Path, remote_url: str | None = None, local: LocalStorage | None = None, needed: Needed = lambda _: set()
) -> Choice | None:
    """Return the newest valid checkpoint; None in a fresh run. UserError if there are checkpoints but none is valid.

    remote_url: remote storage; local: this node's local storage; needed: see LocalStorage.restore.
    """
    chooser = _Chooser(run, remote_url, local, needed)
    last_error: UserError | None = None
    for candidate in chooser.candidates():
        try:
            return Choice(chooser.attempt(candidate), candidate.step, candidate.storage)
        except UserError as error:
            last_error = error
            if chooser.rank == 0:
                log.warning("skipped: %s", error)
                name = f"step_{candidate.step:08d}"
                events.record(run, "skipped_checkpoint", folder=name, why=error.what, tier=candidate.storage)
    if last_error is not None:
        raise last_error
    return None
