"""Where a rank may stop: between two steps, all ranks of the job at the same one, without a collective.

A rank about to begin step s writes s into its slot, then looks whether a stop is asked for. The agent asks first and
reads the slots then: a rank that did not see the question had written its step before. So the largest step that any
rank has entered (over all nodes, through the agents' store) is one that every rank reaches, and none has gone beyond:
that is the last one. A rank that sees the question waits to hear it. In a process without an agent a flag is enough.
"""

import logging
import os
import signal
import time
from types import FrameType
from typing import Protocol

from megamm.resilience.heartbeat import SLOTS
from megamm.resilience.processes import STOP_SIGNALS
from megamm.resilience.slots import Ending, Slots

log = logging.getLogger(__name__)
_POLL = 0.001


class Boundary(Protocol):
    """Asked by the training loop before every step."""

    def stops_before(self, step: int) -> Ending | None:
        """Why training ends instead of beginning this step; None to go on. Every rank gets the same answer."""


class AgentBoundary:
    """Of a rank that an agent started."""

    def __init__(self, slots: Slots, index: int) -> None:
        self.slots, self.slot = slots, slots.ranks[index]

    def stops_before(self, step: int) -> Ending | None:
        self.slot.enter(step)
        why = self.slots.asked
        if why is None:
            return None
        while (last := self.slots.last_step) is None:
            time.sleep(_POLL)  # the agent that is to answer takes this process with it if it dies
        return why if step > last else None


class SignalBoundary:
    """Of a job of one process: the first signal asks for a stop, a second one ends the process at once."""

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
    """Of a rank that another launcher started: it stops when that one says so."""

    def stops_before(self, step: int) -> Ending | None:
        return None


def of_this_rank() -> Boundary:
    """As the environment says who started this process."""
    if SLOTS in os.environ:
        descriptor, ranks, index = map(int, os.environ[SLOTS].split(":"))
        return AgentBoundary(Slots(descriptor, ranks), index)
    return NoBoundary()
