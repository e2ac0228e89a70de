"""Graceful stop: all ranks of the job stop after the same step, without a collective.

A rank about to begin step s writes s into its status, then checks whether a stop is requested. The agent first sets the
request and then reads the statuses: a rank that did not see the request had already written its step. So every rank
reaches the largest step that any rank has entered (over all nodes, through the agents' store), and no rank is beyond
it: it is the last step. A rank that sees the request waits until the last step is known. In a process without an agent
a flag is enough.

`StopCondition` is the ranks' side, `GracefulStop` the agents' side.
"""

import logging
import signal
import time
from types import FrameType
from typing import Protocol

from megamm.common.processes import STOP_SIGNALS
from megamm.elastic.rank_status import ExitReason, HeartbeatPage, RankStatus
from megamm.elastic.rendezvous import Rendezvous

log = logging.getLogger(__name__)
_POLL = 0.001
"""Seconds between two looks of a rank at the last step."""
_SETTLE = 0.02
"""Seconds after which every rank has either seen the stop request or written the step that it entered before it."""


class StopCondition(Protocol):
    """Interface that the training loop calls before every step."""

    def stops_before(self, step: int) -> ExitReason | None:
        """Return why training ends before this step, or None to continue. Every rank gets the same answer."""


class AgentStopCondition:
    """Stop condition of a rank that an agent started."""

    def __init__(self, page: HeartbeatPage, status: RankStatus) -> None:
        self.page, self.status = page, status

    def stops_before(self, step: int) -> ExitReason | None:
        self.status.enter(step)  # before the check: see the module docstring
        why = self.page.asked
        if why is None:
            return None
        while (last := self.page.last_step) is None:
            time.sleep(_POLL)  # if the agent dies, the kernel kills this process
        return why if step > last else None


class SignalStopCondition:
    """Stop condition of a single-process job: the first signal requests a stop, a second one exits at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise SystemExit(128 + number)
        self.received = number

    def stops_before(self, step: int) -> ExitReason | None:
        if self.received is None:
            return None
        log.warning("%s: stopping before step %d", signal.Signals(self.received).name, step)
        return "requeue"


class NoStopCondition:
    """Stop condition of a rank that another launcher, such as torchrun, started: that launcher stops it."""

    def stops_before(self, step: int) -> ExitReason | None:
        return None


def stop_condition() -> StopCondition:
    """Return the stop condition of this process; its environment shows who started it."""
    shared = HeartbeatPage.of_this_rank()
    return AgentStopCondition(*shared) if shared is not None else NoStopCondition()


class GracefulStop:
    """The stop of one attempt on one node. Call `advance` often; no method blocks."""

    def __init__(self, page: HeartbeatPage, rendezvous: Rendezvous, nodes: int) -> None:
        self.page, self.rendezvous, self.nodes = page, rendezvous, nodes
        self.why: ExitReason | None = None
        self.since = 0.0

    def ask(self, why: ExitReason, tell_others: bool) -> None:
        """Start the stop, at the first reason; a signal overrides a regrouping."""
        if self.why is None:
            self.since = time.monotonic()
        elif self.why == "requeue":
            return
        self.why = why
        self.page.ask_to_stop(why)
        if tell_others:
            self.rendezvous.send(f"stop/{why}", "asked")

    def follow(self) -> None:
        """Stop if another node requests it."""
        if self.why != "requeue" and self.rendezvous.received("stop/requeue") is not None:
            self.ask("requeue", tell_others=False)
        if self.why is None and self.rendezvous.received("stop/regroup") is not None:
            self.ask("regroup", tell_others=False)

    def advance(self) -> None:
        """Exchange the steps that ranks have entered; once all are known, set the last step for the ranks."""
        if self.why is None or self.page.last_step is not None or time.monotonic() - self.since < _SETTLE:
            return
        # Each node publishes its largest step once; the largest of all nodes is then the same on all of them.
        own = max(0, *(status.entered for status in self.page.ranks))
        last = self.rendezvous.maximum("entered", own, self.nodes)
        if last is not None:
            self.page.stop_after(last)
