"""Which nodes are in a round of a job: the rules of the rendezvous, without sockets, threads or a clock of its own.

The process that hosts the rendezvous keeps one Membership and hands it what agents send (rendezvous_server.py). It
alone judges keep-alives, by its own monotonic clock, so the clocks of nodes need not agree. Work and messages grow with
the number of nodes, not with its square: a message that concerns all nodes goes out once, when it first says something
new.

A round ends when all its nodes have asked for the next one, have left or are silent. The next one begins when the
largest number of nodes has asked for it, or the least number and the last call is over.
"""

import re
from dataclasses import dataclass, field
from typing import Any

COUNTS_SECONDS = 1.0
"""Shortest time between two messages about how many nodes there are, to nodes that have not asked."""


@dataclass
class Member:
    """One agent. heard: when its last message came, in seconds; address: its node's, for messages and for the order.

    rank: in the current round, None outside of it. turn: its number among the requests to join, None if it has not
    asked. trained: its rank in the last attempt in which it trained. is_fresh: it has made no attempt yet.
    """

    address: str
    heard: float
    rank: int | None = None
    turn: int | None = None
    trained: int | None = None
    is_fresh: bool = True


@dataclass
class _Round:
    """What the nodes of a round have sent: values, first one first, and numbers of which the largest counts."""

    number: int = 0
    values: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, dict[int, int]] = field(default_factory=dict)


class Membership:
    """The nodes of a job. `outbox` collects messages: (ids of members, message)."""

    def __init__(self, nodes: tuple[int, int], last_call: float, lost_after: float) -> None:
        """nodes: the least and the largest number; the times are in seconds."""
        self.least, self.most = nodes
        self.last_call, self.lost_after = last_call, lost_after
        self.members: dict[int, Member] = {}
        self.outbox: list[tuple[list[int], dict[str, Any]]] = []
        self.is_closed = False
        self._round = _Round()
        self._turns = 0
        self._deadline: float | None = None
        self._counts: dict[str, Any] = {}
        self._counts_due = 0.0
        self._uninformed: set[int] = set()
        """Members that have not received the present counts."""

    def connect(self, member: int, address: str, now: float) -> None:
        """Add an agent, which is in no round yet."""
        self.members[member] = Member(address, now)
        self._uninformed.add(member)
        if self.is_closed:
            self._send([member], closed=True)

    def alive(self, member: int, now: float) -> None:
        """Note a keep-alive; a node that was silent is taken back as what it was."""
        self.members[member].heard = now
        self._send([member], **self._counts)
        self._uninformed.discard(member)

    def join(self, member: int, is_fresh: bool, trained: int | None) -> None:
        """Note that a node asks for the next round: it has left the current one."""
        asking = self.members[member]
        self._turns += 1
        asking.rank, asking.turn, asking.is_fresh, asking.trained = None, self._turns, is_fresh, trained
        if self.is_closed:
            self._send([member], closed=True)

    def leave(self, member: int) -> None:
        """Remove a node that leaves in order."""
        self.members.pop(member, None)
        self._uninformed.discard(member)

    def lose(self, member: int, why: str) -> None:
        """Remove a node whose connection has ended; the others of its round are informed."""
        lost = self.members.get(member)
        self.leave(member)
        if lost is not None and lost.rank is not None:
            self._send(self._in_round(), round=self._round.number, lost=lost.rank, why=f"{lost.address}: {why}")

    def put(self, member: int, number: int, key: str, value: str) -> None:
        """Publish the value of a key in round `number`; the first value of a key stays."""
        if self._is_in(member, number) and key not in self._round.values:
            self._publish(key, value)

    def largest(self, member: int, number: int, key: str, value: int, nodes: int) -> None:
        """Publish the largest value of a key once each of the first `nodes` nodes of round `number` has sent one."""
        if self._is_in(member, number) and key not in self._round.values:
            rank = self.members[member].rank
            assert rank is not None
            sent = self._round.numbers.setdefault(key, {})
            sent[rank] = value
            if len(sent) == nodes:
                self._publish(key, str(max(sent.values())))

    def close(self) -> None:
        """End the job: nodes that wait for a round, and those that come later, are sent away."""
        self.is_closed = True
        self._send([member for member, one in self.members.items() if one.turn is not None], closed=True)

    def tick(self, now: float) -> None:
        """Begin the next round if it is complete, and inform nodes that wait; call it after messages and regularly."""
        active = {i: one for i, one in self.members.items() if one.rank is not None and self._is_alive(one, now)}
        joining = [i for i, one in self.members.items() if one.turn is not None and self._is_alive(one, now)]
        if active and "order" not in self._round.values and all(one.rank != 0 for one in active.values()):
            self._publish("order", "")  # the node that was to plan the attempt is lost or silent
        if not self.is_closed and self._is_complete(len(active), len(joining), now):
            self._begin(joining)
            active = {i: self.members[i] for i in self._in_round()}
            joining = [i for i in joining if i not in active]
        self._count(active, joining, now)

    def _is_complete(self, active: int, joining: int, now: float) -> bool:
        if active or joining < self.least:
            self._deadline = None
            return False
        if self._deadline is None:
            self._deadline = now + self.last_call
        return joining >= self.most or now >= self._deadline

    def _begin(self, joining: list[int]) -> None:
        """Begin a round of the nodes that ask for it: first those that have trained, in the order of their ranks."""
        stale = self._in_round()  # silent ones: whoever wakes up later learns that the others have gone on
        why = "the other nodes have begun a round without this node, which was silent"
        self._send(stale, round=self._round.number, key="lost", value=why)
        for member in stale:
            self.members[member].rank = None
        first = sorted(joining, key=self._first_come)[: self.most]
        self._round, self._deadline = _Round(self._round.number + 1), None
        is_fresh = all(self.members[member].is_fresh for member in first)
        counts = {"waiting": 0, "present": len(joining)}
        for rank, member in enumerate(sorted(first, key=self._by_rank)):
            self.members[member].rank, self.members[member].turn = rank, None
            begun = {"round": self._round.number, "rank": rank, "nodes": len(first), "all_fresh": is_fresh}
            self._send([member], **begun, **counts)

    def _first_come(self, member: int) -> tuple[bool, int]:
        one = self.members[member]
        assert one.turn is not None
        return (one.trained is None, one.turn if one.trained is None else one.trained)

    def _by_rank(self, member: int) -> tuple[Any, ...]:
        """Return the key of the order of ranks; neighbours by address follow each other, as networks are laid out."""
        one = self.members[member]
        if one.trained is not None:
            return (0, one.trained, [], one.turn)
        parts = re.split(r"(\d+)", one.address)  # text and numbers take turns: node-2 comes before node-10
        return (1, 0, [int(part) if i % 2 else part for i, part in enumerate(parts)], one.turn)

    def _count(self, active: dict[int, Member], joining: list[int], now: float) -> None:
        """Send the numbers of nodes to those that act on them at once: waiting nodes and group rank 0."""
        counts = {
            "waiting": max(0, min(len(joining), self.most - len(active))),
            "present": len(active) + len(joining),
        }
        if counts != self._counts:
            self._counts, self._uninformed = counts, set(self.members)
        if self._uninformed and now >= self._counts_due:
            concerned = {*joining, *(member for member, one in active.items() if one.rank == 0)}
            if told := sorted(self._uninformed & concerned):
                self._send(told, **counts)
                self._counts_due = now + COUNTS_SECONDS
                self._uninformed -= concerned

    def _is_alive(self, one: Member, now: float) -> bool:
        return now - one.heard <= self.lost_after

    def _is_in(self, member: int, number: int) -> bool:
        return number == self._round.number and self.members[member].rank is not None

    def _in_round(self) -> list[int]:
        return [member for member, one in self.members.items() if one.rank is not None]

    def _publish(self, key: str, value: str) -> None:
        self._round.values[key] = value
        self._send(self._in_round(), round=self._round.number, key=key, value=value)

    def _send(self, members: list[int], **message: Any) -> None:
        if members:
            self.outbox.append((members, message))
