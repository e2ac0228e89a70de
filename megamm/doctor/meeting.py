"""Where nodes meet before a run: a torch store on the node that HOST:PORT names, without torch's rendezvous.

That would need clocks which agree, and whether they do is to be found out. The hosting node is rank 0, the others are
numbered as they come; times in seconds.
"""

import datetime
import json
import socket
import time
from typing import Any

from megamm.resilience import endpoint
from megamm.resilience.supervisor import Nodes

PINGS = 5
TURN, ANSWER = 600.0, 20.0
"""Until the other nodes are through with what comes before; until a node that is there does the next thing."""
LEAVE = 10.0


class Lost(Exception):
    """The nodes do not meet, or part too early."""


class Meeting:
    """One node's view. Lost if the others are not there within `join` seconds, or no longer."""

    def __init__(self, nodes: Nodes, join: float) -> None:
        import torch.distributed as dist

        assert nodes.rendezvous is not None
        self.host, self.port = endpoint.parse(nodes.rendezvous)
        self.deadline = time.monotonic() + join
        self.failures = (RuntimeError, ValueError)
        listener = _listener(self.host, self.port)
        limit = datetime.timedelta(seconds=max(join, 1.0))
        own: dict[str, Any] = {} if listener is None else {"master_listen_fd": listener.detach()}
        try:
            self.store = dist.TCPStore(
                self.host, self.port, is_master=listener is not None, wait_for_workers=False, timeout=limit, **own
            )
            self.rank = 0 if listener is not None else self.store.add("arrived", 1)
        except self.failures:
            raise Lost(f"{nodes.rendezvous} does not answer within {join:g} s") from None

    def gather(self, nodes: Nodes, own: dict[str, Any]) -> list[dict[str, Any]]:
        """What every node brings, by rank; on rank 0 only, [] elsewhere. Lost if fewer than nodes.least are there."""
        self.tell(f"node/{self.rank}", own)
        if self.rank == 0:
            while self.store.add("arrived", 0) < nodes.most - 1 and time.monotonic() < self.deadline:
                time.sleep(0.05)
            size = 1 + self.store.add("arrived", 0)
            self.tell("size", size)
        else:
            size = self.hear("size", TURN)
        if size < nodes.least:
            raise Lost(f"only {size} of {nodes.least} nodes came in time")
        if self.rank >= size:
            raise Lost("this node came too late")
        return [self.hear(f"node/{rank}", TURN) for rank in range(size)] if self.rank == 0 else []

    def clocks(self, size: int) -> list[float | None]:
        """Seconds that each node's clock is ahead of this one's, None for a node that does not answer any more; called
        on rank 0 while the others call `tell_time`.

        Cristian (1989): of several questions, the one that was answered soonest tells best.
        """
        ahead: list[float | None] = [0.0]
        for rank in range(1, size):
            self.tell(f"turn/{rank}", True)
            try:
                for ping in range(PINGS):
                    self.hear(f"ping/{rank}/{ping}", ANSWER)
                    self.tell(f"pong/{rank}/{ping}", time.time())
                ahead.append(self.hear(f"ahead/{rank}", ANSWER))
            except Lost:
                ahead.append(None)
        return ahead

    def tell_time(self) -> None:
        """The other side of `clocks`."""
        self.hear(f"turn/{self.rank}", TURN)
        found = []
        for ping in range(PINGS):
            asked, begin = time.time(), time.monotonic()
            self.tell(f"ping/{self.rank}/{ping}", True)
            answer = self.hear(f"pong/{self.rank}/{ping}", TURN)
            seconds = time.monotonic() - begin
            found.append((seconds, asked + seconds / 2 - answer))
        self.tell(f"ahead/{self.rank}", min(found)[1])

    def tell(self, key: str, value: Any) -> None:
        try:
            self.store.set(key, json.dumps(value))
        except self.failures:
            raise Lost(f"{self.host}:{self.port} does not answer any more") from None

    def hear(self, key: str, seconds: float) -> Any:
        """Wait for it."""
        try:
            self.store.wait([key], datetime.timedelta(seconds=seconds))
            return json.loads(self.store.get(key))
        except self.failures:
            raise Lost(f"no answer from the other nodes ({key})") from None

    def part(self, size: int) -> None:
        """Rank 0, which has the store, leaves first: so a command that follows on another node cannot take the store
        of this meeting for that of its own."""
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
            return  # it has left


def _listener(host: str, port: int) -> socket.socket | None:
    """The store's socket, if `host` is this node and no other process has the port (two "nodes" of one machine)."""
    try:
        socket.create_server((host, 0)).close()
        is_loopback = socket.gethostbyname(host).startswith("127.") and host in ("127.0.0.1", "localhost")
        # A host's own name may be an address of its loopback (Debian), where no other node could come.
        return socket.create_server((host if is_loopback else "", port), backlog=1024)
    except OSError:
        return None
