"""Attempts and restarts of a run, derived from its recorded events and metrics.

Input: events (megamm/common/events.py) and lines of metrics, each with "time" in Unix seconds. Output: `LaunchRecord`s
with their events and lines, and `Restart`s with seconds.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]


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
    attempts = [LaunchRecord(begin, end) for begin, end in zip(starts, [*starts[1:], last], strict=True)]
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
            is_new = kind == "restarting" or state != "launched"
            state = "launched"
        elif kind == "resumed":
            is_new = state in ("started", "ended")
            begin = max(begin - event.get("seconds", 0.0), begins[-1] if begins else 0.0)
            state = "resumed"
        elif kind == "started":
            has_lines = bool(begins) and any(begins[-1] <= line["time"] < begin for line in lines)
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
