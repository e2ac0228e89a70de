"""Goodput of a run: the share of its wall time spent on steps whose result was kept, and where the rest went.

Input: the run's events (RUN/events.jsonl) and its lines of metrics, including those dropped at a restart
(RUN/metrics.jsonl, RUN/metrics_dropped.jsonl); times in Unix seconds, durations in seconds. Output: `Goodput`.

Definition. Wall time: from the first launch to the last record of the run, including the wait for a new job.
Productive: time in steps that no later attempt repeated, without the wait for data, which is listed separately. This
is the ratio of "effective training time" to elapsed time of Llama 3 (Grattafiori et al. 2024, section 3.3.4) and the
ETTR of ByteRobust (Wan et al. 2025: productive time over wall-clock time); neither says whether the wait for data
counts; here it does not.

Time that a run did not record is not guessed: it is "unknown", and `notes` says what was missing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from megamm.observability.restarts import LaunchRecord, Record, Restart, attempts_of, from_step, restarts_of

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

PARTS = ("evaluation_seconds", "checkpoint_stall_seconds")


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


def account(events: Sequence[Record], lines: Sequence[Record], going_on_from: float = math.inf) -> Goodput:
    """Account for all of a run's time until its last record.

    Lines without "time" (older runs) are noted, not counted. going_on_from: the step after which the run is
    about to continue; the recorded steps after it will be repeated. This counts as one more attempt, unless the last
    recorded attempt has not reached its first step.
    """
    result = Goodput()
    timed = sorted((line for line in lines if "time" in line), key=lambda line: line["time"])
    if len(timed) < len(lines):
        result.note(f"{len(lines) - len(timed)} lines of metrics have no time: their steps are unknown")
    told = sorted(events, key=lambda event: event["time"])
    attempts = attempts_of(told, timed, result.note)
    if not attempts:
        return result
    result.begin, result.end = attempts[0].begin, attempts[-1].end
    is_new = going_on_from < math.inf and bool(attempts[-1].lines or attempts[-1].first("started"))
    result.attempts = len(attempts) + is_new
    kept_until = _kept_until(attempts, going_on_from)
    for attempt, after, limits in zip(attempts, [*attempts[1:], None], kept_until, strict=True):
        clock = _count_start(result, attempt)
        for line, limit in zip(attempt.lines, limits[:-1], strict=True):
            clock = _count_line(result, line, limit, clock)
        _count_tail(result, attempt, after, limits[-1], clock)
    result.restarts = restarts_of(attempts)
    return result


def _kept_until(attempts: list[LaunchRecord], limit: float) -> list[list[float]]:
    """Return, for every line of every attempt and for the time after its last line, the last step not repeated."""
    table = []
    for attempt in reversed(attempts):
        column = [limit]
        for line in reversed(attempt.lines):
            column.append(limit)
            if "steps" in line:
                limit = min(limit, from_step(line))
        table.append(column[::-1])
        begun = attempt.first("resumed", "started")
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
    waited = min(line.get("data_wait_seconds", 0.0), step_seconds)
    steps = line.get("steps", 0)
    kept = min(max(limit - from_step(line), 0), steps) / steps if steps else float(line["step"] <= limit)
    result.add("productive", (step_seconds - waited) * kept)
    result.add("repeated", (step_seconds - waited) * (1 - kept))
    result.add("data_wait", waited)
    told = step_seconds
    for part in PARTS:
        result.add(part.removesuffix("_seconds"), line.get(part, 0.0))
        told += line.get(part, 0.0)
    passed = line["time"] - clock
    if told > passed + 1.0:
        result.note("a clock was set back: the recorded parts are longer than the elapsed time")
    result.add("unknown", max(passed - told, 0.0))
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
