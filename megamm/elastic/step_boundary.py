"""Stop at a step boundary: all ranks of the job stop after the same step, without a collective.

A rank about to begin step s writes s into its slot, then checks whether a stop is requested. The agent first sets the
request and then reads the slots: a rank that did not see the request had already written its step. So every rank
reaches the largest step that any rank has entered (over all nodes, through the agents' store), and none has gone
beyond it: it is the last step. A rank that sees the request waits until it is known. In a process without an agent a
flag is enough.
"""

import logging
import os
import signal
import time
from types import FrameType
from typing import Protocol

from megamm.common.processes import STOP_SIGNALS
from megamm.elastic.heartbeat import SLOTS
from megamm.elastic.rank_status import Ending, Slots

log = logging.getLogger(__name__)
_POLL = 0.001


class Boundary(Protocol):
    """Interface that the training loop calls before every step."""

    def stops_before(self, step: int) -> Ending | None:
        """Return why training ends before this step, or None to continue. Every rank gets the same answer."""


class AgentBoundary:
    """Boundary of a rank that an agent started."""

    def __init__(self, slots: Slots, index: int) -> None:
        self.slots, self.slot = slots, slots.ranks[index]

    def stops_before(self, step: int) -> Ending | None:
        self.slot.enter(step)
        why = self.slots.asked
        if why is None:
            return None
        while (last := self.slots.last_step) is None:
            time.sleep(_POLL)  # if the agent dies, the kernel kills this process
        return why if step > last else None


class SignalBoundary:
    """Boundary of a single-process job: the first signal requests a stop, a second one exits at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise SystemExit(128 + number)
        self.received = number

    def stops_before(self, step: int) -> Ending | None:
        if self.received is None:
            return None
        log.warning("%s: stopping before step %d", signal.Signals(self.received).name, step)
        return "requeue"


class NoBoundary:
    """Boundary of a rank that another launcher started: that launcher stops it."""

    def stops_before(self, step: int) -> Ending | None:
        return None


def of_this_rank() -> Boundary:
    """Return the boundary for this process; the environment tells who started it."""
    if SLOTS in os.environ:
        descriptor, ranks, index = map(int, os.environ[SLOTS].split(":"))
        return AgentBoundary(Slots(descriptor, ranks), index)
    return NoBoundary()
