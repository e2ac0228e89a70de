"""Restart policy: whether a failed run restarts, and after what pause; a pure function of the failures so far.

The total number of restarts is limited. A restart is delayed only if the attempts before it made no progress; the pause
doubles with each of them. Repeated failures at the same step are errors of the program, which a restart cannot fix.
"""

from dataclasses import dataclass
from typing import Any

MAX_PAUSE = 300.0


@dataclass(frozen=True)
class Rules:
    """Limits of the policy; see ResilienceConfig."""

    max_restarts: int
    same_step_limit: int
    backoff_seconds: float


@dataclass(frozen=True)
class Failure:
    """The failure of an attempt: its step (None if it never reached one), and what is known about the cause."""

    attempt: int
    step: int | None
    phase: str
    rank: int | None
    cause: str

    def describe(self) -> str:
        who = "" if self.rank is None else f"rank {self.rank}: "
        where = f"in phase {self.phase}" if self.step is None else f"at step {self.step}, phase {self.phase}"
        return f"{who}{self.cause}, {where}"


@dataclass(frozen=True)
class Verdict:
    """Restart after `pause` seconds, or end for the reason in `gives_up`."""

    pause: float = 0.0
    gives_up: str | None = None


def judge(failures: list[Failure], rules: Rules) -> Verdict:
    """Return the verdict. failures: all of this launch, oldest first, one for each failed attempt."""
    if not failures:
        return Verdict()
    last = failures[-1]
    same = fruitless(failures)
    # Without restarts the failure itself is the message (below), not how often it has occurred.
    if same >= rules.same_step_limit and rules.max_restarts:
        where = "before its first step" if last.step is None else f"at step {last.step}"
        return Verdict(gives_up=f"{same} failures in a row {where}; the last was {last.describe()}")
    if len(failures) > rules.max_restarts:
        used = f"all {rules.max_restarts} restarts are used up; " if rules.max_restarts else ""
        return Verdict(gives_up=f"{used}{last.describe()}")
    # The first failure at a step restarts at once; then backoff_seconds, twice that, four times that ...
    pause = 0.0 if same == 1 else rules.backoff_seconds * 2 ** (same - 2)
    return Verdict(pause=min(pause, MAX_PAUSE))


def fruitless(failures: list[Failure]) -> int:
    """Count the last failures at the same step; an attempt that never reached a step counts as one of them."""
    count, step = 0, None
    for failure in reversed(failures):
        # The step that counts is that of the newest failure that reached one.
        if step is None:
            step = failure.step
        if failure.step not in (None, step):
            break
        count += 1
    return count


def from_events(events: list[dict[str, Any]]) -> list[Failure]:
    """Return the failures of the last launch, only the first recorded one for each attempt."""
    begin = max((i for i, event in enumerate(events) if event["kind"] == "launched"), default=0)
    found: dict[int, Failure] = {}
    for event in events[begin:]:
        if event["kind"] == "failed" and event["attempt"] not in found:
            found[event["attempt"]] = Failure(
                event["attempt"], event["step"], event["phase"], event["rank"], event["cause"]
            )
    return [found[attempt] for attempt in sorted(found)]


def attempts(events: list[dict[str, Any]]) -> list[int]:
    """Return the numbers of the attempts of the last launch."""
    begin = max((i for i, event in enumerate(events) if event["kind"] == "launched"), default=0)
    return [event["attempt"] for event in events[begin:] if event["kind"] in ("launched", "restarting", "failed")]
