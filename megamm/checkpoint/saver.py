"""Saves of one rank: copies the state into shared memory, notifies the writer process, and continues with the steps.

Weights and optimizer state change only in an update. On a CPU a thread copies them during the next step's forward and
backward pass, and `settle`, which the engine calls before its update, waits for the rest. On a GPU, and for data that
may change at any time, the copy is done when `save` returns. A save does not wait for the disk, unless the previous one
is not written yet: then the step waits for it (back-pressure), so that no more memory is needed.

With local storage the staged files are files there: the writer only adds their digests. Several are used in turn, so
that a save does not wait for the run's disk either. One is reused when no writer reads it and all ranks have a newer
step; every save begins with an exchange of these steps (`Agreed`).

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
from megamm.checkpoint.pending import PendingAnswer, PendingSaves, Published
from megamm.checkpoint.rank_file import RankFile
from megamm.checkpoint.staging import StagedFile, StagedFiles
from megamm.checkpoint.state import TrainState
from megamm.checkpoint.tensor_shards import TensorShard
from megamm.checkpoint.writer_client import Message, WriterProcess
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
    """State of all ranks.

    saved_locally, replicated: newest step that all ranks have in local storage, and replicated there, or -1.
    is_replicating: whether a rank is replicating.
    """

    saved_locally: int
    replicated: int
    is_replicating: bool


class Saver:
    """Saves checkpoints. Every rank has one; all ranks call its methods together, except `poll` and `close`."""

    def __init__(
        self,
        run: Path,
        device: Device,
        keep: int,
        keep_best: bool = False,
        while_waiting: Callable[[], None] = lambda: None,
        local: "LocalStorage | None" = None,
    ) -> None:
        """keep, keep_best: which checkpoints to keep when a new one is complete (checkpoint/retention.py).

        while_waiting: called about twice a second while this rank waits for its writer and the writer is working.
        """
        self.run, self.device, self.keep, self.keep_best = run, device, keep, keep_best
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.local = local
        self.staged_files: StagedFiles | None = None
        self.staged: StagedFile | None = None
        """The staged file of the last save."""
        self.pending = PendingSaves(run, self.rank, while_waiting)
        self.constant: Mapping[str, bytes] = {}
        """Files that are the same in every save: on rank 0, the index."""
        self.nonce, self.saves = "", 0
        self.replicating = -1
        """The last step that was sent to a peer."""
        self.copier = ThreadPoolExecutor(1)
        self.copying: Future[WriterProcess | None] | None = None

    def save(
        self,
        state: TrainState,
        shards: Sequence[TensorShard],
        rng: Mapping[str, torch.Tensor],
        wait: bool = False,
        to_run: bool = True,
    ) -> None:
        """Start a save. With `wait`, it is complete on return.

        shards: of this rank; the same list at every save, except for the data. to_run: save into the run's folder too,
        not only into local storage. UserError on all ranks, see the module docstring.

            rank (this method)                its writer, three threads         rank 0's writer
            ------------------                -------------------------         ---------------
            settle: the previous copy
            wait for its "written" (*)
            agree with all ranks
            take a staged file
            copy what may always change
            save returns (on a CPU)
            copy the steady shards
            send the job -------------------> digests, part record
              <------------ saved_locally ---
                                              send the files to a peer
              <--------------- replicated ---
                                              write the rank's files
                                              write R.json -------------------> wait for every rank's R.json
              <------------------ written ---                                   write the manifest, rename
              <-------------------------------------------------- published --- (to rank 0 only)

        (*) only without local storage. There, `take` waits until a staged file is free.
        """
        start = time.monotonic()
        self.settle()
        staged_files = self._prepare(shards)
        if self.pending.answers:
            self.pending.hear(0.0)
        while self.local is None and self.pending.awaits("written"):
            self.pending.wait()
        agreed = self._agree(self.pending.failures >= FAILURES)
        if self.local is not None:
            self.local.passed(agreed.replicated if self.local.replicates else agreed.saved_locally)
        # A resume needs a step that all ranks have: its files stay until all have a newer one.
        needed = {agreed.saved_locally, agreed.replicated, self.replicating}
        self.staged = staged_files.take(needed, self.pending.in_use, self.pending.wait)
        self.staged.copy(shards, steady=False)
        contents = {f"rng_{self.rank:05d}.safetensors": safetensors.torch.save(dict(rng))}
        if self.rank == 0:
            contents[STATE] = state.to_json()
        job = self._job(state.step, to_run, agreed) | {"stall": time.monotonic() - start}
        self.staged.step = state.step
        self.copying = self.copier.submit(self._copy_and_send, self._process(), self.staged, job, shards, contents)
        if wait or self.device.is_gpu:
            self.settle()
        if wait:
            self.finish()

    def _job(self, step: int, to_run: bool, agreed: Agreed) -> Message:
        """Return the writer's job for this save, and register the answers that will come."""
        assert self.staged is not None
        self.saves += 1
        # One replication at a time on all ranks: if the network is slower than the saves, steps in between have none.
        replicates = self.local is not None and self.local.replicates and not agreed.is_replicating
        is_expected = {
            "saved_locally": self.local is not None,
            "written": to_run,
            "published": to_run and self.rank == 0,
            "replicated": replicates,
        }
        answers = [kind for kind, expected in is_expected.items() if expected]
        job: Message = {
            "kind": "save",
            "run": str(self.run.absolute()),
            "step": step,
            "keep": self.keep,
            "keep_best": self.keep_best,
            "rank": self.rank,
            "world": self.world,
            "attempt": f"{self.nonce}-{self.saves:06d}",
            "bytes": self.staged.layout.size,
            "staged": str(self.staged.path or ""),
            "floor": agreed.replicated,
            "answers": answers,
        }
        self.pending.answers += [PendingAnswer(kind, job, self.staged) for kind in answers]
        if replicates:
            self.replicating = step
        return job

    def _copy_and_send(
        self,
        writer: WriterProcess,
        staged: StagedFile,
        job: Message,
        shards: Sequence[TensorShard],
        contents: Mapping[str, bytes],
    ) -> WriterProcess | None:
        """Copy the steady shards and send the job; return the writer if it has exited."""
        staged.copy(shards, steady=True)
        try:
            writer.send(job, contents)
        except BrokenPipeError:
            return writer
        return None

    def settle(self) -> None:
        """Wait until steady shards may be changed. It is the engine's `before_update`; call it before a load too."""
        if self.copying is not None:
            copying, self.copying = self.copying, None
            gone = copying.result()
            if gone is not None and gone is self.pending.process:
                self.pending.wait()  # for its exit code

    def _prepare(self, shards: Sequence[TensorShard]) -> StagedFiles:
        """Create the staged files, and at the first save the index of all ranks, which stays the same."""
        if self.staged_files is not None:
            return self.staged_files
        layout = RankFile.of(shards, f"__{self.rank}_0.distcp")
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, (uuid.uuid4().hex[:12], layout.entries))
        # Together with a counter this gives every save a name that is unique over all attempts of the run.
        self.nonce = gathered[0][0]
        if self.rank == 0:
            made = index.files_of(entry for _, entries in gathered for entry in entries)
            self.constant = {f"tensors/{name}": data for name, data in made.items()}
        self.staged_files = StagedFiles(layout, self.device, self.local, self.rank)
        return self.staged_files

    def _process(self) -> WriterProcess:
        """Return the writer process, restarted if it has exited."""
        assert self.staged_files is not None
        message = {} if self.local is None else {"local": self.local.writer_settings}
        return self.pending.start(self.staged_files.all[0], message, self.constant)

    def poll(self) -> list[Published]:
        """Return the checkpoints completed since the last call (on rank 0 only). It is cheap: call it at every step."""
        if self.pending.answers and (self.copying is None or self.copying.done()):
            self.settle()
            self.pending.hear(0.0)
        done, self.pending.published = self.pending.published, []
        return done

    def finish(self) -> None:
        """Wait until the last save is complete. UserError on all ranks if it failed."""
        self.drain(failures=1)

    def drain(self, failures: int = FAILURES) -> None:
        """Wait until no rank's writer is working. UserError on all ranks after `failures` failures in a row."""
        self.settle()
        while self.pending.awaits("saved_locally", "written", "published"):
            self.pending.wait()
        self._agree(self.pending.failures >= failures)

    def forget(self) -> None:
        """Prepare for a roll-back: invalidate all staged files, after the transfers to peers are done."""
        self.settle()
        while self.pending.answers:
            self.pending.wait()
        for staged in self.staged_files.all if self.staged_files is not None else []:
            staged.step, staged.is_saved_locally = -1, False
        self.replicating = self.pending.replicated = -1

    def _agree(self, stop: bool) -> Agreed:
        """Return the state of all ranks; raise UserError on all of them if one wants to stop."""
        saved = self.staged_files.saved_locally if self.staged_files is not None else -1
        # One reduction for all: the maximum of the negated steps is the minimum over the ranks.
        own = [stop, self.pending.awaits("replicated"), -saved, -self.pending.replicated]
        vote = torch.tensor(own, dtype=torch.int64, device=self.device.torch_device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        stops, replicates, *least = vote.tolist()
        if not stops:
            return Agreed(-least[0], -least[1], bool(replicates))
        # All ranks do this together: if another rank exited first, the job could end before rank 0 reports why.
        self.close()
        problems: list[Any] = [None] * self.world
        dist.all_gather_object(problems, self.pending.problem)
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
        self.pending.close(CLOSE_SECONDS)
        if self.staged_files is not None:
            self.staged_files.close()
            self.staged_files = self.staged = None
