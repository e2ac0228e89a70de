"""The agent's side of a node's ranks: the prefork parent that forks them, their shared memory, and their exit."""

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Sequence
from typing import Any

from megamm.common.processes import SWEEP_SECONDS
from megamm.elastic.fork_server import MESSAGE_BYTES
from megamm.elastic.rank_status import HeartbeatPage


class PreforkParentLost(Exception):
    """The prefork parent has exited, and with it every rank; the next start creates a new one."""


class Workers:
    """The local ranks. Call all methods from the agent's main thread (the kernel kills a child when that one exits)."""

    def __init__(self, ranks: int, requests: socket.socket) -> None:
        """requests: socket to the launcher, to request prefork parents (fork_server.py)."""
        self.requests, self.page = requests, HeartbeatPage.create(ranks)
        self.dumps = [os.memfd_create(f"megamm-stacks-{index}") for index in range(ranks)]
        self.pids: list[int] = []
        self.ended: dict[int, int] = {}
        self._channel: socket.socket | None = None

    @property
    def channel(self) -> socket.socket | None:
        """Readable when `poll` has something to do."""
        return self._channel

    def prepare(self) -> None:
        """Request a prefork parent; returns at once. It is ready when the fork server has done its imports.

        When the launcher reads the request, it kills everything that an earlier prefork parent has left.
        """
        if self._channel is not None:
            return
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, its):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
        given = [its.fileno(), self.page.descriptor, *self.dumps]
        socket.send_fds(self.requests, [json.dumps({"ranks": len(self.dumps)}).encode()], given)
        its.close()
        self._channel = ours

    def start(self, environments: Sequence[dict[str, str]], store: socket.socket | None) -> None:
        """Fork the ranks once the prefork parent is ready; `pids` then has their ids.

        store: socket for rank 0's store.
        """
        self.page.clear()
        for dump in self.dumps:
            os.ftruncate(dump, 0)
            os.lseek(dump, 0, os.SEEK_SET)  # the position is shared by all processes with this descriptor
        self.pids, self.ended = [], {}
        self.prepare()
        self._send({"start": list(environments)}, [] if store is None else [store.fileno()])

    def poll(self) -> None:
        """Read the prefork parent's messages: `pids`, `ended` (local index -> exit code, in the order of exit)."""
        while (message := self._receive(wait=False)) is not None:
            self._take(message)

    def kill(self) -> None:
        """Kill all ranks and their descendants; return when they are gone.

        Raises PreforkParentLost if the prefork parent is gone too.
        """
        for index, pid in enumerate(self.pids):
            if index not in self.ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # directly, in case the prefork parent is stopped
        if self._channel is None:
            return
        self._send({"sweep": True})
        deadline = time.monotonic() + 2 * SWEEP_SECONDS
        while time.monotonic() < deadline:
            message = self._receive(wait=True)
            if message is not None:
                self._take(message)
                if "swept" in message:
                    self.pids = []
                    return
        self._drop()

    def _take(self, message: dict[str, Any]) -> None:
        if "started" in message:
            self.pids = message["started"]
        elif "exited" in message:
            self.ended[message["exited"]] = message["status"]

    def _send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        assert self._channel is not None
        try:
            socket.send_fds(self._channel, [json.dumps(message).encode()], descriptors)
        except (BrokenPipeError, ConnectionResetError):
            self._drop()
            raise PreforkParentLost from None

    def _receive(self, wait: bool) -> dict[str, Any] | None:
        assert self._channel is not None
        self._channel.settimeout(1.0 if wait else 0.0)
        try:
            data = self._channel.recv(MESSAGE_BYTES)
        except (BlockingIOError, TimeoutError):
            return None
        except ConnectionResetError:
            data = b""
        if not data:
            self._drop()
            raise PreforkParentLost
        return json.loads(data)

    def _drop(self) -> None:
        """Close the channel, so that the prefork parent exits; the next request kills one that does not."""
        if self._channel is not None:
            self._channel.close()
        self._channel, self.pids = None, []

    def close(self) -> None:
        self._drop()
