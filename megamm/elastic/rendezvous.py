"""Membership of the job in each attempt: a single node, or several through torch's dynamic rendezvous.

After each rendezvous the node of group rank 0 decides for all (agent.py), and the others read its order from the
rendezvous store. Messages within an attempt also use that store: "this node has lost its ranks", "stop", the steps that
ranks have entered, and "done". If the store's host is lost, every other agent ends with StoreLost, and its command
starts a new agent, which looks for the store again.
"""

import datetime
import gc
import json
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from megamm.common.errors import UserError
from megamm.elastic import endpoint


class StoreLost(Exception):
    """The rendezvous store does not respond."""


class Ended(Exception):
    """The job ended while this node was waiting to join."""


@dataclass(frozen=True)
class Order:
    """The decision of group rank 0 for an attempt. nodes: the first `nodes` nodes take part, the others wait.

    gives_up: why there is no further attempt; code: the command's exit code in that case. pause is in seconds.
    address, port: where rank 0's store listens.
    """

    attempt: int
    nodes: int
    pause: float
    address: str
    port: int
    gives_up: str | None = None
    code: int = 0


class Membership(Protocol):
    """One node's view of the job. Every call returns soon, except `join`, which waits for the other nodes."""

    address: str

    def join(self) -> tuple[int, int]:
        """Return this node's group rank and the number of nodes in a new round."""

    def agree(self, is_fresh: bool, decide: Callable[[bool], Order]) -> Order:
        """Return the order of group rank 0; `decide` gets whether every agent of the round is its command's first."""

    def tell(self, key: str, value: str) -> None:
        """Send a value to the nodes of this round."""

    def told(self, key: str) -> str | None:
        """Return the value that a node of this round has sent, or None."""

    def add(self, key: str) -> int:
        """Increment the counter of a key of this round and return it."""

    def waiting(self) -> int:
        """Return the number of nodes that are waiting to join."""

    def close(self) -> None:
        """End the job: nodes that wait to join exit too."""

    def part(self) -> None:
        """Leave the job for good; the other nodes notice it by the missing keep-alives."""

    @property
    def hosts_store(self) -> bool:
        """Whether the job's store runs in this process."""

    def serves(self) -> bool:
        """Whether other agents are connected to that store."""


class Alone:
    """One node: no rendezvous, no store, no torch."""

    address = "127.0.0.1"

    def __init__(self) -> None:
        self._told: dict[str, str] = {}

    def join(self) -> tuple[int, int]:
        self._told.clear()
        return 0, 1

    def agree(self, is_fresh: bool, decide: Callable[[bool], Order]) -> Order:
        return decide(is_fresh)

    def tell(self, key: str, value: str) -> None:
        self._told[key] = value

    def told(self, key: str) -> str | None:
        return self._told.get(key)

    def add(self, key: str) -> int:
        count = int(self._told.get(key, "0")) + 1
        self._told[key] = str(count)
        return count

    def waiting(self) -> int:
        return 0

    def close(self) -> None: ...

    def part(self) -> None: ...

    hosts_store = False

    def serves(self) -> bool:
        return False


@dataclass(frozen=True)
class Times:
    """Timeouts of a rendezvous, in seconds: see ResilienceConfig."""

    join_timeout: float
    last_call_timeout: float
    keep_alive_interval: float


class Rendezvous:
    """Several nodes, joined by torch's c10d rendezvous; its store runs on the node given by `place` (host:port)."""

    KEEP_ALIVES_MISSED = 3

    def __init__(self, place: str, nodes: tuple[int, int], times: Times, job: dict[str, Any]) -> None:
        """job: JSON values that must be equal on all nodes, else UserError (endpoint.py)."""
        # Imported here to keep the agent of a single node small.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # the agent gives ranks a store (rank.py)
        from torch.distributed.elastic.rendezvous import RendezvousParameters
        from torch.distributed.elastic.rendezvous.api import RendezvousError
        from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
        from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

        endpoint.check(place)
        is_local = endpoint.parse(place)[0] in ("127.0.0.1", "localhost")
        self.address = "127.0.0.1" if is_local else socket.getfqdn()
        parameters = RendezvousParameters("c10d", place, "megamm", *nodes, read_timeout=int(times.join_timeout))
        try:
            backend, store = create_backend(parameters)
        except RendezvousError as error:
            raise StoreLost(str(error.__cause__ or error)) from None
        self._lost = (RendezvousError, RuntimeError, ValueError)
        self._call(endpoint.agree, store, place, job)
        self._port: int = store.port  # type: ignore[attr-defined]  # a TCPStore
        seconds = datetime.timedelta(seconds=1)
        self._handler = DynamicRendezvousHandler.from_backend(
            parameters.run_id,
            store,
            backend,
            *nodes,
            local_addr=self.address,
            timeout=RendezvousTimeout(join=times.join_timeout * seconds, last_call=times.last_call_timeout * seconds),
            keep_alive_interval=times.keep_alive_interval,  # type: ignore[arg-type]  # any number of seconds is one
            keep_alive_max_attempt=self.KEEP_ALIVES_MISSED,
        )
        self._store: Any = None

    def join(self) -> tuple[int, int]:
        from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousGracefulExitError

        try:
            info = self._handler.next_rendezvous()
        except (RendezvousClosedError, RendezvousGracefulExitError):
            raise Ended from None
        except self._lost as error:
            raise StoreLost(f"no rendezvous: {type(error).__name__} {error}") from None
        self._store, self._rank, self._nodes = info.store, info.rank, info.world_size
        return info.rank, info.world_size

    def agree(self, is_fresh: bool, decide: Callable[[bool], Order]) -> Order:
        if self._rank:
            self.tell(f"fresh/{self._rank}", str(is_fresh))
            return Order(**json.loads(self._call(self._store.get, "order")))
        others = [self._call(self._store.get, f"fresh/{node}") for node in range(1, self._nodes)]
        order = decide(is_fresh and all(other == b"True" for other in others))
        self.tell("order", json.dumps(asdict(order)))
        return order

    def tell(self, key: str, value: str) -> None:
        self._call(self._store.set, key, value)

    def told(self, key: str) -> str | None:
        return self._call(self._store.get, key).decode() if self._call(self._store.check, [key]) else None

    def add(self, key: str) -> int:
        return self._call(self._store.add, key, 1)

    def waiting(self) -> int:
        return self._call(self._handler.num_nodes_waiting)

    def close(self) -> None:
        self._call(self._handler.shutdown)

    def part(self) -> None:
        del self._handler  # this ends its keep-alives
        gc.collect()

    @property
    def hosts_store(self) -> bool:
        return any(one.status == "LISTEN" for one in self._connections())

    def serves(self) -> bool:
        all_of_it = self._connections()
        own = {one.laddr for one in all_of_it}
        return any(one.laddr.port == self._port and one.raddr and one.raddr not in own for one in all_of_it)

    def _connections(self) -> list[Any]:
        """Return this process's sockets that have the store's port at either end."""
        import psutil

        found = psutil.Process().net_connections("tcp")
        return [one for one in found if self._port in (one.laddr.port, one.raddr.port if one.raddr else None)]

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._lost as error:
            raise StoreLost(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


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
        except (StoreLost, Ended, UserError, OSError) as error:
            self._error = error

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result
