"""Pending answers of a rank's writer, and their results: completed checkpoints, failures, steps in the local tier."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megamm.checkpoint.messages import Message
from megamm.checkpoint.staging import StagedFile
from megamm.checkpoint.writer import SaveAttempt
from megamm.checkpoint.writer_client import WriterProcess
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
    """A pending answer of the writer. kind: "kept" in the local tier, "replicated", "written", "published"."""

    kind: str
    job: Message
    staging: StagedFile


class PendingAnswers:
    """This rank's view of its writer's work."""

    def __init__(self, run: Path, rank: int, while_waiting: Callable[[], None]) -> None:
        """while_waiting: see Saver."""
        self.run, self.rank, self.while_waiting = run, rank, while_waiting
        self.process: WriterProcess | None = None
        self.owed: list[PendingAnswer] = []
        self.failures, self.problem, self.local_problem = 0, "", ""
        """Failed saves in a row into the run's folder, the reason of the last one, and that of the local tier."""
        self.replicated = -1
        """The newest step that a peer has."""
        self.published: list[Published] = []
        self.way = ""
        """The way in which rank 0's image was last written, as logged."""

    def start(self, first: StagedFile, message: Message, constant: Mapping[str, bytes]) -> WriterProcess:
        """Return the writer process, restarted if it has exited."""
        if self.process is None:
            self.process = WriterProcess(first.descriptor, first.size)
            self.process.send({"kind": "constant"} | message, constant)
        return self.process

    def owes(self, *kinds: str) -> bool:
        """Whether an answer of one of these kinds is pending."""
        return any(owed.kind in kinds for owed in self.owed)

    def read(self) -> list[StagedFile]:
        """Return the images that the writer may be reading."""
        return [owed.staging for owed in self.owed if owed.kind != "published"]

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
            owed = next(o for o in self.owed if (o.kind, o.job["attempt"]) == (answer["kind"], answer["attempt"]))
            self.owed.remove(owed)
            if owed.kind in ("kept", "replicated"):
                self._local(owed, answer["error"])
            elif answer["error"] is not None:
                # A failure of rank 0's own part is reported again with "published".
                if self.rank != 0 or owed.kind == "published":
                    self._failed(answer["error"], answer["step"])
            elif self.rank != 0 or owed.kind == "published":
                self.failures, self.problem = 0, ""
                if owed.kind == "published":
                    self._completed(answer)

    def _completed(self, answer: Message) -> None:
        why = answer["why_cached"]
        way = f"through the page cache: {why}" if why else "with O_DIRECT, which takes the least processor time"
        if way != self.way:
            log.info("checkpoints are written %s", way)
            self.way = way
        if "afterwards" in answer:
            log.warning("%s is complete, but a follow-up action failed: %s", answer["folder"], answer["afterwards"])
        self.published.append(Published(Path(answer["folder"]), answer["bytes"], answer["seconds"]))

    def _lost(self, how: str) -> None:
        """Handle the exit of the writer: the other writers are notified of its pending parts."""
        lost, self.process, self.owed = self.owed, None, []
        for owed in lost:
            if owed.kind == "written":
                with contextlib.suppress(OSError):
                    SaveAttempt(owed.job).give_up(how)
        for_run = [owed for owed in lost if owed.kind in ("written", "published")]
        if for_run or not lost:
            self._failed(how, for_run[-1].job["step"] if for_run else None)
        else:
            self._local_trouble(how, lost[-1].job["step"])

    def _failed(self, problem: str, step: int | None = None) -> None:
        self.failures, self.problem = self.failures + 1, problem
        if self.rank == 0:
            log.warning("a checkpoint could not be written (%d in a row): %s", self.failures, problem)
            with contextlib.suppress(OSError):  # the disk with the events may be full too
                events.record(self.run, "save_failed", step=step, why=problem)

    def _local(self, owed: PendingAnswer, error: str | None) -> None:
        """Handle an answer about the local tier; after an error the run continues without that part."""
        if error is not None:
            self._local_trouble(error, owed.job["step"])
        elif owed.kind == "kept":
            owed.staging.is_kept, self.local_problem = True, ""
        else:
            self.replicated = owed.job["step"]

    def _local_trouble(self, problem: str, step: int) -> None:
        if problem != self.local_problem:
            log.warning("local tier, step %d: %s", step, problem)
            with contextlib.suppress(OSError):
                events.record(self.run, "save_failed", step=step, why=problem, tier="local")
        self.local_problem = problem

    def close(self, grace: float) -> None:
        """End the process when it has done its jobs, or after `grace` seconds."""
        if self.process is not None:
            self.process.close(grace)
            self.process = None
