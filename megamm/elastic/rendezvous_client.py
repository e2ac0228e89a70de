"""A node's side of the rendezvous of several nodes: one connection to the server, kept by a thread.

What the server sends is kept here, so that asking costs nothing: an attempt without a change costs one keep-alive an
interval. If the connection ends, every call raises StoreLost.
"""

import contextlib
import json
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from megamm.common import addresses, redact
from megamm.common.errors import UserError
from megamm.elastic import endpoint as endpoints
from megamm.elastic.membership import Membership
from megamm.elastic.rendezvous import AttemptPlan, JobEnded, RoundBroken, StoreLost, Times
from megamm.elastic.rendezvous_server import RendezvousServer, digest, prepare

log = logging.getLogger(__name__)
KEEP_ALIVES_MISSED = 3
"""After this many missing keep-alives a node is regarded as lost."""
_ANSWER = 10.0
"""Seconds within which the server must answer; all nodes of a job may come at once."""
_RETRY = 0.5
"""Seconds between two attempts to reach it."""
_SILENT = 60.0
"""Seconds after which a server that sends nothing is lost: keep-alives are answered."""
_UNFRIENDLY = 5
"""So many connections in a row that end without an answer are to another service."""
_SHOWN = 3
"""Maximum number of differences between two configs that a message lists."""


class MultiNode:
    """Several nodes; their server runs in the agent of the node of `endpoint` (host:port) that comes first."""

    def __init__(self, endpoint: str, nodes: tuple[int, int], times: Times, job: dict[str, Any]) -> None:
        """Return when the server is reached; the agent limits the time.

        job: JSON values that must be equal on all nodes, else UserError.
        """
        self.endpoint = endpoint
        self.host = endpoints.parse_endpoint(endpoint)[0]
        self._nodes, self._times = nodes, times
        self._job: dict[str, Any] = json.loads(json.dumps(job))  # as the other side reads it: lists for tuples
        self._server: RendezvousServer | None = None
        self._connection, rest = self._connect()
        self.address, self.interface = addresses.own(self.host), addresses.gloo_interface(self.host)
        self._changed = threading.Condition()
        self._gone: str | None = None
        """Why the connection has ended."""
        self._is_closed = False
        self._counts = (0, 1)
        self._begun: dict[str, Any] | None = None
        """The message that began the round; None while this node waits for one."""
        self._values: dict[str, str] = {}
        self._lost: dict[int, str] = {}
        self._sent: set[str] = set()
        self._trained: int | None = None
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._listen, args=(rest,), daemon=True, name="rendezvous")
        self._thread.start()

    def join(self, is_fresh: bool) -> tuple[int, int]:
        with self._changed:
            self._begun = None
        self._send(do="join", is_fresh=is_fresh, trained=self._trained)
        with self._changed:
            self._changed.wait_for(lambda: self._gone or self._is_closed or self._begun)
            if self._is_closed and not self._begun:
                raise JobEnded
            begun = self._round()
            return begun["rank"], begun["nodes"]

    def agree(self, decide: Callable[[bool], AttemptPlan]) -> AttemptPlan:
        with self._changed:
            begun = self._round()
        if begun["rank"] == 0:
            self.send("order", json.dumps(asdict(decide(begun["all_fresh"]))))
        # Group rank 0 also waits for it: the others may have given it up meanwhile.
        with self._changed:
            self._changed.wait_for(lambda: self._gone or "order" in self._values or "lost" in self._values)
            self._round()
            order = self._values.get("order")
        if not order:
            raise RoundBroken("the node that plans the attempt is lost")
        plan = AttemptPlan(**json.loads(order))
        self._trained = begun["rank"] if begun["rank"] < plan.nodes else None
        return plan

    def send(self, key: str, value: str) -> None:
        self._send(do="put", round=self._round()["round"], key=key, value=value)

    def received(self, key: str) -> str | None:
        with self._changed:
            self._round()
            return self._values.get(key)

    def maximum(self, key: str, value: int, nodes: int) -> int | None:
        if key not in self._sent:
            self._sent.add(key)
            self._send(do="largest", round=self._round()["round"], key=key, value=value, nodes=nodes)
        found = self.received(key)
        return None if found is None else int(found)

    def lost_nodes(self) -> dict[int, str]:
        with self._changed:
            self._round()
            return dict(self._lost)

    def waiting(self) -> int:
        return self._numbers()[0]

    def present(self) -> int:
        return self._numbers()[1]

    def close(self) -> None:
        self._send(do="close")

    def leave(self) -> None:
        with contextlib.suppress(StoreLost):
            self._send(do="leave")
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    @property
    def hosts_store(self) -> bool:
        return self._server is not None

    def serves_others(self) -> bool:
        return self._server is not None and self._server.serves_others()

    def _round(self) -> dict[str, Any]:
        """Return the message that began this round; StoreLost if the connection has ended."""
        if self._gone is not None:
            raise StoreLost(self._gone)
        assert self._begun is not None
        return self._begun

    def _numbers(self) -> tuple[int, int]:
        with self._changed:
            if self._gone is not None:
                raise StoreLost(self._gone)
            return self._counts

    def _connect(self) -> tuple[socket.socket, bytes]:
        """Return a connection that has been greeted, and what came after the greeting.

        In Kubernetes a name exists once its pod has started, so everything is looked up again at each attempt.
        """
        unfriendly, is_reported = 0, False
        while True:
            try:
                connection = socket.create_connection(endpoints.parse_endpoint(self.endpoint), timeout=_ANSWER)
            except OSError:
                if self._server is None and (listener := endpoints.listen(self.endpoint)) is not None:
                    lost_after = KEEP_ALIVES_MISSED * self._times.keep_alive_interval
                    membership = Membership(self._nodes, self._times.last_call_timeout, lost_after)
                    self._server = RendezvousServer(listener, membership, self._job)
                else:
                    time.sleep(_RETRY)
                continue
            try:
                return connection, self._greeted(connection)
            except TimeoutError:
                if not is_reported:
                    log.warning("%s accepts connections but does not answer", self.endpoint)
                is_reported = True
            except (OSError, EOFError):
                unfriendly += 1
                if unfriendly == _UNFRIENDLY:
                    raise self._another_service() from None
                time.sleep(_RETRY)
            connection.close()

    def _greeted(self, connection: socket.socket) -> bytes:
        """Exchange greetings; return what came after the answer. UserError if the other side is not of this job."""
        hello = {"do": "hello", "job": digest(self._job), "address": addresses.own(self.host)}
        connection.sendall(json.dumps(hello).encode() + b"\n")
        data = b""
        while b"\n" not in data:
            received = connection.recv(65536)
            if not received and not data:
                raise EOFError
            if not received or not (data + received).startswith(b"{"):
                raise self._another_service()
            data += received
        line, _, rest = data.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            raise self._another_service() from None
        if "job" in answer:
            check_same_job(answer["job"], self.endpoint, self._job)
        if "hello" not in answer:
            raise self._another_service()
        prepare(connection)
        connection.settimeout(None)
        return rest

    def _another_service(self) -> UserError:
        what = "rendezvous port is in use by another service"
        return UserError(what, where=self.endpoint, remedy=endpoints.OTHER_PORT)

    def _send(self, **message: Any) -> None:
        try:
            with self._sending:
                self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise StoreLost(self._gone or f"{self.endpoint}: {error.strerror}") from None

    def _listen(self, data: bytes) -> None:
        """Read messages and send keep-alives until the connection ends."""
        why = "its process has exited"
        try:
            self._exchange(data)
        except StoreLost as error:
            why = str(error)
        except OSError as error:
            why = str(error.strerror)
        with self._changed:
            self._gone = f"{self.endpoint}: {why}"
            self._changed.notify_all()
        self._connection.close()

    def _exchange(self, data: bytes) -> None:
        """Return at the end of the connection; OSError or StoreLost if it fails."""
        poll = select.poll()  # not select(), which knows only 1,024 descriptors: this process may have the server's
        poll.register(self._connection, select.POLLIN)
        heard = due = time.monotonic()
        while True:
            *lines, data = data.split(b"\n")
            if lines:
                with self._changed:
                    for line in lines:
                        self._take(json.loads(line))
                    self._changed.notify_all()
            now = time.monotonic()
            if now >= due:
                self._send(do="alive")
                due = now + self._times.keep_alive_interval
            if poll.poll(1000 * (due - now) if due > now else 0):
                received = self._connection.recv(65536)
                if not received:
                    return
                data, heard = data + received, time.monotonic()
            elif time.monotonic() - heard > _SILENT:
                raise StoreLost(f"no answer for {_SILENT:g} s")

    def _take(self, message: dict[str, Any]) -> None:
        if "present" in message:
            self._counts = message["waiting"], message["present"]
        if "rank" in message:
            self._begun, self._values, self._lost, self._sent = message, {}, {}, set()
        elif "closed" in message:
            self._is_closed = True
        elif self._begun is not None and message.get("round") == self._begun["round"]:
            if "key" in message:
                self._values[message["key"]] = message["value"]
            else:
                self._lost[message["lost"]] = message["why"]


def check_same_job(theirs: dict[str, Any], endpoint: str, ours: dict[str, Any]) -> None:
    """Compare this node's job with that of the server; UserError on a node that differs.

    The job of the other nodes is not affected. Both are nested JSON values by name.
    """
    differences = [f"{name} is {there} there and {here} here" for name, there, here in _differences(theirs, ours)]
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
