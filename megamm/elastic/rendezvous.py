"""Rendezvous of the nodes of a job in each attempt: a single node, or several through torch's dynamic rendezvous.

After each rendezvous the node of group rank 0 decides for all (agent.py), and the others read its plan from the
rendezvous store. Messages within an attempt also use that store: "this node has lost its ranks", "stop", the steps that
ranks have entered, and "done". If the store's host is lost, every other agent ends with StoreLost, and its launcher
starts a new agent, which looks for the store again.

The endpoint, HOST:PORT, is checked first: a rendezvous store must listen there, and it must serve this job. Otherwise a
port used by another program would cost rendezvous.join_timeout seconds and a restart, each time, and a node with a
different config would train with the others, each rank by its own config.
"""

import contextlib
import datetime
import gc
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from megamm.common import addresses, redact
from megamm.common.errors import UserError

PORT = 29400
"""The default port, the same as torch's."""
_UNLIMITED = 10 * 365 * 86400.0
_ANSWER = 2.0
"""Seconds within which a store must answer."""
_RETRY = 0.5
"""Seconds between two attempts to reach it."""
_RUN_ID = "megamm"
_SHOWN = 3
"""Maximum number of differences between two configs that a message lists."""


class StoreLost(Exception):
    """The rendezvous store does not respond."""


class JobEnded(Exception):
    """The job has ended while this node was waiting to join."""


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

    def join(self) -> tuple[int, int]:
        """Return this node's group rank and the number of nodes in a new round."""

    def agree(self, is_fresh: bool, decide: Callable[[bool], AttemptPlan]) -> AttemptPlan:
        """Return the plan of group rank 0; `decide` gets whether every agent of the round is its launcher's first."""

    def send(self, key: str, value: str) -> None:
        """Send a value to the nodes of this round."""

    def received(self, key: str) -> str | None:
        """Return the value that a node of this round has sent, or None."""

    def increment(self, key: str) -> int:
        """Increment the counter of a key of this round and return it."""

    def waiting(self) -> int:
        """Return the number of nodes that are waiting to join."""

    def present(self) -> int:
        """Return the number of nodes that are in the round or have joined the next one, this one included."""

    def close(self) -> None:
        """End the job: nodes that wait to join exit too."""

    def leave(self) -> None:
        """Leave the job for good; the other nodes notice it by the missing keep-alives."""

    @property
    def hosts_store(self) -> bool:
        """Whether the job's store runs in this process."""

    def serves_others(self) -> bool:
        """Whether other agents are connected to that store."""


class SingleNode:
    """A job of one node: no rendezvous, no store, no torch."""

    address = addresses.LOOPBACK
    interface: str | None = None

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def join(self) -> tuple[int, int]:
        self._values.clear()
        return 0, 1

    def agree(self, is_fresh: bool, decide: Callable[[bool], AttemptPlan]) -> AttemptPlan:
        return decide(is_fresh)

    def send(self, key: str, value: str) -> None:
        self._values[key] = value

    def received(self, key: str) -> str | None:
        return self._values.get(key)

    def increment(self, key: str) -> int:
        count = int(self._values.get(key, "0")) + 1
        self._values[key] = str(count)
        return count

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


class TorchRendezvous:
    """Several nodes, joined by torch's c10d rendezvous; its store runs on the node of `endpoint` (host:port)."""

    KEEP_ALIVES_MISSED = 3
    """After this many missing keep-alives the other nodes regard a node as lost."""

    def __init__(self, endpoint: str, nodes: tuple[int, int], times: Times, job: dict[str, Any]) -> None:
        """job: JSON values that must be equal on all nodes, else UserError."""
        # Imported here to keep the agent of a single node small.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # the agent gives ranks a store (rank.py)
        from torch.distributed.elastic.rendezvous.api import RendezvousError
        from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

        host = parse_endpoint(endpoint)[0]
        _wait_for_host(endpoint)
        check_endpoint(endpoint)
        self.address, self.interface = addresses.own(host), addresses.gloo_interface(host)
        # The agent has the limits (agent.py): torch's would also end a spare, which waits for as long as the job runs.
        seconds = int(max(times.join_timeout, times.lost_timeout)) + 60
        try:
            backend, store = _connect(endpoint, nodes, seconds)
        except RendezvousError as error:
            raise StoreLost(str(error.__cause__ or error)) from None
        self._lost = (RendezvousError, RuntimeError, ValueError)
        self._call(check_same_job, store, endpoint, job)
        self._port: int = store.port  # type: ignore[attr-defined]  # a TCPStore
        unit = datetime.timedelta(seconds=1)
        self._handler = DynamicRendezvousHandler.from_backend(
            _RUN_ID,
            store,
            backend,
            *nodes,
            local_addr=self.address,
            timeout=RendezvousTimeout(join=_UNLIMITED * unit, last_call=times.last_call_timeout * unit),
            keep_alive_interval=times.keep_alive_interval,  # type: ignore[arg-type]  # any number of seconds is one
            keep_alive_max_attempt=self.KEEP_ALIVES_MISSED,
        )
        self._store: Any = None

    def join(self) -> tuple[int, int]:
        from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousGracefulExitError

        try:
            info = self._handler.next_rendezvous()
        except (RendezvousClosedError, RendezvousGracefulExitError):
            raise JobEnded from None
        except self._lost as error:
            raise StoreLost(f"no rendezvous: {type(error).__name__} {error}") from None
        self._store, self._rank, self._nodes = info.store, info.rank, info.world_size
        return info.rank, info.world_size

    def agree(self, is_fresh: bool, decide: Callable[[bool], AttemptPlan]) -> AttemptPlan:
        # Every node says whether it is fresh before group rank 0 decides; `get` waits for a key.
        if self._rank:
            self.send(f"fresh/{self._rank}", str(is_fresh))
            return AttemptPlan(**json.loads(self._call(self._store.get, "order")))
        others = [self._call(self._store.get, f"fresh/{node}") for node in range(1, self._nodes)]
        plan = decide(is_fresh and all(other == b"True" for other in others))
        self.send("order", json.dumps(asdict(plan)))
        return plan

    def send(self, key: str, value: str) -> None:
        self._call(self._store.set, key, value)

    def received(self, key: str) -> str | None:
        return self._call(self._store.get, key).decode() if self._call(self._store.check, [key]) else None

    def increment(self, key: str) -> int:
        return self._call(self._store.add, key, 1)

    def waiting(self) -> int:
        return self._call(self._handler.num_nodes_waiting)

    def present(self) -> int:
        # Torch has no public count. `join` refreshes this copy about once a second, later each keep-alive does.
        state = self._handler._state_holder.state
        return len(state.participants)

    def close(self) -> None:
        self._call(self._handler.shutdown)

    def leave(self) -> None:
        # Without the handler its keep-alives end; its `shutdown` would end the job for all nodes.
        del self._handler
        gc.collect()

    @property
    def hosts_store(self) -> bool:
        return any(one.status == "LISTEN" for one in self._connections())

    def serves_others(self) -> bool:
        connections = self._connections()
        # Both ends of this process's own connection to the store are among them: these do not count.
        own = {one.laddr for one in connections}
        return any(one.laddr.port == self._port and one.raddr and one.raddr not in own for one in connections)

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


def _wait_for_host(endpoint: str) -> None:
    """Return when the host resolves and, unless it is this node, answers; the agent limits the time.

    In Kubernetes a name exists once its pod has started. Torch would print a C++ stack for each failed attempt.
    """
    host, port = parse_endpoint(endpoint)
    while not addresses.is_this_node(host):
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=_ANSWER):
            return
        time.sleep(_RETRY)


def _connect(endpoint: str, nodes: tuple[int, int], seconds: int) -> Any:
    """Return torch's backend and store; the store's server is in this process if the host is this node.

    Torch itself would compare the host with the addresses of this host's name, which must resolve for that.
    """
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend

    def create(is_host: bool) -> Any:
        return create_backend(
            RendezvousParameters("c10d", endpoint, _RUN_ID, *nodes, read_timeout=seconds, is_host=is_host)
        )

    if addresses.is_this_node(parse_endpoint(endpoint)[0]):
        with contextlib.suppress(RendezvousError):  # another agent on this machine has the port: it hosts the store
            return create(True)
    return create(False)


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
        except (StoreLost, JobEnded, UserError, OSError) as error:
            self._error = error

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Return host and port, parsed by torch's rules; UserError if they are missing."""
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    try:
        return parse_rendezvous_endpoint(endpoint, default_port=PORT)
    except ValueError as error:
        raise UserError(f"--rendezvous: {error}", remedy="give HOST:PORT, the same on each node") from None


def check_endpoint(endpoint: str) -> None:
    """Raise UserError if another program uses the port. A free port is fine: this node or another will listen on it."""
    host, port = parse_endpoint(endpoint)
    remedy = "give another port in --rendezvous, below the range of net.ipv4.ip_local_port_range"
    try:
        socket.create_connection((host, port), timeout=_ANSWER).close()
    except ConnectionRefusedError:
        if any(map(addresses.is_of_this_machine, addresses.resolve(host))) and _is_taken(port):
            raise UserError(
                "rendezvous port is in use by another program's connection", where=endpoint, remedy=remedy
            ) from None
    except OSError:
        return  # not reachable yet
    else:
        if not _is_store(host, port):
            raise UserError("rendezvous port is in use by another service", where=endpoint, remedy=remedy)


def _is_taken(port: int) -> bool:
    """Whether an open connection uses the port, which prevents listening on it."""
    import psutil

    there = [one.status for one in psutil.net_connections("tcp") if one.laddr and one.laddr.port == port]
    return psutil.CONN_ESTABLISHED in there and psutil.CONN_LISTEN not in there


def _is_store(host: str, port: int) -> bool:
    from torch.distributed import DistError, TCPStore

    try:
        TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=_ANSWER))
    except DistError as error:
        # Other errors come from stores that have just closed.
        return "Ping failed" not in str(error)
    return True


def check_same_job(store: Any, endpoint: str, ours: dict[str, Any]) -> None:
    """Compare this node's job with that of the first node to join; UserError on a node that differs.

    The job of the other nodes is not affected. store: a torch.distributed.Store; ours: nested JSON values by name.
    """
    first: bytes = store.compare_set("job", "", json.dumps(ours))
    both = json.loads(first), json.loads(json.dumps(ours))
    differences = [f"{name} is {there} there and {here} here" for name, there, here in _differences(*both)]
    if differences:
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise UserError(
            f"this node's job does not match the other nodes': {redact.text('; '.join(differences[:_SHOWN]))}{more}",
            where=endpoint,
            remedy="start every node with the same config; give a different job another port in --rendezvous",
        )


def _differences(theirs: Any, ours: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield the dotted name, the value there and the value here of every difference."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            yield from _differences(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
    elif theirs != ours:
        yield name, json.dumps(theirs), json.dumps(ours)
