"""The fork server of a node: a process that has imported all that a rank needs, and forks the ranks' parent on demand.

So neither the end of a template (template.py) nor that of an agent costs seconds of imports. The command starts it,
and again in the background should it end; no rank depends on it once it is forked. It starts no threads and touches no
GPU: what a fork would copy broken. It makes templates by a double fork, so that they are the command's own children.
One JSON object a message:

    {"config": ...}                     first; afterwards it imports, then says {"ready": seconds}
    {"ranks": number} + descriptors     -> {"forked": number}: a template serves the first descriptor

`ForkServer` is the command's side of it.
"""

import contextlib
import gc
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

from megamm.resilience import processes

MESSAGE_BYTES = 1 << 20
MAX_DESCRIPTORS = 253
"""Of one message (SCM_MAX_FD of Linux)."""
ANSWER_SECONDS = 10.0
"""A fork takes milliseconds: one that has imported and does not answer for so long is stopped or stuck."""
_MAX_IN_VAIN = 3
"""Of these processes in a row may be killed while they import."""


class ForkServer:
    """Seen from the command. `attend` is to be called when `descriptors` are readable, and once a second."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Starts it; returns at once."""
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._is_ready = False
        self._request: tuple[bytes, list[int]] | None = None
        """The one that it has not answered, to be repeated to another should it end."""
        self._asked, self._in_vain = 0.0, 0
        self._start()

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._process.pid if self._process is not None else None

    @property
    def descriptors(self) -> list[int]:
        return [self._channel.fileno()] if self._channel is not None else []

    def fork(self, request: bytes, descriptors: list[int]) -> None:
        """Have a template made as soon as it can be. The descriptors are closed here when it has them."""
        self.attend()
        if self._request is not None:  # the agent has waited for an answer in vain
            self._end()
            self._forget_request()
        self._request = request, descriptors
        self._hand_on()

    def attend(self) -> None:
        """Take what it has said, and mend what is wrong with it."""
        while self._channel is not None and select.select([self._channel], [], [], 0)[0]:
            try:
                data = self._channel.recv(MESSAGE_BYTES)
            except ConnectionResetError:  # it ended before it had read all
                data = b""
            if not data:
                assert self._process is not None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(1.0)  # with its own exit code; its files close a moment before
                self._replace("has ended")
            elif "ready" in json.loads(data):
                self._is_ready, self._asked = True, time.monotonic()
            else:
                self._forget_request()
        if self._is_ready and self._request is not None and time.monotonic() - self._asked > ANSWER_SECONDS:
            self._replace("does not answer")

    def close(self) -> None:
        self._end()
        self._forget_request()

    def _start(self) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, its):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
        arguments = [str(its.fileno()), str(os.getpid())]
        # A session of its own: a terminal's Ctrl-C is the command's to hear.
        self._process = processes.start_module(
            __name__, *arguments, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        its.close()
        self._channel, self._is_ready = ours, False
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            ours.send(json.dumps({"config": self._config}).encode())

    def _replace(self, why: str) -> None:
        """One that cannot import is not tried again before somebody asks: it could be so for ever."""
        self._in_vain = 0 if self._is_ready else self._in_vain + 1
        code = self._end()
        print(f"the process that has imported for the ranks {why}", file=sys.stderr, flush=True)
        if self._in_vain and (code >= 0 or self._in_vain >= _MAX_IN_VAIN):
            self._in_vain = 0
            self._forget_request()  # whoever waits for a template sees its end of the socket close
            return
        self._start()
        if self._request is not None:
            self._hand_on()

    def _hand_on(self) -> None:
        if self._process is None:
            self._start()
        assert self._request is not None and self._channel is not None
        message, descriptors = self._request
        self._asked = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `attend` will see that it has ended
            socket.send_fds(self._channel, [message], descriptors)

    def _forget_request(self) -> None:
        if self._request is not None:
            for descriptor in self._request[1]:
                os.close(descriptor)
        self._request = None

    def _end(self) -> int:
        """Its exit code: 0 if there is none."""
        code = 0
        if self._process is not None:
            self._process.kill()
            code = self._process.wait()
        if self._channel is not None:
            self._channel.close()
        self._process, self._channel, self._is_ready = None, None, False
        return code


def preload(device: Literal["auto", "cpu", "gpu"], engine: str) -> None:
    """Import what ranks use, for the device they will choose. Starts no threads."""
    with processes.without_blas_threads():
        import numpy  # noqa: F401
    # Imported here: the command imports this module for its side, and stays small.
    from megamm import device as devices
    from megamm.cli.common import log_to_console

    log_to_console()
    if not devices.will_be_gpu(device):
        from megamm.mcore import cpu

        cpu.install()
    import torch._dynamo  # the first optimizer imports it: a second
    import torch.utils.tensorboard  # noqa: F401

    import megamm.mcore.engine
    import megamm.mcore.rng
    import megamm.mcore.store
    import megamm.train

    if engine == "deepspeed":
        import megamm.zero.engine  # noqa: F401
    assert not devices.is_initialized(), "an import has initialised the GPU: ranks could not be forked from here"


def _serve(channel: socket.socket, command: int) -> None:
    """Until the command's end of the channel closes."""
    config, begin = json.loads(channel.recv(MESSAGE_BYTES))["config"], time.monotonic()
    preload(config["device"], config["engine"])
    gc.collect()
    gc.freeze()  # no collection writes to pages that all ranks share
    channel.send(json.dumps({"ready": time.monotonic() - begin}).encode())
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, MAX_DESCRIPTORS)
        if not message:
            return
        _fork_template(config, command, descriptors, channel)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(json.dumps({"forked": len(descriptors)}).encode())


def _fork_template(config: dict[str, Any], command: int, descriptors: Sequence[int], channel: socket.socket) -> None:
    """A process that serves the first descriptor; the others are the slots' and, one a rank, those for stacks."""
    from megamm.resilience.template import Template

    sys.stdout.flush()
    sys.stderr.flush()
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        return
    between = os.getpid()
    if os.fork():
        os._exit(0)
    code = 1
    try:
        while os.getppid() == between:
            time.sleep(0.0002)
        processes.die_with_parent(command)
        processes.adopt_orphans()
        channel.close()
        Template(config, socket.socket(fileno=descriptors[0]), descriptors[1], list(descriptors[2:])).serve()
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not this process's own way out


def main() -> None:
    """`python -m megamm.resilience.fork_server CHANNEL COMMAND`: a descriptor, and the process to end with."""
    channel, command = map(int, sys.argv[1:])
    processes.die_with_parent(command)
    processes.ignore_stop_signals()
    _serve(socket.socket(fileno=channel), command)


if __name__ == "__main__":
    main()
