"""Server of the rendezvous: a thread of the agent on the host of --rendezvous, to which every agent holds a connection.

Messages are lines of JSON; membership.py has their meaning. From an agent:

    {"do": "hello", "job": DIGEST, "address": ADDRESS}    first; the answer is {"hello": true}, or {"job": JOB} if the
                                                          job of this server is another one
    {"do": "join", "is_fresh": BOOL, "trained": RANK}     asks for the next round
    {"do": "put" | "largest", ...}                        values for the nodes of its round
    {"do": "alive"}, {"do": "close"}, {"do": "leave"}

To an agent: {"round", "rank", "nodes", "all_fresh"} begins a round, {"round", "key", "value"} is a value of that round,
{"round", "lost", "why"} a lost node of it, {"waiting", "present"} are numbers of nodes, {"closed"} ends the job.

No request makes the server wait, look up a name or run code of its sender. A connection that sends anything else is
closed; that does not affect the others.
"""

import contextlib
import hashlib
import json
import logging
import resource
import selectors
import socket
import threading
import time
from typing import Any

from megamm.elastic.membership import Membership

log = logging.getLogger(__name__)
UNACKNOWLEDGED = 30.0
"""Seconds after which a connection whose data is not acknowledged has ended; it survives shorter cuts."""
_TICK = 0.02
"""Shortest time between two looks at the state, in seconds: what comes within it is handled together."""
_IDLE = 0.2
_LINE, _PENDING = 1 << 20, 1 << 26
"""Longest line from an agent, and most data that may wait for one, in bytes."""
_CHUNK = 1 << 16


def prepare(connection: socket.socket) -> None:
    """Set the options of a connection between an agent and the server."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * UNACKNOWLEDGED))


def digest(job: dict[str, Any]) -> str:
    """Return the digest by which nodes compare their jobs."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


class _Visitor:
    """A connection. member: its id in the membership, None before its hello."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.member: int | None = None
        self.inbox, self.outbox = bytearray(), bytearray()


class RendezvousServer:
    """Serves a job from a listening socket until `stop`, or until its process exits. `requests` counts messages."""

    def __init__(self, listener: socket.socket, membership: Membership, job: dict[str, Any]) -> None:
        """job: JSON values that must be equal on all nodes."""
        self.membership, self.requests = membership, 0
        self._job, self._digest = job, digest(job)
        self._listener = listener
        self._visitors: dict[int, _Visitor] = {}
        self._connected = 0
        self._ticked = 0.0
        self._is_due = False
        """Whether messages have come since the last look at the state."""
        self._waker, self._wakes = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for one in (listener, self._wakes):
            one.setblocking(False)
            self._selector.register(one, selectors.EVENT_READ, one)
        # A descriptor for each node; the usual soft limit is 1,024.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._thread = threading.Thread(target=self._run, daemon=True, name="rendezvous server")
        self._thread.start()

    def serves_others(self) -> bool:
        """Whether agents are connected."""
        return bool(self.membership.members)

    def stop(self) -> None:
        """Close all connections."""
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._serve():
                pass
        finally:
            # Whatever ended this thread, the agents see it at once.
            for key in [*self._selector.get_map().values()]:
                key.fileobj.close()  # type: ignore[union-attr]  # all are sockets
            self._selector.close()
            self._waker.close()

    def _serve(self) -> bool:
        """Handle what has come; return False to stop."""
        for key, mask in self._selector.select(_TICK if self._is_due else _IDLE):
            self._is_due = True
            if key.data is self._wakes:
                return False
            if key.data is self._listener:
                self._accept()
                continue
            visitor: _Visitor = key.data
            if mask & selectors.EVENT_WRITE:
                self._flush(visitor)
            if mask & selectors.EVENT_READ:
                self._read(visitor)
        # After a pause of this process, messages that came meanwhile have been read before anyone is judged.
        now = time.monotonic()
        if not self._is_due or now - self._ticked >= _TICK:
            self._ticked, self._is_due = now, False
            self.membership.tick(now)
        self._deliver()
        return True

    def _accept(self) -> None:
        for _ in range(64):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # no descriptor left, or the visitor has gone
                log.warning("rendezvous: cannot accept a connection: %s", error.strerror)
                return
            connection.setblocking(False)
            prepare(connection)
            self._selector.register(connection, selectors.EVENT_READ, _Visitor(connection))

    def _read(self, visitor: _Visitor) -> None:
        try:
            data = visitor.connection.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(visitor, f"its connection failed: {error.strerror}")
            return
        if not data:
            self._drop(visitor, "its agent has exited")
            return
        visitor.inbox += data
        *lines, rest = visitor.inbox.split(b"\n")
        visitor.inbox = rest
        try:
            for line in lines:
                self.requests += 1
                self._handle(visitor, json.loads(line))
            if len(rest) > _LINE:
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            self._drop(visitor, "it has sent an invalid message")

    def _handle(self, visitor: _Visitor, message: dict[str, Any]) -> None:
        """Handle one message; an exception that `_read` expects if it is not valid."""
        what, member = message["do"], visitor.member
        if member is None:
            if what != "hello":
                raise ValueError
            self._greet(visitor, message)
        elif what == "alive":
            self.membership.alive(member, time.monotonic())
        elif what == "join":
            trained = message["trained"]
            self.membership.join(member, bool(message["is_fresh"]), None if trained is None else int(trained))
        elif what == "put":
            self.membership.put(member, message["round"], str(message["key"]), str(message["value"]))
        elif what == "largest":
            key, value, nodes = str(message["key"]), int(message["value"]), int(message["nodes"])
            self.membership.largest(member, message["round"], key, value, nodes)
        elif what == "close":
            self.membership.close()
        elif what == "leave":
            self.membership.leave(member)
            del self._visitors[member]
            visitor.member = None
        else:
            raise ValueError

    def _greet(self, visitor: _Visitor, message: dict[str, Any]) -> None:
        if message["job"] != self._digest:
            self._queue(visitor, {"job": self._job})
            return
        self._connected += 1
        visitor.member = self._connected
        self._visitors[visitor.member] = visitor
        self._queue(visitor, {"hello": True})
        self.membership.connect(visitor.member, str(message["address"]), time.monotonic())

    def _deliver(self) -> None:
        """Send what the membership has to say. A failed connection is lost, which may concern others: again."""
        while self.membership.outbox:
            outbox, self.membership.outbox = self.membership.outbox, []
            for members, message in outbox:
                line = _line(message)
                for member in members:
                    if member in self._visitors:
                        self._queue(self._visitors[member], line)

    def _queue(self, visitor: _Visitor, message: bytes | dict[str, Any]) -> None:
        is_idle = not visitor.outbox
        visitor.outbox += message if isinstance(message, bytes) else _line(message)
        if is_idle:
            self._flush(visitor)
        elif len(visitor.outbox) > _PENDING:
            self._drop(visitor, "it does not read what it is sent")

    def _flush(self, visitor: _Visitor) -> None:
        try:
            sent = visitor.connection.send(visitor.outbox)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._drop(visitor, f"its connection failed: {error.strerror}")
            return
        del visitor.outbox[:sent]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if visitor.outbox else 0)
        if self._selector.get_key(visitor.connection).events != events:
            self._selector.modify(visitor.connection, events, visitor)

    def _drop(self, visitor: _Visitor, why: str) -> None:
        """Close a connection and lose its node. It may be called again for the same one."""
        if visitor.connection.fileno() < 0:
            return
        self._selector.unregister(visitor.connection)
        visitor.connection.close()
        if visitor.member is not None:
            self._visitors.pop(visitor.member, None)
            self.membership.lose(visitor.member, why)
            visitor.member = None


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
