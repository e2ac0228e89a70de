"""Saves of one rank: copies the state into shared memory, notifies the writer process, and continues with the steps.

Weights and optimizer state change only in an update. On a CPU a thread copies them during the next step's forward and
backward pass, and `settle`, which the engine calls before its update, waits for the rest. On a GPU, and for data that
may change at any time, the copy is done when `save` returns. A save does not wait for the disk, unless the previous one
is not written yet: then the step waits for it (back-pressure), so that no more memory is needed.

With a local tier the images are files of that tier: the writer only adds their digests. Several images are used in
turn, so that a save does not wait for the run's disk either. An image is reused when no writer reads it and all ranks
have a newer step; every save begins with an exchange that tells this (`Agreed`).

A failed save is logged and skipped. The run stops, on all ranks, only after FAILURES failures in a row, or if a save
that is waited for fails.
"""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import torch.distributed as dist

from megamm.checkpoint import index
from megamm.checkpoint.manifest import STATE
from megamm.checkpoint.pending import PendingAnswer, PendingAnswers, Published
from megamm.checkpoint.rank_file import RankFile
from megamm.checkpoint.staged_files import StagedFiles
from megamm.checkpoint.staging import StagedFile
from megamm.checkpoint.state import RunState
from megamm.checkpoint.tensor_shards import TensorShard
from megamm.checkpoint.writer_client import WriterProcess
from megamm.common.device import Device
from megamm.common.errors import UserError

if TYPE_CHECKING:
    from megamm.checkpoint.storage.local import LocalStorage

FAILURES = 3
"""Number of failed saves in a row that stops the run."""
CLOSE_SECONDS = 30.0
"""Seconds to finish writing when a run ends by an error."""


@dataclass(frozen=True)
class Agreed:
    """State of all ranks. kept, replicated: newest step that all have in the local tier, and replicated, or -1.

    replicating: whether a rank is replicating.
    """

    kept: int
    replicated: int
    replicating: bool


class Saver:
    """Saves checkpoints. Every rank has one; all ranks call its methods together, except `poll` and `close`."""

    def __init__(
        self,
        run: Path,
        place: Device,
        keep: int,
        keep_best: bool = False,
        while_waiting: Callable[[], None] = lambda: None,
        local: "LocalStorage | None" = None,
    ) -> None:
        """keep, keep_best: which checkpoints to keep when a new one is complete (checkpoint/retention.py).

        while_waiting: called about twice a second while this rank waits for its writer and the writer is working.
        """
        self.run, self.place, self.keep, self.keep_best = run, place, keep, keep_best
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.local = local
        self.images: StagedFiles | None = None
        self.staging: StagedFile | None = None
        """The image of the last save."""
        self.writing = PendingAnswers(run, self.rank, while_waiting)
        self.constant: Mapping[str, bytes] = {}
        self.nonce, self.saves = "", 0
        self.replicating, self.stall = -1, 0.0
        """The last step that was sent to a peer; the seconds that the last save took."""
        self.copier = ThreadPoolExecutor(1)
        self.copying: Future[WriterProcess | None] | None = None
        self.settled = 0.0
        """Total seconds that updates have waited for copies."""

    def save(
        self,
        state: RunState,
        blocks: Sequence[TensorShard],
        rng: Mapping[str, torch.Tensor],
        wait: bool = False,
        to_run: bool = True,
    ) -> float:
        """Start a save; return the seconds that this took, `stall`. With `wait`, the save is complete on return.

        blocks: of this rank; the same list at every save, except for the data. to_run: save into the run's folder too,
        not only into the local tier. UserError on all ranks, see the module docstring.
        """
        start = time.monotonic()
        self.settle()
        images = self._prepare(blocks)
        if self.writing.owed:
            self.writing.hear(0.0)
        while self.local is None and self.writing.owes("written"):
            self.writing.wait()
        agreed = self._agree(self.writing.failures >= FAILURES)
        if self.local is not None:
            self.local.passed(agreed.replicated if self.local.replicates else agreed.kept)
        needed = {agreed.kept, agreed.replicated, self.replicating}
        self.staging = images.take(needed, self.writing.read, self.writing.wait)
        self.staging.copy(blocks, steady=False)
        contents = {f"rng_{self.rank:05d}.safetensors": safetensors.torch.save(dict(rng))}
        if self.rank == 0:
            contents[STATE] = state.to_json()
        job = self._job(state.step, to_run, agreed) | {"stall": time.monotonic() - start}
        self.staging.step = state.step
        self.copying = self.copier.submit(self._copy_and_send, self._writer(), self.staging, job, blocks, contents)
        if wait or self.place.is_gpu:
            self.settle()
        self.stall = time.monotonic() - start
        if wait:
            self.finish()
        return self.stall

    def _job(self, step: int, to_run: bool, agreed: Agreed) -> dict[str, Any]:
        """Return the writer's job for this save, and register the answers that it owes."""
        assert self.staging is not None
        self.saves += 1
        replicates = self.local is not None and self.local.replicates and not agreed.replicating
        kinds = {"kept": self.local is not None, "written": to_run, "published": to_run and self.rank == 0}
        kinds["replicated"] = replicates
        job: dict[str, Any] = {"kind": "save", "run": str(self.run.absolute()), "step": step, "keep": self.keep}
        job |= {"keep_best": self.keep_best, "rank": self.rank, "world": self.world}
        job |= {"attempt": f"{self.nonce}-{self.saves:06d}", "bytes": self.staging.image.size}
        answers = [kind for kind, is_owed in kinds.items() if is_owed]
        job |= {"image": str(self.staging.path or ""), "floor": agreed.replicated, "answers": answers}
        self.writing.owed += [PendingAnswer(kind, job, self.staging) for kind in answers]
        if replicates:
            self.replicating = step
        return job

    def _copy_and_send(
        self,
        writer: WriterProcess,
        staging: StagedFile,
        job: dict[str, Any],
        blocks: Sequence[TensorShard],
        contents: Mapping[str, bytes],
    ) -> WriterProcess | None:
        """Copy the steady blocks and send the job; return the writer if it has exited."""
        staging.copy(blocks, steady=True)
        try:
            writer.send(job, contents)
        except BrokenPipeError:
            return writer
        return None

    def settle(self) -> None:
        """Wait until steady blocks may be changed. It is the engine's `before_update`; call it before a load too."""
        if self.copying is not None:
            start = time.monotonic()
            copying, self.copying = self.copying, None
            gone = copying.result()
            self.settled += time.monotonic() - start
            if gone is not None and gone is self.writing.process:
                self.writing.wait()  # for its exit code

    def _prepare(self, blocks: Sequence[TensorShard]) -> StagedFiles:
        """Create the images, and at the first save the index of all ranks, which stays the same."""
        if self.images is not None:
            return self.images
        image = RankFile.of(blocks, f"__{self.rank}_0.distcp")
        # Together with a counter this gives every save a name that is unique over all attempts of the run.
        told: list[Any] = [None] * self.world
        dist.all_gather_object(told, (uuid.uuid4().hex[:12], image.entries))
        self.nonce = told[0][0]
        if self.rank == 0:
            made = index.files_of(entry for _, entries in told for entry in entries)
            self.constant = {f"tensors/{name}": data for name, data in made.items()}
        self.images = StagedFiles(image, self.place, self.local, self.rank)
        return self.images

    def _writer(self) -> WriterProcess:
        """Return the writer process, restarted if it has exited."""
        assert self.images is not None
        told = {} if self.local is None else {"local": self.local.told_to_writers}
        return self.writing.start(self.images.all[0], told, self.constant)

    def poll(self) -> list[Published]:
        """Return the checkpoints completed since the last call (on rank 0 only). It is cheap: call it at every step."""
        if self.writing.owed and (self.copying is None or self.copying.done()):
            self.settle()
            self.writing.hear(0.0)
        done, self.writing.published = self.writing.published, []
        return done

    def finish(self) -> None:
        """Wait until the last save is complete. UserError on all ranks if it failed."""
        self.drain(failures=1)

    def drain(self, failures: int = FAILURES) -> None:
        """Wait until no rank's writer is working. UserError on all ranks after `failures` failures in a row."""
        self.settle()
        while self.writing.owes("kept", "written", "published"):
            self.writing.wait()
        self._agree(self.writing.failures >= failures)

    def forget(self) -> None:
        """Prepare for a roll-back: invalidate all images, after the transfers to peers are done."""
        self.settle()
        while self.writing.owed:
            self.writing.wait()
        for image in self.images.all if self.images is not None else []:
            image.step, image.is_kept = -1, False
        self.replicating = self.writing.replicated = -1

    def _agree(self, stop: bool) -> Agreed:
        """Return the state of all ranks; raise UserError on all of them if one wants to stop."""
        kept = self.images.kept if self.images is not None else -1
        said = [stop, self.writing.owes("replicated"), -kept, -self.writing.replicated]
        vote = torch.tensor(said, dtype=torch.int64, device=self.place.torch_device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        stops, replicates, *least = vote.tolist()
        if not stops:
            return Agreed(-least[0], -least[1], bool(replicates))
        # All ranks do this together: if another rank exited first, the job could end before rank 0 reports why.
        self.close()
        problems: list[Any] = [None] * self.world
        dist.all_gather_object(problems, self.writing.problem)
        raise UserError(
            f"the checkpoint could not be written: {next(p for p in problems if p)}",
            where=self.run / "checkpoints",
            remedy="free disk space or choose another `output`; earlier checkpoints are unchanged",
            on_all_ranks=True,
        )

    def close(self) -> None:
        """Stop the writer after it has completed its current writes."""
        self.settle()
        self.copier.shutdown()
        self.writing.close(CLOSE_SECONDS)
        if self.images is not None:
            self.images.close()
            self.images = self.staging = None


def save_now(
    run: Path,
    state: RunState,
    blocks: Sequence[TensorShard],
    rng: Mapping[str, torch.Tensor],
    place: Device,
    keep: int = 1,
) -> None:
    """Write one checkpoint; it is complete on return. Every rank calls it; UserError on all of them if it fails."""
    saver = Saver(run, place, keep)
    try:
        saver.save(state, blocks, rng, wait=True)
    finally:
        saver.close()
