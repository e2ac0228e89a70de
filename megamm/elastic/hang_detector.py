"""Hang detection: when a rank is overdue, where every rank is at that time, and which rank the others wait for.

A rank sends a heartbeat at every step, evaluation batch and change of phase. It is overdue when it has been silent for
longer than twice its longest recent time between heartbeats plus resilience.hang_seconds. If that time is not known,
that is, before the first steps of a launch are done, the limit is resilience.startup_seconds. For the first evaluation
and the first checkpoint after it the limit is _FIRST_FACTOR times the longest time known so far, plus hang_seconds.
Before the first step of a restart, silence in an attempt that failed counts as a usual time too: a node that has become
slow gets twice as long at the next attempt, instead of the same limit again and again.

Stacks are written by faulthandler's signal handler in C, which needs no GIL. A rank waits for the innermost function of
the communication layers in its stack. On a GPU the stack says nothing about that: the flight recorder does
(flight_record.py). While a rank of any node waits for its checkpoint writer, and the writer reports
that it is working (phase "wait"), no rank is overdue: the others wait for that rank. The same holds while a rank
compiles, which it reports (heartbeat.py), for at most resilience.startup_seconds; this time is not counted.
"""

import contextlib
import math
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from megamm.common import processes
from megamm.elastic import flight_record, heartbeat
from megamm.elastic.rank import DUMP_SIGNAL
from megamm.elastic.rank_status import TIMED, RankStatus
from megamm.elastic.workers import Workers

HANGS = "hangs"
_DUMP_SECONDS, _MAX_DUMP = 1.0, 1 << 20
"""Seconds to wait for complete stacks, and the bytes of a stack file that are read."""
_FIRST_FACTOR = 10.0
"""How much longer than anything so far the first evaluation or checkpoint may take."""
_WAIT_SECONDS = 3.0
"""Seconds for which a rank's report that its writer is working counts; it is repeated about every second."""
GPU_SECONDS, CPU_SECONDS = 120.0, 5.0
"""resilience.hang_seconds if it is not set. On a GPU, a hang is rare and a stall of a shared file system is not."""
_COMMUNICATION = (
    "torch/distributed/",
    "megatron/core/distributed/",
    "megatron/core/pipeline_parallel/",
    "megatron/core/tensor_parallel/mappings.py",
)
_WRAPPERS = ("c10d_logger.py",)
"""Decorators around collectives: their frames are inside the collective's, but say nothing."""
_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$')
_OUTERMOST = (" in <module>", " in _run_module_as_main", "  ...")
"""Ends of the last line of a complete stack: a program's frame, or faulthandler's mark that frames are omitted."""


@dataclass(frozen=True)
class Limits:
    """Limits in seconds; see the module docstring and ResilienceConfig. hang: None for the default of the device."""

    hang: float | None
    startup: float


@dataclass(frozen=True)
class HangReport:
    """State of one rank in a hang. state: see processes.state; collective: None for a rank not waiting in one.

    record: what its flight recorder knows, None if it did not answer.
    """

    rank: int
    step: int | None
    phase: str
    silent: float
    state: str
    collective: str | None
    innermost: str
    is_on_gpu: bool = False
    record: flight_record.Record | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, object]:
        """Return the fields for events, with what the rank waits in instead of the whole record."""
        hidden = ("record", "is_on_gpu")
        waits_in = {"recorded": flight_record.waits_in(self.record) if self.record is not None else None}
        return {key: value for key, value in vars(self).items() if key not in hidden} | waits_in


class HangDetector:
    """Finds overdue ranks. It keeps the usual durations over attempts, and over agents if `longest` is given."""

    def __init__(
        self,
        limits: Limits,
        run: Path,
        clock: Callable[[], float] = time.monotonic,
        longest: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """longest: the result of heartbeat.longest."""
        self.limits, self.run, self.clock = limits, run, clock
        self._waits: dict[int, tuple[int, int]] = {}
        """Attempt and count of the last "wait" of each rank: a repeated one is not a new report."""
        self._written = -math.inf
        """Time of the last report that a writer is working."""
        self._compilations: dict[int, tuple[tuple[int, int], float]] = {}
        """Attempt and count of the last beat of each rank that compiled, and the time at which it was seen first."""
        self.longest = dict(longest)
        self._waited: dict[str, float] = {}
        """The longest silence of a rank before the first step of this attempt, by name in TIMED."""
        self._seen: dict[int, tuple[int, float]] = {}
        """Beats of each rank, and the time of the last new one."""
        self._looked = clock()

    def begin(self) -> None:
        """Begin a new attempt: no rank has sent a heartbeat yet."""
        for what, seconds in self._waited.items():
            if what in self.longest:  # otherwise the limit is that of the first launch, which is generous
                self.longest[what] = max(self.longest[what], min(seconds, self.limits.startup))
        self._waited.clear()
        self._seen.clear()
        self._looked = self.clock()

    def silent(self, index: int, status: RankStatus) -> float:
        """Return the seconds without progress, counting only the time in which this process was awake."""
        return self.clock() - self._seen.setdefault(index, (status.count, self.clock()))[1]

    def overdue(self, statuses: list[RankStatus]) -> list[int]:
        """Return the local indices of ranks beyond their limit; call it several times a second."""
        now = self.clock()
        asleep = max(0.0, now - self._looked - 1.0)  # the machine or this process was suspended: perhaps the ranks too
        self._looked = now
        for index, status in enumerate(statuses):
            count, since = self._seen.get(index, (-1, now))
            self._seen[index] = (count, since + asleep) if count == status.count else (status.count, now)
            if not status.is_warm:
                what = "first" if status.phase in ("data", "step") else status.phase
                self._waited[what] = max(self._waited.get(what, 0.0), now - self._seen[index][1])
        # Ranks work in step, so the slowest rank's duration counts for all.
        for what in TIMED:
            seconds = [status.longest()[what] for status in statuses if what in status.longest()]
            if seconds:
                self.longest[what] = max(seconds)
        overdue = [i for i, status in enumerate(statuses) if now - self._seen[i][1] > self.limit(status)]
        if any(status.is_compiling and i not in overdue for i, status in enumerate(statuses)):
            self._do_not_count(statuses, now)
            return []
        # Heartbeat files are read only if a rank is overdue: this runs several times a second.
        if not overdue or self._writer_works(now):
            return []
        if self._compiles_elsewhere(now):
            self._do_not_count(statuses, now)
            return []
        return overdue

    def _do_not_count(self, statuses: list[RankStatus], now: float) -> None:
        """Begin the time of the ranks that wait for one that compiles again."""
        self._seen |= {i: (status.count, now) for i, status in enumerate(statuses) if not status.is_compiling}

    def _compiles_elsewhere(self, now: float) -> bool:
        """Whether a rank of another node compiles, within its limit."""
        beats = heartbeat.read(self.run)
        last = max((beat.attempt for beat in beats), default=0)
        compiling = [beat for beat in beats if beat.is_compiling and beat.attempt == last]
        for beat in compiling:
            which = beat.attempt, beat.count
            if self._compilations.get(beat.rank, (None, 0.0))[0] != which:
                self._compilations[beat.rank] = which, now
        return any(now - self._compilations[beat.rank][1] < self.limits.startup for beat in compiling)

    def _writer_works(self, now: float) -> bool:
        """Whether a rank of any node has recently reported that it waits for its writer."""
        for beat in heartbeat.read(self.run):
            if beat.phase == "wait" and self._waits.get(beat.rank) != (beat.attempt, beat.count):
                self._waits[beat.rank], self._written = (beat.attempt, beat.count), now
        return now - self._written < _WAIT_SECONDS

    def limit(self, status: RankStatus) -> float:
        """Return the seconds of silence after which this rank is overdue in its current phase.

        Three cases: in phase "wait" the rank reports about every second; a phase whose usual duration is known may take
        twice as long; for the first one of its kind there is only a generous limit.
        """
        known, phase = self.longest, status.phase
        hang = self.limits.hang or (GPU_SECONDS if status.is_on_gpu else CPU_SECONDS)
        longest = max(self.limits.startup, hang)
        if status.is_compiling:
            return longest
        if phase == "wait":
            return hang
        usual = known.get(phase, 0.0)
        if phase in ("data", "step"):
            # Either phase may take as long as both together: the loader reads ahead during steps.
            usual = known.get("data", 0.0) + known.get("step", 0.0) if status.is_warm else known.get("first", 0.0)
        if usual:
            return 2 * usual + hang
        if phase in ("evaluate", "save") and "first" in known:
            return min(_FIRST_FACTOR * max(known.values()) + hang, longest)
        return longest


def examine(workers: Workers, ranks: list[int], detector: HangDetector, folder: Path) -> list[HangReport]:
    """Write every local rank's stacks and state into folder/rank_00000.txt, and return where each was.

    ranks: global number of each local rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    statuses = workers.page.ranks
    # Read all of it before the signals: a stopped rank continues for a moment when it is woken.
    before = [
        (status.step, status.phase, round(detector.silent(i, status), 2), processes.state(workers.pids[i]))
        for i, status in enumerate(statuses)
    ]
    texts = _dumps(workers, [state in ("T", "t") for *_, state in before])
    reports = []
    for index, (step, phase, silent, state) in enumerate(before):
        frames, record = main_frames(texts[index], statuses[index].thread), flight_record.read(texts[index])
        innermost = frames[0] if frames else "no stack: the process did not respond"
        called, is_on_gpu = collective(frames), statuses[index].is_on_gpu
        if is_on_gpu and record is not None:
            called = flight_record.waits_in(record)
        report = HangReport(ranks[index], step, phase, silent, state, called, innermost, is_on_gpu, record)
        head = "".join(f"{key}: {value}\n" for key, value in report.to_json().items())
        (folder / f"rank_{ranks[index]:05d}.txt").write_text(f"{head}\n{texts[index]}")
        reports.append(report)
    return reports


def _dumps(workers: Workers, stopped: list[bool]) -> list[str]:
    """Return what each rank writes: its stacks, and its flight record. A stopped rank is woken for its stacks.

    Stopped ranks come last, after all of the others: these may continue once a stopped rank is awake. (It will be
    killed anyway.)
    """
    ranks = list(zip(workers.pids, workers.dumps, workers.page.ranks, stopped, strict=False))
    for is_stopped in (False, True):
        asked = []
        for pid, dump, status, _ in (rank for rank in ranks if rank[-1] == is_stopped):
            try:
                processes.signal_main_thread(pid, DUMP_SIGNAL)  # before it continues
                if is_stopped:
                    os.kill(pid, signal.SIGCONT)
                asked.append((dump, status.thread))
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + _DUMP_SECONDS
        while not all(is_whole(_read(dump), thread) for dump, thread in asked) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not is_stopped:
            _wait_for_records([rank for rank in ranks if not rank[-1]])
    return [_read(dump) for dump in workers.dumps]


def _wait_for_records(ranks: list[tuple[int, int, RankStatus, bool]]) -> None:
    """Ask these ranks for their flight records, and wait until they are written, or for _DUMP_SECONDS."""
    for pid, *_ in ranks:
        with contextlib.suppress(ProcessLookupError):
            processes.signal_main_thread(pid, flight_record.RECORD_SIGNAL)
    deadline = time.monotonic() + _DUMP_SECONDS
    while any(flight_record.read(_read(dump)) is None for _, dump, *_ in ranks) and time.monotonic() < deadline:
        time.sleep(0.02)


def _read(dump: int) -> str:
    return os.pread(dump, _MAX_DUMP, 0).decode(errors="replace")


def is_whole(dump: str, thread: int) -> bool:
    """Whether a dump has the complete stack of the main thread.

    The process writes it line by line and may have to wait for a core in between: a dump that does not grow for a
    moment may still be incomplete.
    """
    stack, another, _ = dump.partition(f"0x{thread:016x}")[2].partition("\n\n")
    return (bool(another) or stack.endswith("\n")) and stack.rstrip("\n").endswith(_OUTERMOST)


def main_frames(dump: str, thread: int) -> list[str]:
    """Return the main thread's frames, innermost first, as "file:line function"; empty if it is not in the dump."""
    frames: list[str] = []
    inside = False
    for line in dump.splitlines():
        if "hread 0x" in line:
            inside = f"0x{thread:016x}" in line
        elif inside and (found := _FRAME.match(line)):
            frames.append(f"{found['file']}:{found['line']} {found['function']}")
    return frames


def collective(frames: list[str]) -> str | None:
    """Return the collective that the innermost frame waits in; None if that frame is not in a communication layer."""
    inner = [frame for frame in frames if not any(name in frame for name in _WRAPPERS)]
    if not inner or not any(part in inner[0] for part in _COMMUNICATION):
        return None
    return inner[0].rpartition(" ")[2]


def culprits(reports: list[HangReport]) -> list[int]:
    """Return the ranks that the others probably wait for.

    These are the stopped ranks, else, on a GPU, those that have not started the collective that others wait in, else
    those not in a collective, else those furthest behind. If all ranks of this node wait in collectives at the same
    step, the culprit is on another node, and the list is empty.
    """
    stopped = [r.rank for r in reports if r.state in ("T", "t", "D", "Z", "")]
    if stopped:
        return stopped
    # On a CPU the stacks know more: the recorder has no point-to-point operations of gloo.
    records = {r.rank: r.record for r in reports if r.is_on_gpu and r.record is not None}
    if records and (found := flight_record.culprits(records)) is not None:
        return found
    free = [r.rank for r in reports if r.collective is None]
    if free:
        return free
    behind = min((r.step if r.step is not None else -1) for r in reports)
    last = [r.rank for r in reports if (r.step if r.step is not None else -1) == behind]
    return last if len(last) < len(reports) else []
