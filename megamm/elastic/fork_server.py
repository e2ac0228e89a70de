"""The fork server of a node: a process that has imported all that a rank needs, and forks the ranks' parent on demand.

When a prefork parent (prefork.py) or an agent exits, its replacement needs no seconds of imports. The launcher starts
the fork server, and restarts it in the background if it exits; a rank does not depend on it once forked. It starts no
threads and does not touch the GPU: neither survives a fork. It creates prefork parents by a double fork, so that they
are children of the launcher. One JSON object per message:

    {"config": ..., "check": ...}       first message; it then imports, and answers {"ready": seconds}
    if "check" is true                  -> {"checked": null, the fields of a UserError, or the name of another error}
    {"ranks": number} + descriptors     -> {"forked": number}: a prefork parent serves the first one

`ForkServer` is the launcher's side of it; prefork.py has the other side, for a program that hands in what ranks run.
"""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from typing import Any

from megamm.common import processes
from megamm.common.errors import UserError

MESSAGE_BYTES = 1 << 20
MAX_DESCRIPTORS = 253
"""Maximum number of descriptors in one message (SCM_MAX_FD of Linux)."""
ANSWER_SECONDS = 10.0
"""A fork takes milliseconds: a fork server that is ready and does not answer for this long is stopped or stuck."""
_MAX_IN_VAIN = 3
"""After this many fork servers in a row were killed during their imports, none is started until the next request."""


class CheckFailed(Exception):
    """The check of a config before the ranks start ended with an error that is not the user's."""


class ForkServer:
    """The launcher's side. Call `attend` when `descriptors` are readable, and once a second."""

    def __init__(self, module: str, config: dict[str, Any], has_check: bool = False) -> None:
        """Start the process, `python -m module CHANNEL LAUNCHER`, which calls `prefork.serve`; returns at once.

        has_check: the program checks the config first; call `check` before it is asked for a prefork parent.
        """
        self._module, self._config = module, config
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._is_ready, self._is_checked = False, not has_check
        self._refused: dict[str, Any] | str | None = None
        self._request: tuple[bytes, list[int]] | None = None
        """The unanswered request; it is sent again to the next process if this one exits."""
        self._asked, self._in_vain = 0.0, 0
        self._start()

    @property
    def pid(self) -> int | None:
        """Process id, None if it is not running."""
        return self._process.pid if self._process is not None else None

    @property
    def descriptors(self) -> list[int]:
        return [self._channel.fileno()] if self._channel is not None else []

    def fork(self, request: bytes, descriptors: list[int]) -> None:
        """Request a prefork parent as soon as possible. The descriptors are closed here once the process has them."""
        self.attend()
        if self._request is not None:  # the agent has waited for an answer in vain
            self._end()
            self._forget_request()
        self._request = request, descriptors
        self._send_request()

    def check(self) -> None:
        """Wait until the program has checked the config, beside its further imports. UserError if it refuses it.

        Raises CheckFailed if the check ended by another error, which is on standard error by then.
        """
        while not self._is_checked and self._channel is not None:
            select.select([self._channel], [], [])
            self.attend()
        if isinstance(self._refused, dict):
            raise UserError(**self._refused)
        if self._refused is not None or not self._is_checked:
            raise CheckFailed(self._refused or "the process that checks it ended")

    def attend(self) -> None:
        """Read its messages, and replace it if it has exited or is stuck."""
        while self._channel is not None and select.select([self._channel], [], [], 0)[0]:
            try:
                data = self._channel.recv(MESSAGE_BYTES)
            except ConnectionResetError:  # it ended before it had read all
                data = b""
            if not data:  # end of file: it has exited
                assert self._process is not None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    # Its files close a moment before it ends with its own exit code, on a busy machine seconds.
                    self._process.wait(ANSWER_SECONDS)
                self._replace("died")
                continue
            message = json.loads(data)
            if "checked" in message:
                self._is_checked, self._refused = True, message["checked"]
            elif "ready" in message:
                self._is_ready, self._asked = True, time.monotonic()
            else:
                self._forget_request()
        if self._is_ready and self._request is not None and time.monotonic() - self._asked > ANSWER_SECONDS:
            self._replace("is not responding")

    def close(self) -> None:
        self._end()
        self._forget_request()

    def _start(self) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, its):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
        arguments = [str(its.fileno()), str(os.getpid())]
        # A session of its own: only the launcher receives a terminal's Ctrl-C.
        self._process = processes.start_module(
            self._module, *arguments, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        its.close()
        self._channel, self._is_ready = ours, False
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            ours.send(json.dumps({"config": self._config, "check": not self._is_checked}).encode())

    def _replace(self, why: str) -> None:
        """Start it again; if its imports fail, only at the next request, since they could fail for ever."""
        self._in_vain = 0 if self._is_ready else self._in_vain + 1
        code = self._end()
        print(f"fork server {why}", file=sys.stderr, flush=True)
        if self._in_vain and (code >= 0 or self._in_vain >= _MAX_IN_VAIN):
            self._in_vain = 0
            self._forget_request()  # an agent that waits for a prefork parent sees the socket close
            return
        self._start()
        if self._request is not None:
            self._send_request()

    def _send_request(self) -> None:
        if self._process is None:
            self._start()
        assert self._request is not None and self._channel is not None
        message, descriptors = self._request
        self._asked = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `attend` will see that it has exited
            socket.send_fds(self._channel, [message], descriptors)

    def _forget_request(self) -> None:
        if self._request is not None:
            for descriptor in self._request[1]:
                os.close(descriptor)
        self._request = None

    def _end(self) -> int:
        """Kill it and return its exit code, 0 if it was not running."""
        code = 0
        if self._process is not None:
            self._process.kill()
            code = self._process.wait()
        if self._channel is not None:
            self._channel.close()
        self._process, self._channel, self._is_ready = None, None, False
        return code
