"""Saves of one rank: copy the state into shared memory, tell the writer process, go on with the steps.

Weights and optimizer state change at an update alone: on a CPU a thread copies them while the next step's forward and
backward go on, and `settle`, which the engine calls before its update, waits for what is left. On a GPU, and of what
may change at any time, the copy is done when `save` returns. A save waits for no disk, unless the one before is not
written yet: then the step waits for it (back-pressure), and no more memory is taken.

A save that fails is told and left out; only FAILURES in a row, or a failure of one that is waited for, stop the run, on
all ranks.
"""

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist

from megamm.checkpoint import index
from megamm.checkpoint.blocks import Block
from megamm.checkpoint.folder import STATE
from megamm.checkpoint.image import Image
from megamm.checkpoint.process import WriterProcess
from megamm.checkpoint.staging import Staging
from megamm.checkpoint.state import RunState
from megamm.checkpoint.writer import Attempt
from megamm.device import Device
from megamm.errors import UserError
from megamm.resilience import events

log = logging.getLogger(__name__)
FAILURES = 3
"""Saves in a row that may fail before the run stops."""
CLOSE_SECONDS = 30.0
"""For what is being written when a run ends by an error."""


@dataclass(frozen=True)
class Published:
    """A checkpoint that is complete: its folder, bytes in all, seconds of the writer."""

    folder: Path
    bytes: int
    seconds: float


class Saver:
    """Every rank makes one and calls every method but `poll` and `close` at the same time as the others."""

    def __init__(
        self,
        run: Path,
        place: Device,
        keep: int,
        keep_best: bool = False,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """keep, keep_best: which checkpoints stay when a new one is complete (tiers/retention.py).

        while_waiting: called about twice a second while this rank waits for its writer and that is at work.
        """
        self.while_waiting = while_waiting
        self.run, self.place, self.keep, self.keep_best = run, place, keep, keep_best
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.staging: Staging | None = None
        self.writer: WriterProcess | None = None
        self.constant: Mapping[str, bytes] = {}
        self.nonce, self.saves = "", 0
        self.job: dict[str, Any] = {}
        self.awaited: list[str] = []
        """Answers that the writer owes, in order, the last of them to `job`."""
        self.failures, self.problem, self.stall = 0, "", 0.0
        self.copier = ThreadPoolExecutor(1)
        self.copying: Future[WriterProcess | None] | None = None
        self.settled = 0.0
        """Seconds in all that updates have waited for copies."""
        self.published: list[Published] = []

    def save(
        self, state: RunState, blocks: Sequence[Block], rng: Mapping[str, torch.Tensor], wait: bool = False
    ) -> float:
        """Begin to save; returns the seconds that it took, `stall`. With `wait`, it is complete at the return.

        blocks: of this rank, the same list at every save but for the data. UserError on all ranks, see above.
        """
        start = time.monotonic()
        self.settle()
        self._prepare(blocks)
        assert self.staging is not None
        while "written" in self.awaited:
            self._hear(None)
        self._agree(self.failures >= FAILURES)
        self.staging.copy(blocks, steady=False)
        contents = {f"rng_{self.rank:05d}.safetensors": safetensors.torch.save(dict(rng))}
        if self.rank == 0:
            contents[STATE] = state.to_json()
        self.saves += 1
        self.job = {"kind": "save", "run": str(self.run.absolute()), "step": state.step, "keep": self.keep}
        self.job |= {"keep_best": self.keep_best}
        self.job |= {"attempt": f"{self.nonce}-{self.saves:06d}", "bytes": self.staging.image.size}
        self.job |= {"rank": self.rank, "world": self.world, "stall": time.monotonic() - start}
        self.awaited += ["written", "published"] if self.rank == 0 else ["written"]
        writer = self._writer()
        self.copying = self.copier.submit(self._copy_and_send, writer, blocks, contents)
        if wait or self.place.is_gpu:
            self.settle()
        self.stall = time.monotonic() - start
        if wait:
            self.finish()
        return self.stall

    def _copy_and_send(
        self, writer: WriterProcess, blocks: Sequence[Block], contents: Mapping[str, bytes]
    ) -> WriterProcess | None:
        """The writer, if it has ended."""
        assert self.staging is not None
        self.staging.copy(blocks, steady=True)
        try:
            writer.send(self.job, contents)
        except BrokenPipeError:
            return writer
        return None

    def settle(self) -> None:
        """Wait until steady blocks may be changed: an engine's `before_update`, and to be called before a load."""
        if self.copying is not None:
            start = time.monotonic()
            copying, self.copying = self.copying, None
            gone = copying.result()
            self.settled += time.monotonic() - start
            if gone is not None and gone is self.writer:
                self._hear(None)  # how it ended

    def _prepare(self, blocks: Sequence[Block]) -> None:
        """At the first save: the plan of all ranks, which stays the same."""
        if self.staging is not None:
            return
        image = Image.of(blocks, f"__{self.rank}_0.distcp")
        # Together with its count this names a save as no other attempt of the run has.
        told: list[Any] = [None] * self.world
        dist.all_gather_object(told, (uuid.uuid4().hex[:12], image.entries))
        self.nonce = told[0][0]
        if self.rank == 0:
            made = index.files_of(entry for _, entries in told for entry in entries)
            self.constant = {f"tensors/{name}": data for name, data in made.items()}
        self.staging = Staging(image, self.place)

    def _writer(self) -> WriterProcess:
        """The process, started again if it ended."""
        assert self.staging is not None
        if self.writer is None:
            self.writer = WriterProcess(self.staging.descriptor, self.staging.size)
            self.writer.send({"kind": "constant"}, self.constant)
        return self.writer

    def poll(self) -> list[Published]:
        """What was completed since the last call (rank 0 alone knows). Costs microseconds: call it at every step."""
        if self.awaited and (self.copying is None or self.copying.done()):
            self.settle()
            self._hear(0.0)
        done, self.published = self.published, []
        return done

    def _hear(self, seconds: float | None) -> None:
        """Take the writer's answers; waits that long for some."""
        if self.writer is None:
            return
        try:
            answers = self.writer.answers(seconds)
        except EOFError as error:
            self.writer, self.awaited = None, []
            with contextlib.suppress(OSError):
                Attempt(self.job).give_up(str(error))
            self._failed(str(error), self.job["step"])
            return
        for answer in answers:
            if answer["kind"] == "alive":
                if seconds is None:
                    self.while_waiting()
                continue
            self.awaited.remove(answer["kind"])
            if answer["error"] is not None:
                # Rank 0's own part is told again with the whole.
                if self.rank != 0 or answer["kind"] == "published":
                    self._failed(answer["error"], answer["step"])
            elif not self.awaited or answer["kind"] == "published":
                self.failures, self.problem = 0, ""
                if answer["kind"] == "published":
                    self._completed(answer)

    def _completed(self, answer: dict[str, Any]) -> None:
        if "afterwards" in answer:
            log.warning("%s is complete, but: %s", answer["folder"], answer["afterwards"])
        self.published.append(Published(Path(answer["folder"]), answer["bytes"], answer["seconds"]))

    def _failed(self, problem: str, step: int | None = None) -> None:
        self.failures, self.problem = self.failures + 1, problem
        if self.rank == 0:
            log.warning("a checkpoint could not be written (%d in a row): %s", self.failures, problem)
            with contextlib.suppress(OSError):  # it may be the disk of the events that is full
                events.record(self.run, "save_failed", step=step, why=problem)

    def finish(self) -> None:
        """Wait until what was saved last is complete. UserError on all ranks if it is not."""
        self.drain(failures=1)

    def drain(self, failures: int = FAILURES) -> None:
        """Wait until no rank's writer is at work. UserError on all ranks after that many failures in a row."""
        self.settle()
        while self.awaited:
            self._hear(None)
        self._agree(self.failures >= failures)

    def _agree(self, stop: bool) -> None:
        """Raise on all ranks if one wants to stop."""
        vote = torch.tensor([int(stop)], device=self.place.torch_device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        if not vote.item():
            return
        # Here, in step: a rank that ended before rank 0 could end the job before that has told why.
        self.close()
        problems: list[Any] = [None] * self.world
        dist.all_gather_object(problems, self.problem)
        raise UserError(
            f"the checkpoint could not be written: {next(p for p in problems if p)}",
            where=self.run / "checkpoints",
            remedy="free disk space or choose another `output`; earlier checkpoints are untouched",
            on_all_ranks=True,
        )

    def close(self) -> None:
        """End the writer when it is done; what it still writes, it may complete."""
        self.settle()
        self.copier.shutdown()
        if self.writer is not None:
            self.writer.close(CLOSE_SECONDS)
            self.writer = None
        if self.staging is not None:
            self.staging.close()
            self.staging = None


def save_now(
    run: Path, state: RunState, blocks: Sequence[Block], rng: Mapping[str, torch.Tensor], place: Device, keep: int = 1
) -> None:
    """Write one checkpoint, complete at the return. Every rank calls it; UserError on all of them if it fails."""
    saver = Saver(run, place, keep)
    try:
        saver.save(state, blocks, rng, wait=True)
    finally:
        saver.close()
