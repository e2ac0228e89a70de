"""Chooses the checkpoint to resume: the newest valid one in the local tier, RUN/checkpoints and the durable tier.

Every rank calls `choose` and gets the same folder. Skipped checkpoints are logged and recorded as events. A checkpoint
of the durable tier is first copied into RUN/checkpoints; each rank downloads a share of the files.
"""

import datetime
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megamm import checkpoint
from megamm.checkpoint import files, manifest, retention
from megamm.checkpoint.folder import aside
from megamm.checkpoint.storage.local import LocalStorage, Needed
from megamm.checkpoint.storage.remote import RemoteError
from megamm.checkpoint.storage.upload import RemoteCheckpoints
from megamm.common import events
from megamm.common.errors import UserError

log = logging.getLogger(__name__)
_PATIENCE = datetime.timedelta(hours=6)
"""Time that ranks wait for each other here: a share of a large checkpoint may come over a slow network."""


@dataclass(frozen=True)
class Choice:
    """The checkpoint to resume. tier: "local", "run" or "durable" (already copied to `folder`)."""

    folder: Path
    step: int
    tier: str


@dataclass(frozen=True)
class _Candidate:
    step: int
    tier: str

    def sort_key(self) -> tuple[int, int]:
        """Sort by step, newest first, then by tier, nearest first."""
        return -self.step, ("local", "run", "durable").index(self.tier)


class Ranks:
    """Collective operations without a short timeout; every rank calls every method."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self.rank = dist.get_rank()

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Run the action on rank 0; all ranks return its result or raise its UserError."""
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = action()
            except UserError as error:
                told[1] = _told(error)
        dist.broadcast_object_list(told, src=0, group=self.group)
        if told[1] is not None:
            raise UserError(**told[1], on_all_ranks=True)
        return told[0]

    def together(self, action: Callable[[], Any]) -> Any:
        """Run the action on every rank; return this rank's result. If one fails, all raise the first rank's error."""
        result, problem = None, None
        try:
            result = action()
        except UserError as error:
            problem = _told(error)
        problems: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem, group=self.group)
        first = next((p for p in problems if p), None)
        if first is not None:
            raise UserError(**first, on_all_ranks=True)
        return result


class _Chooser(Ranks):
    """The search, together on all ranks."""

    def __init__(self, run: Path, durable: str | None, local: LocalStorage | None, needed: Needed) -> None:
        super().__init__()
        self.run, self.local, self.needed = run, local, needed
        self.durable = RemoteCheckpoints(durable) if durable else None

    def candidates(self) -> list[_Candidate]:
        """Return the checkpoints of all tiers in the order to try. UserError if none is found and a tier fails."""
        local = self.local.steps() if self.local else []

        def look() -> list[_Candidate]:
            found = [_Candidate(step, "local") for step in local]
            folders = (self.run / "checkpoints").glob("step_????????")
            # Including unfinished ones: verification reports that they are damaged.
            found += [_Candidate(manifest.step_of(f.name), "run") for f in folders]
            try:
                names = self.durable.complete() if self.durable else []
            except RemoteError as error:
                if not found:
                    raise  # starting from scratch although checkpoints may exist there would be the worst result
                log.warning("resuming without the durable tier: %s", error)
                events.record(self.run, "skipped_checkpoint", folder=error.where, why=error.what, tier="durable")
                names = []
            return sorted(
                [*found, *(_Candidate(manifest.step_of(n), "durable") for n in names)], key=_Candidate.sort_key
            )

        return self.on_first(look)

    def attempt(self, candidate: _Candidate) -> Path:
        """Return the complete, verified folder. The same UserError on all ranks if it is not valid."""
        name = f"step_{candidate.step:08d}"
        folder = self.run / "checkpoints" / name
        if candidate.tier == "local":
            assert self.local is not None
            return self.local.restore(candidate.step, self.needed)
        if candidate.tier == "run":
            self.on_first(lambda: checkpoint.verify(folder))
            return folder
        assert self.durable is not None
        return self._download(self.durable, name)

    def _download(self, tier: RemoteCheckpoints, name: str) -> Path:
        log.info("copying %s/%s", tier.remote.url, name)
        final = self.run / "checkpoints" / name
        temporary = final.with_name(f".tmp-download-{name}")
        listed = self.on_first(lambda: tier.listed(name))
        by_size = sorted(listed, key=lambda file: (-listed[file].size, file))
        self.together(lambda: tier.download(name, temporary, by_size[self.rank :: dist.get_world_size()]))

        def publish() -> None:
            data = tier.remote.read(f"{name}/{manifest.NAME}") or b""
            if manifest.parse(data, tier.remote.url) != listed:
                raise RemoteError(f"{name} was replaced while it was being copied", tier.remote.url)
            retention.replace(temporary / manifest.NAME, data)
            if final.exists():
                files.rename(final, aside(final))
            temporary.rename(final)
            checkpoint.verify(final)

        self.on_first(publish)
        return final


def choose(
    run: Path, durable: str | None = None, local: LocalStorage | None = None, needed: Needed = lambda _: set()
) -> Choice | None:
    """Return the newest valid checkpoint; None in a fresh run. UserError if there are checkpoints but none is valid.

    durable: URL of that tier; local: this node's tier; needed: see LocalStorage.restore.
    """
    chooser = _Chooser(run, durable, local, needed)
    last_error: UserError | None = None
    for candidate in chooser.candidates():
        try:
            return Choice(chooser.attempt(candidate), candidate.step, candidate.tier)
        except UserError as error:
            last_error = error
            if chooser.rank == 0:
                log.warning("skipped: %s", error)
                name = f"step_{candidate.step:08d}"
                events.record(run, "skipped_checkpoint", folder=name, why=error.what, tier=candidate.tier)
    if last_error is not None:
        raise last_error
    return None


def _told(error: UserError) -> dict[str, Any]:
    return {"what": error.what, "where": error.where and str(error.where), "remedy": error.remedy}
