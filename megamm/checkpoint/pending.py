"""Pending answers of a rank's writer, and their results: completed checkpoints, failures, steps in local storage."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megamm.checkpoint.staging import StagedFile
from megamm.checkpoint.writer import SaveAttempt
from megamm.checkpoint.writer_client import Message, WriterProcess
from megamm.common import events

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """A completed checkpoint: its folder, total bytes, seconds of the writer."""

    folder: Path
    bytes: int
    seconds: float


@dataclass(frozen=True)
class PendingAnswer:
    """An answer that the writer will send to a job. kind: "saved_locally", "replicated", "written", "published"."""

    kind: str
    job: Message
    staged: StagedFile


class PendingSaves:
    """This rank's saves that its writer process is working on."""

    def __init__(self, run: Path, rank: int, while_waiting: Callable[[], None]) -> None:
        """while_waiting: see Saver."""
        self.run, self.rank, self.while_waiting = run, rank, while_waiting
        self.process: WriterProcess | None = None
        self.answers: list[PendingAnswer] = []
        self.handlers: dict[str, Callable[[PendingAnswer, Message], None]] = {
            "saved_locally": self._on_saved_locally,
            "replicated": self._on_replicated,
            "written": self._on_written,
            "published": self._on_published,
        }
        self.failures, self.problem, self.local_problem = 0, "", ""
        """Failed saves in a row into the run's folder, the reason of the last one, and that of local storage."""
        self.replicated = -1
        """The newest step that a peer has."""
        self.published: list[Published] = []
        self.way = ""
        """The way in which rank 0's file was last written, as logged."""

    def start(self, first: StagedFile, message: Message, constant: Mapping[str, bytes]) -> WriterProcess:
        """Return the writer process, restarted if it has exited."""
        if self.process is None:
            self.process = WriterProcess(first.descriptor, first.size)
            # Once per process: later jobs contain only what changes from save to save.
            self.process.send({"kind": "constant"} | message, constant)
        return self.process

    def awaits(self, *kinds: str) -> bool:
        """Whether an answer of one of these kinds is pending."""
        return any(answer.kind in kinds for answer in self.answers)

    def in_use(self) -> list[StagedFile]:
        """Return the staged files that the writer may be reading."""
        # "published" alone reads no staged file: rank 0's own file is written by then.
        return [answer.staged for answer in self.answers if answer.kind != "published"]

    def wait(self) -> None:
        """Wait for an answer."""
        self.hear(None)

    def hear(self, seconds: float | None) -> None:
        """Process the writer's answers; wait up to `seconds` (None: for ever) for one."""
        if self.process is None:
            return
        try:
            answers = self.process.answers(seconds)
        except EOFError as error:
            self._lost(str(error))
            return
        for answer in answers:
            if answer["kind"] == "alive":
                if seconds is None:
                    self.while_waiting()
                continue
            key = answer["kind"], answer["attempt"]
            pending = next(p for p in self.answers if (p.kind, p.job["attempt"]) == key)
            self.answers.remove(pending)
            self.handlers[pending.kind](pending, answer)

    def _on_saved_locally(self, pending: PendingAnswer, answer: Message) -> None:
        if answer["error"] is not None:
            self._failed_locally(answer["error"], pending.job["step"])
        else:
            pending.staged.is_saved_locally, self.local_problem = True, ""

    def _on_replicated(self, pending: PendingAnswer, answer: Message) -> None:
        if answer["error"] is not None:
            self._failed_locally(answer["error"], pending.job["step"])
        else:
            self.replicated = pending.job["step"]

    def _on_written(self, pending: PendingAnswer, answer: Message) -> None:
        # Rank 0 has one more answer to come, "published", which also repeats a failure of its own part.
        if self.rank != 0:
            self._count(answer)

    def _on_published(self, pending: PendingAnswer, answer: Message) -> None:
        self._count(answer)
        if answer["error"] is not None:
            return
        why = answer["why_cached"]
        way = f"through the page cache: {why}" if why else "with O_DIRECT, which takes the least processor time"
        if way != self.way:
            log.info("checkpoints are written %s", way)
            self.way = way
        if "afterwards" in answer:
            log.warning("%s is complete, but a follow-up action failed: %s", answer["folder"], answer["afterwards"])
        self.published.append(Published(Path(answer["folder"]), answer["bytes"], answer["seconds"]))

    def _count(self, answer: Message) -> None:
        """Count the failures in a row into the run's folder, each save once on every rank."""
        if answer["error"] is not None:
            self._failed(answer["error"], answer["step"])
        else:
            self.failures, self.problem = 0, ""

    def _lost(self, how: str) -> None:
        """Handle the exit of the writer: the other writers are notified of its pending parts."""
        lost, self.process, self.answers = self.answers, None, []
        for pending in lost:
            if pending.kind == "written":
                with contextlib.suppress(OSError):
                    SaveAttempt(pending.job).give_up(how)
        for_run = [pending for pending in lost if pending.kind in ("written", "published")]
        # A writer that exits between two saves counts as a failed save too: the run ends after some of them in a row.
        if for_run or not lost:
            self._failed(how, for_run[-1].job["step"] if for_run else None)
        else:
            self._failed_locally(how, lost[-1].job["step"])

    def _failed(self, problem: str, step: int | None = None) -> None:
        self.failures, self.problem = self.failures + 1, problem
        if self.rank == 0:
            log.warning("a checkpoint could not be written (%d in a row): %s", self.failures, problem)
            with contextlib.suppress(OSError):  # the disk with the events may be full too
                events.record(self.run, "save_failed", step=step, why=problem)

    def _failed_locally(self, problem: str, step: int) -> None:
        """Log a failure of local storage, the same one once; the run continues without that part."""
        if problem != self.local_problem:
            log.warning("local storage, step %d: %s", step, problem)
            with contextlib.suppress(OSError):
                events.record(self.run, "save_failed", step=step, why=problem, tier="local")
        self.local_problem = problem

    def close(self, grace: float) -> None:
        """End the process when it has done its jobs, or after `grace` seconds."""
        if self.process is not None:
            self.process.close(grace)
            self.process = None
