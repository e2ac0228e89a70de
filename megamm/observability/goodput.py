"""Goodput of a run: the share of its wall time spent on steps whose result was kept, and where the rest went.

Input: the run's events (RUN/events.jsonl) and its lines of metrics, including those dropped at a restart
(RUN/metrics.jsonl, RUN/metrics_dropped.jsonl); times in Unix seconds, durations in seconds. Output: `Goodput`, from
one `LaunchRecord` for every launch, with a `Restart` for every failure.

Definition. Wall time: from the first launch to the last record of the run, including the wait for a new job.
Productive: time in steps that no later attempt repeated, without the wait for data, which is listed separately. This
is the ratio of "effective training time" to elapsed time of Llama 3 (Grattafiori et al. 2024, section 3.3.4) and the
ETTR of ByteRobust (Wan et al. 2025: productive time over wall-clock time); neither says whether the wait for data
counts; here it does not.

Time that a run did not record is not guessed: it is "unknown", and `notes` says what was missing.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]
KINDS = (
    "productive",
    "repeated",
    "data_wait",
    "checkpoint_stall",
    "evaluation",
    "start_up",
    "detection",
    "teardown",
    "rendezvous",
    "load",
    "down",
    "unknown",
)
"""Categories of wall time. repeated: steps that were run again; start_up: from a launch to the first step, without
rendezvous and load; down: no job of this run existed, or it waited before a restart."""

OUTSIDE_STEPS = ("evaluation_seconds", "checkpoint_stall_seconds")
"""Fields of a line of metrics for time that is in none of its steps."""


@dataclass
class LaunchRecord:
    """The time from one launch to the next. Events and lines of metrics are sorted by time."""

    begin: float
    end: float = 0.0
    is_last: bool = False
    events: list[Record] = field(default_factory=list)
    lines: list[Record] = field(default_factory=list)

    def first(self, *kinds: str) -> Record | None:
        """Return its first event of one of these kinds."""
        return next((e for e in self.events if e["kind"] in kinds), None)

    @property
    def ended_in_order(self) -> bool:
        """Whether it finished, or stopped at a signal, after a checkpoint."""
        return self.first("finished", "signal") is not None

    @property
    def failure(self) -> Record | None:
        """The event that ended it: "failed", or "hang" if nothing came after that."""
        return self.first("failed") or self.first("hang")

    @property
    def detection(self) -> float | None:
        """Seconds from the last sign of life to the failure event; None if not recorded."""
        failed, hang = self.failure, self.first("hang")
        if failed is None:
            return None
        if "detection" not in failed and hang is not None and "silent" in hang:
            return float(hang["silent"]) + failed["time"] - hang["time"]
        return failed.get("detection")


@dataclass(frozen=True)
class Restart:
    """A failure and its recovery. kind: failed or hang; seconds are None if they were not recorded.

    total: from the last sign of life (from the failure event, if the detection time is not known) until the first step
    of the next attempt begins.
    """

    time: float
    kind: str
    cause: str
    rank: int | None
    step: int | None
    phase: str | None
    detection: float | None
    teardown: float | None
    rendezvous: float | None
    load: float | None
    total: float | None
    resumed_step: int | None


def from_step(line: Record) -> int:
    """Return the step before the first step of a line."""
    return int(line["step"] - line.get("steps", 0))


def attempts_of(events: list[Record], lines: list[Record], note: Callable[[str], None]) -> list[LaunchRecord]:
    """Return the attempts of a run. events and lines are sorted by time; note is called with what was inferred."""
    starts, first_events = _launches(events, lines)
    first = [e["time"] for e in events[:1]] + [line["time"] - line.get("step_seconds", 0.0) for line in lines[:1]]
    if not first:
        return []
    if not starts or min(first) < starts[0] - 1e-3:
        note("no launch is recorded before the first records: the time before them is unknown")
        starts, first_events = [min(first), *starts], [0, *first_events]
    last = max([e["time"] for e in events[-1:]] + [line["time"] for line in lines[-1:]])
    # An attempt lasts until the next launch, so the attempts cover the whole time without a gap.
    attempts = [LaunchRecord(begin, end) for begin, end in zip(starts, [*starts[1:], last], strict=True)]
    # A record belongs to the last attempt that began before it.
    for index, event in enumerate(events):  # by index: two events may have the same time
        attempts[max(bisect_right(first_events, index) - 1, 0)].events.append(event)
    for line in lines:
        attempts[max(bisect_right(starts, line["time"]) - 1, 0)].lines.append(line)
    attempts[-1].is_last = True
    return attempts


def _launches(events: list[Record], lines: list[Record]) -> tuple[list[float], list[int]]:
    """Return when attempts began, and the index of the event that began each.

    That event is a launch or a restart, or, without either, a resumption or a first step. Launches of several nodes
    with nothing between them count as one; so do "started" events without a line between them.
    """
    begins, first_events, state = list[float](), list[int](), "ended"
    for index, event in enumerate(events):
        kind, begin = event["kind"], event["time"]
        is_new = False
        if kind in ("launched", "restarting"):
            # Each node of a job records its launch: only the first one after something else begins an attempt.
            is_new = kind == "restarting" or state != "launched"
            state = "launched"
        elif kind == "resumed":
            is_new = state in ("started", "ended")
            # "resumed" is recorded after reading the checkpoint; the attempt began before that.
            begin = max(begin - event.get("seconds", 0.0), begins[-1] if begins else 0.0)
            state = "resumed"
        elif kind == "started":
            has_lines = bool(begins) and any(begins[-1] <= line["time"] < begin for line in lines)
            # Two "started" without a line of metrics between them come from two ranks or nodes of one attempt.
            is_new = state == "ended" or (state == "started" and has_lines)
            state = "started"
        elif kind in ("failed", "hang", "finished", "gave_up", "evicted"):
            state = "ended"
        if is_new:
            begins.append(begin)
            first_events.append(index)
    return begins, first_events


def restarts_of(attempts: list[LaunchRecord]) -> list[Restart]:
    """Return every failure together with the recovery by the next attempt."""
    found = []
    for attempt, after in zip(attempts, [*attempts[1:], None], strict=True):
        failed, detection = attempt.failure, attempt.detection
        if failed is None:
            continue
        again, started, resumed = (after.first(k) if after else None for k in ("restarting", "started", "resumed"))
        found.append(
            Restart(
                time=failed["time"],
                kind="failed" if attempt.first("hang") is None else "hang",
                cause=str(failed.get("cause", failed["kind"])),
                rank=failed.get("rank"),
                step=failed.get("step"),
                phase=failed.get("phase"),
                detection=detection,
                teardown=(again or {}).get("teardown"),
                rendezvous=(again or {}).get("rendezvous"),
                load=(resumed or {}).get("seconds"),
                total=started["time"] - failed["time"] + (detection or 0.0) if started else None,
                resumed_step=(resumed or {}).get("step"),
            )
        )
    return found


@dataclass(frozen=True)
class TimelineSpan:
    """A piece of the time line, for a plot; short parts inside it (waiting, saving) are not shown separately."""

    begin: float
    end: float
    kind: str


@dataclass
class Goodput:
    """Result of the account. begin, end: Unix seconds; seconds: by kind, their sum is the wall time."""

    begin: float = 0.0
    end: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    spans: list[TimelineSpan] = field(default_factory=list)
    restarts: list[Restart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    attempts: int = 0

    @property
    def wall(self) -> float:
        return sum(self.seconds.values())

    @property
    def ratio(self) -> float | None:
        """Productive time divided by wall time; None if there is no wall time yet."""
        return self.seconds["productive"] / self.wall if self.wall > 0 else None

    def note(self, what: str) -> None:
        """Add a note, once."""
        if what not in self.notes:
            self.notes.append(what)

    def add(self, kind: str, seconds: float) -> None:
        self.seconds[kind] += seconds

    def span(self, begin: float, end: float, kind: str) -> None:
        """Add a span; join it to the one before if it is of the same kind."""
        if end <= begin:
            return
        if self.spans and self.spans[-1].kind == kind and abs(self.spans[-1].end - begin) < 1e-3:
            begin = self.spans.pop().begin
        self.spans.append(TimelineSpan(begin, end, kind))


def account(events: Sequence[Record], lines: Sequence[Record], resuming_from: float = math.inf) -> Goodput:
    """Account for all of a run's time until its last record.

    Lines without "time" (older runs) are noted, not counted. resuming_from: the step after which the run is
    about to continue; the recorded steps after it will be repeated. This counts as one more attempt, unless the last
    recorded attempt has not reached its first step.
    """
    result = Goodput()
    timed = sorted((line for line in lines if "time" in line), key=lambda line: line["time"])
    if len(timed) < len(lines):
        result.note(f"{len(lines) - len(timed)} lines of metrics have no time: their steps are unknown")
    in_order = sorted(events, key=lambda event: event["time"])
    attempts = attempts_of(in_order, timed, result.note)
    if not attempts:
        return result
    result.begin, result.end = attempts[0].begin, attempts[-1].end
    # The attempt that calls this has no record yet, except if its launch is the last record.
    is_new = resuming_from < math.inf and bool(attempts[-1].lines or attempts[-1].first("started"))
    result.attempts = len(attempts) + is_new
    kept_until = _kept_until(attempts, resuming_from)
    for attempt, after, limits in zip(attempts, [*attempts[1:], None], kept_until, strict=True):
        clock = _count_start(result, attempt)
        for line, limit in zip(attempt.lines, limits[:-1], strict=True):
            clock = _count_line(result, line, limit, clock)
        _count_tail(result, attempt, after, limits[-1], clock)
    result.restarts = restarts_of(attempts)
    return result


def _kept_until(attempts: list[LaunchRecord], limit: float) -> list[list[float]]:
    """Return, for every line of every attempt and for the time after its last line, the last step not repeated."""
    # From the end of the run to its begin: a later attempt decides which steps of the earlier ones were kept.
    table = []
    for attempt in reversed(attempts):
        column = [limit]
        for line in reversed(attempt.lines):
            column.append(limit)
            if "steps" in line:
                limit = min(limit, from_step(line))
        table.append(column[::-1])
        begun = attempt.first("resumed", "started")
        # An attempt without a line may still have resumed at an earlier step: the steps after that are repeated.
        if begun is not None and not attempt.lines:
            limit = min(limit, begun.get("step", 0))
    return table[::-1]


def _count_start(result: Goodput, attempt: LaunchRecord) -> float:
    """Count the time until the first step begins, and return that time."""
    started, resumed, again = (attempt.first(kind) for kind in ("started", "resumed", "restarting"))
    if started is not None:
        end = started["time"]
    elif attempt.lines:
        result.note('no "started" event: the begin of the first step is derived from its line of metrics')
        end = max(attempt.lines[0]["time"] - attempt.lines[0].get("step_seconds", 0.0), attempt.begin)
    else:
        return attempt.begin  # it never reached a step: `_count_tail` counts its time
    # Pause and load are parts of the time before the first step; what is left of it is start-up.
    left = max(end - attempt.begin, 0.0)
    paused = min((again or {}).get("backoff", 0.0), left)
    loaded = min((resumed or {}).get("seconds", 0.0), left - paused)
    for kind, seconds in (("down", paused), ("load", loaded), ("start_up", left - paused - loaded)):
        result.add(kind, seconds)
    result.span(attempt.begin, attempt.begin + paused, "down")
    result.span(attempt.begin + paused, end, "start_up")
    return float(end)


def _count_line(result: Goodput, line: Record, limit: float, clock: float) -> float:
    """Count the time since the line before; what the line does not account for is unknown."""
    step_seconds = line.get("step_seconds", 0.0)
    # Durations come from the line, elapsed time from the clock; the difference is unknown time.
    waited = min(line.get("data_wait_seconds", 0.0), step_seconds)
    steps = line.get("steps", 0)
    # The share of the line's steps that no later attempt repeats.
    kept = min(max(limit - from_step(line), 0), steps) / steps if steps else float(line["step"] <= limit)
    result.add("productive", (step_seconds - waited) * kept)
    result.add("repeated", (step_seconds - waited) * (1 - kept))
    result.add("data_wait", waited)
    accounted = step_seconds
    for part in OUTSIDE_STEPS:
        result.add(part.removesuffix("_seconds"), line.get(part, 0.0))
        accounted += line.get(part, 0.0)
    passed = line["time"] - clock
    if accounted > passed + 1.0:
        result.note("a clock was set back: the recorded parts are longer than the elapsed time")
    result.add("unknown", max(passed - accounted, 0.0))
    middle = clock + passed * kept
    result.span(clock, middle, "productive")
    result.span(middle, line["time"], "repeated")
    return float(line["time"])


def _count_tail(result: Goodput, attempt: LaunchRecord, after: LaunchRecord | None, limit: float, clock: float) -> None:
    """Count the time after the last line: saving, unreported steps, a failure, its detection, and what followed."""
    failed = attempt.failure
    ended = failed["time"] if failed is not None else max((e["time"] for e in attempt.events), default=clock)
    _count_unreported(result, attempt, limit, (clock, max(ended, clock)))
    clock = max(ended, clock)
    left = max(attempt.end - clock, 0.0)
    again = after.first("restarting") if after is not None else None
    if again is not None:
        # The restarted attempt recorded how long it took to end the ranks and to meet again; each is cut to the time
        # that there was.
        torn = min(again.get("teardown", left), left)
        met = min(again.get("rendezvous", 0.0), left - torn)
        begin = clock
        for kind, seconds in (("teardown", torn), ("rendezvous", met), ("unknown", left - torn - met)):
            result.add(kind, seconds)
            result.span(begin, begin + seconds, kind)
            begin += seconds
        return
    if after is not None and failed is None and not attempt.ended_in_order:
        result.note('an attempt has no end record: from its last record to the next launch it counts as "down"')
    kind = "unknown" if after is None else "down"
    result.add(kind, left)
    result.span(clock, attempt.end, kind)


def _count_unreported(result: Goodput, attempt: LaunchRecord, limit: float, between: tuple[float, float]) -> None:
    """Count the steps after the last line.

    They are repeated, except those before the checkpoint, whose time is estimated from the last step time. The rest of
    an attempt that ended in order (closing, writing the last checkpoint) is unknown.
    """
    (begin, end), failed, detection = between, attempt.failure, attempt.detection
    last = attempt.lines[-1] if attempt.lines else None
    step = last["step"] if last is not None else int((attempt.first("resumed") or {}).get("step", 0))
    stall = sum(e.get("stall", 0.0) for e in attempt.events if e["kind"] == "saved" and e.get("step", -1) >= step)
    if failed is not None and detection is None:
        result.note("a failure has no detection time: that time is counted as the work before it")
    left = end - begin
    detected = min(detection or 0.0, left)
    stalled = min(stall, left - detected)
    left -= detected + stalled
    # Steps up to the checkpoint were kept but have no line: they are estimated at the pace of the last line.
    pace = last["step_seconds"] / last["steps"] if last is not None and last.get("steps") else 0.0
    kept = min(max(limit - step, 0) * pace, left) if limit != math.inf else 0.0
    rest = "unknown"
    if last is None and attempt.first("started") is None:
        rest = "start_up"  # it reached no step
    elif failed is not None or not (attempt.is_last or attempt.ended_in_order):
        rest = "repeated"
    for kind, seconds in (("detection", detected), ("checkpoint_stall", stalled), ("productive", kept)):
        result.add(kind, seconds)
    result.add(rest, left - kept)
    result.span(begin, begin + kept + stalled, "productive")
    result.span(begin + kept + stalled, end - detected, rest)
    result.span(end - detected, end, "detection")
