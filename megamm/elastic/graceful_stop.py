"""The agents' side of a stop at a step boundary, over all nodes of an attempt (protocol: step_boundary.py)."""

import time

from megamm.elastic.rank_status import Ending, Slots
from megamm.elastic.rendezvous import Membership

_SETTLE = 0.02
"""Seconds after which every rank has either seen the stop request or written the step that it entered before it."""


class Stop:
    """The stop of one attempt on one node. Call `advance` often; no method blocks."""

    def __init__(self, slots: Slots, membership: Membership, group_rank: int, nodes: int) -> None:
        self.slots, self.membership = slots, membership
        self.group_rank, self.nodes = group_rank, nodes
        self.why: Ending | None = None
        self.since = 0.0
        self._entered: dict[int, int] = {}

    def ask(self, why: Ending, tell_others: bool) -> None:
        """Start the stop, at the first reason; a signal overrides a regrouping."""
        if self.why is None:
            self.since = time.monotonic()
        elif self.why == "requeue":
            return
        self.why = why
        self.slots.ask_to_stop(why)
        if tell_others:
            self.membership.tell("stop", why)

    def follow(self) -> None:
        """Stop if another node requests it."""
        match self.membership.told("stop"):
            case "requeue" if self.why != "requeue":
                self.ask("requeue", tell_others=False)
            case "regroup" if self.why is None:
                self.ask("regroup", tell_others=False)

    def advance(self) -> None:
        """Exchange the steps that ranks have entered; once all are known, set the last step for the ranks."""
        if self.why is None or self.slots.last_step is not None or time.monotonic() - self.since < _SETTLE:
            return
        if self.group_rank not in self._entered:
            own = max(0, *(slot.entered for slot in self.slots.ranks))
            self._entered[self.group_rank] = own
            self.membership.tell(f"entered/{self.group_rank}", str(own))
        for node in range(self.nodes):
            if node not in self._entered and (told := self.membership.told(f"entered/{node}")) is not None:
                self._entered[node] = int(told)
        if len(self._entered) == self.nodes:
            self.slots.stop_after(max(self._entered.values()))
