"""The template of a node's ranks: their parent process, forked from one that has imported all they need.

So a restart costs a fork instead of seconds of imports. The template starts no threads and does not touch the GPU:
neither survives a fork. The agent controls it (workers.py) through a socket, with one JSON object per message:

    {"start": [environment, ...]}   + store socket -> {"started": [process ids]}
    {"sweep": true}                                -> {"swept": number}: all its descendants are gone
    unrequested                                    -> {"exited": index, "status": exit code or -signal}

`serve` is the fork server's side of its channel to the command (fork_server.py): it imports once, then forks a template
for each request.
"""

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from megamm.common import processes
from megamm.elastic.fork_server import MAX_DESCRIPTORS, MESSAGE_BYTES
from megamm.elastic.heartbeat import SLOTS
from megamm.elastic.rank import Seat, Work, run


class Template:
    """Forks ranks, reports how they exit, and kills what they leave."""

    def __init__(
        self, work: Work, config: dict[str, Any], channel: socket.socket, slots: int, dumps: list[int]
    ) -> None:
        """work: what each rank does; slots, dumps: shared memory of all slots, and files for each rank's stacks."""
        self.work, self.config, self.channel, self.slots, self.dumps = work, config, channel, slots, dumps
        self.ranks: dict[int, int] = {}

    def serve(self) -> None:
        """Serve until the channel closes, by the agent or by its exit."""
        wake, waker = os.pipe()
        for descriptor in (wake, waker):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(waker)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                readable, _, _ = select.select([self.channel.fileno(), wake], [], [])
                if wake in readable:
                    os.read(wake, 4096)
                    self._reap()
                if self.channel.fileno() in readable:
                    message, descriptors, _, _ = socket.recv_fds(self.channel, MESSAGE_BYTES, 1)
                    if not message:
                        return
                    self._obey(json.loads(message), descriptors)

    def _obey(self, message: dict[str, Any], descriptors: list[int]) -> None:
        if "start" in message:
            store = descriptors[0] if descriptors else -1
            for index, environment in enumerate(message["start"]):
                is_host = environment["RANK"] == "0"
                environment[SLOTS] = f"{self.slots}:{len(self.dumps)}:{index}"
                seat = Seat(environment, self.dumps[index], store if is_host else -1)
                self.ranks[self._fork(seat)] = index
            for descriptor in descriptors:
                os.close(descriptor)
            self._say(started=list(self.ranks))
        else:
            self._say(swept=processes.sweep(told=self._ended))

    def _fork(self, seat: Seat) -> int:
        template = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            processes.die_with_parent(template)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.channel.close()
            code = run(self.work, self.config, seat)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # not through the template's own shutdown

    def _reap(self) -> None:
        """Reap the children that have exited so far."""
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            self._ended(process, status)

    def _ended(self, process: int, status: int) -> None:
        index = self.ranks.pop(process, None)
        if index is not None:  # otherwise a rank had started it
            self._say(exited=index, status=os.waitstatus_to_exitcode(status))

    def _say(self, **message: Any) -> None:
        self.channel.send(json.dumps(message).encode())


def serve(channel: socket.socket, command: int, preload: Callable[[dict[str, Any]], None], work: Work) -> None:
    """Serve requests until the command closes the channel.

    preload: imports, from the run's config, what ranks need; it must start no threads. work: what each rank does.
    """
    processes.die_with_parent(command)
    processes.ignore_stop_signals()
    config, begin = json.loads(channel.recv(MESSAGE_BYTES))["config"], time.monotonic()
    preload(config)
    gc.collect()
    gc.freeze()  # no collection writes to pages that all ranks share
    channel.send(json.dumps({"ready": time.monotonic() - begin}).encode())
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, MAX_DESCRIPTORS)
        if not message:
            return
        _fork_template(work, config, command, descriptors, channel)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(json.dumps({"forked": len(descriptors)}).encode())


def _fork_template(
    work: Work, config: dict[str, Any], command: int, descriptors: Sequence[int], channel: socket.socket
) -> None:
    """Fork a template that serves the first descriptor; the others are for the slots and each rank's stacks."""
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
        Template(work, config, socket.socket(fileno=descriptors[0]), descriptors[1], list(descriptors[2:])).serve()
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not through this process's own shutdown
