"""Rendezvous of the nodes of a job in each attempt: what an agent asks of it, and the rendezvous of a single node.

Several nodes have a server in the agent on the host of --rendezvous (rendezvous_server.py), to which the agent of each
node is connected (rendezvous_client.py). After each rendezvous the node of group rank 0 decides for all (agent.py).
Messages within an attempt go through the server too: "this node has lost its ranks", "stop", the steps that ranks have
entered, and "done". If the server is lost, every other agent ends with StoreLost, and its launcher starts a new agent,
which looks for the server again.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from megamm.common import addresses
from megamm.common.errors import UserError


class StoreLost(Exception):
    """The server of the rendezvous does not respond."""


class JobEnded(Exception):
    """The job has ended while this node was waiting to join."""


class RoundBroken(Exception):
    """The round ended before its attempt began; the nodes join again."""


@dataclass(frozen=True)
class AttemptPlan:
    """The plan of group rank 0 for an attempt. nodes: the first `nodes` nodes take part, the others wait.

    gives_up: why there is no further attempt; code: the exit code in that case. pause is in seconds.
    address, port: where rank 0's store listens.
    """

    attempt: int
    nodes: int
    pause: float
    address: str
    port: int
    gives_up: str | None = None
    code: int = 0


class Rendezvous(Protocol):
    """One node's view of the job. Every call returns soon, except `join`, which waits for the other nodes."""

    address: str
    """This node's address for the others."""
    interface: str | None
    """The network interface that gloo must be told; None if it finds one."""

    def join(self, is_fresh: bool) -> tuple[int, int]:
        """Return this node's group rank and the number of nodes in a new round.

        is_fresh: this agent is its launcher's first, and has made no attempt.
        """

    def agree(self, decide: Callable[[bool], AttemptPlan]) -> AttemptPlan:
        """Return the plan of group rank 0; `decide` gets whether every agent of the round is fresh."""

    def send(self, key: str, value: str) -> None:
        """Send a value to the nodes of this round; the first value of a key stays."""

    def received(self, key: str) -> str | None:
        """Return the value that a node of this round has sent, or None."""

    def maximum(self, key: str, value: int, nodes: int) -> int | None:
        """Return the largest value of a key, None until each of the first `nodes` nodes of this round has given one.

        The first call gives this node's value.
        """

    def lost_nodes(self) -> dict[int, str]:
        """Return the nodes of this round whose connection has ended: group rank -> address and cause."""

    def waiting(self) -> int:
        """Return the number of nodes that are waiting to join."""

    def present(self) -> int:
        """Return the number of nodes that are in the round or have joined the next one, this one included."""

    def close(self) -> None:
        """End the job: nodes that wait to join exit too."""

    def leave(self) -> None:
        """Leave the job in order; no call but `hosts_store` and `serves_others` is valid after it."""

    @property
    def hosts_store(self) -> bool:
        """Whether the job's server runs in this process."""

    def serves_others(self) -> bool:
        """Whether agents are connected to that server."""


class SingleNode:
    """A job of one node: no rendezvous and no server."""

    address = addresses.LOOPBACK
    interface: str | None = None

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._is_fresh = True

    def join(self, is_fresh: bool) -> tuple[int, int]:
        self._values.clear()
        self._is_fresh = is_fresh
        return 0, 1

    def agree(self, decide: Callable[[bool], AttemptPlan]) -> AttemptPlan:
        return decide(self._is_fresh)

    def send(self, key: str, value: str) -> None:
        self._values.setdefault(key, value)

    def received(self, key: str) -> str | None:
        return self._values.get(key)

    def maximum(self, key: str, value: int, nodes: int) -> int | None:
        return value

    def lost_nodes(self) -> dict[int, str]:
        return {}

    def waiting(self) -> int:
        return 0

    def present(self) -> int:
        return 1

    def close(self) -> None: ...

    def leave(self) -> None: ...

    hosts_store = False

    def serves_others(self) -> bool:
        return False


@dataclass(frozen=True)
class Times:
    """Timeouts of a rendezvous, in seconds: see ResilienceConfig."""

    join_timeout: float
    lost_timeout: float
    last_call_timeout: float
    keep_alive_interval: float


class Background:
    """Runs a blocking call in a thread, so that its caller can do other work meanwhile."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._result: Any = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], Any]) -> None:
        try:
            self._result = function()
        except (StoreLost, JobEnded, RoundBroken, UserError, OSError) as error:
            self._error = error

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result
