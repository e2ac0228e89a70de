"""Meeting of nodes before a run: a torch store on the node of HOST:PORT, with a rank for each of them.

The hosting node is rank 0, the others are
numbered in the order of arrival; times in seconds.
"""

import datetime
import json
import socket
import time
from typing import Any

from megamm.common import addresses
from megamm.elastic.endpoint import parse_endpoint
from megamm.elastic.launcher import Nodes

PINGS = 5
TURN, ANSWER = 600.0, 20.0
"""Time limits: until the other nodes have finished their turns; until a node that has joined answers."""
LEAVE = 10.0
"""Time limit for leaving in the right order."""


class Lost(Exception):
    """The nodes could not connect, or one of them left too early."""


class Meeting:
    """One node's view. Raises Lost if the others do not join within `join` seconds, or stop responding."""

    def __init__(self, nodes: Nodes, join: float) -> None:
        import torch.distributed as dist

        assert nodes.rendezvous is not None
        self.host, self.port = parse_endpoint(nodes.rendezvous)
        self.deadline = time.monotonic() + join
        self.failures = (RuntimeError, ValueError)
        listener = _listener(self.host, self.port)
        limit = datetime.timedelta(seconds=max(join, 1.0))
        # The node that could open the socket hosts the store; torch takes over the descriptor.
        own: dict[str, Any] = {} if listener is None else {"master_listen_fd": listener.detach()}
        try:
            self.store = dist.TCPStore(
                self.host, self.port, is_master=listener is not None, wait_for_workers=False, timeout=limit, **own
            )
            self.rank = 0 if listener is not None else self.store.add("arrived", 1)
        except self.failures:
            raise Lost(f"no response from {nodes.rendezvous} within {join:g} s") from None

    def gather(self, nodes: Nodes, own: dict[str, Any]) -> list[dict[str, Any]]:
        """Collect `own` of all nodes by rank on rank 0, [] elsewhere. Raises Lost if fewer than nodes.least join."""
        self.send(f"node/{self.rank}", own)
        if self.rank == 0:
            while self.store.add("arrived", 0) < nodes.most - 1 and time.monotonic() < self.deadline:
                time.sleep(0.05)
            size = 1 + self.store.add("arrived", 0)  # later arrivals get a rank that is too large
            self.send("size", size)
        else:
            size = self.receive("size", TURN)
        if size < nodes.least:
            raise Lost(f"only {size} of {nodes.least} nodes joined in time")
        if self.rank >= size:
            raise Lost("this node joined too late")
        return [self.receive(f"node/{rank}", TURN) for rank in range(size)] if self.rank == 0 else []

    def clocks(self, size: int) -> list[float | None]:
        """Return how many seconds each node's clock is ahead of this one's, None for a node that stopped responding.

        Called on rank 0 while the others call `tell_time`. Cristian (1989): of several requests, the one with the
        shortest round trip gives the best estimate.
        """
        ahead: list[float | None] = [0.0]
        for rank in range(1, size):
            self.send(f"turn/{rank}", True)
            try:
                for ping in range(PINGS):
                    self.receive(f"ping/{rank}/{ping}", ANSWER)
                    self.send(f"pong/{rank}/{ping}", time.time())
                ahead.append(self.receive(f"ahead/{rank}", ANSWER))
            except Lost:
                ahead.append(None)
        return ahead

    def tell_time(self) -> None:
        """Answer `clocks` of rank 0."""
        self.receive(f"turn/{self.rank}", TURN)
        found = []
        for ping in range(PINGS):
            asked, begin = time.time(), time.monotonic()
            self.send(f"ping/{self.rank}/{ping}", True)
            answer = self.receive(f"pong/{self.rank}/{ping}", TURN)
            seconds = time.monotonic() - begin
            found.append((seconds, asked + seconds / 2 - answer))
        self.send(f"ahead/{self.rank}", min(found)[1])

    def send(self, key: str, value: Any) -> None:
        try:
            self.store.set(key, json.dumps(value))
        except self.failures:
            raise Lost(f"{self.host}:{self.port} stopped responding") from None

    def receive(self, key: str, seconds: float) -> Any:
        """Wait for the value of a key and return it."""
        try:
            self.store.wait([key], datetime.timedelta(seconds=seconds))
            return json.loads(self.store.get(key))
        except self.failures:
            raise Lost(f"no answer from the other nodes ({key})") from None

    def leave(self, size: int) -> None:
        """Leave the meeting; rank 0, which hosts the store, leaves first.

        So the next command on another node cannot connect to the store of this meeting.
        """
        deadline = time.monotonic() + LEAVE
        try:
            if self.rank == 0:
                while self.store.add("left", 0) < size - 1 and time.monotonic() < deadline:
                    time.sleep(0.02)
                return
            self.store.add("left", 1)
            while time.monotonic() < deadline:
                socket.create_connection((self.host, self.port), timeout=1.0).close()
                time.sleep(0.05)
        except (OSError, *self.failures):
            return  # rank 0 has left


def _listener(host: str, port: int) -> socket.socket | None:
    """Open the store's socket, if `host` is this node and the port is free (two "nodes" may share a machine)."""
    if not addresses.is_this_node(host):
        return None
    try:
        # A host's own name may resolve to loopback (Debian), which other nodes cannot reach.
        return socket.create_server((host if addresses.is_local(host) else "", port), backlog=1024)
    except OSError:
        return None
