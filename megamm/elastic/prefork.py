"""The prefork parent of a node's ranks: a process forked from one that has imported all that ranks need.

So a restart costs a fork instead of seconds of imports. The prefork parent starts no threads and does not touch the
GPU: neither survives a fork. The agent controls it (workers.py) through a socket, with one JSON object per message:

    {"start": [environment, ...]}   + store socket -> {"started": [process ids]}
    {"sweep": true}                                -> {"swept": number}: all its descendants are gone
    unrequested                                    -> {"exited": index, "status": exit code or -signal}

`serve` is the fork server's side of its channel to the launcher (fork_server.py): it imports once, then forks a prefork
parent for each request.
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
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from megamm.common import outputs, processes
from megamm.common.errors import UserError
from megamm.elastic.fork_server import MAX_DESCRIPTORS, MESSAGE_BYTES
from megamm.elastic.rank import RankEnvironment, RankProgram, run
from megamm.elastic.rank_status import HEARTBEAT_PAGE

Check = Callable[[dict[str, Any]], None]
"""Checks a run's config before its ranks start. UserError if the user must change something."""
Preload = Callable[[dict[str, Any], Callable[[Check], None]], None]


class PreforkParent:
    """Forks ranks, reports how they exit, and kills what they leave."""

    def __init__(
        self, program: RankProgram, config: dict[str, Any], channel: socket.socket, page: int, dumps: list[int]
    ) -> None:
        """program: what each rank does. page, dumps: descriptors of the ranks' status and of each rank's stacks."""
        self.program, self.config, self.channel, self.page, self.dumps = program, config, channel, page, dumps
        self.ranks: dict[int, int] = {}

    def serve(self) -> None:
        """Serve until the channel closes, by the agent or by its exit."""
        # SIGCHLD writes into a pipe, so that one select waits for messages and for exits of ranks.
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
                    self._handle(json.loads(message), descriptors)

    def _handle(self, message: dict[str, Any], descriptors: list[int]) -> None:
        if "start" in message:
            store = descriptors[0] if descriptors else -1
            for index, variables in enumerate(message["start"]):
                hosts_store = variables["RANK"] == "0"
                variables[HEARTBEAT_PAGE] = f"{self.page}:{len(self.dumps)}:{index}"
                environment = RankEnvironment(variables, self.dumps[index], store if hosts_store else -1)
                self.ranks[self._fork(environment)] = index
            for descriptor in descriptors:
                os.close(descriptor)
            self._send(started=list(self.ranks))
        else:
            self._send(swept=processes.sweep(on_exit=self._report_exit))

    def _fork(self, environment: RankEnvironment) -> int:
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            processes.die_with_parent(parent)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.channel.close()
            code = run(self.program, self.config, environment)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # without the shutdown of the prefork parent's interpreter

    def _reap(self) -> None:
        """Reap the children that have exited so far."""
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            self._report_exit(process, status)

    def _report_exit(self, process: int, status: int) -> None:
        index = self.ranks.pop(process, None)
        if index is not None:
            self._send(exited=index, status=os.waitstatus_to_exitcode(status))
        else:  # a rank started it, perhaps a data worker
            processes.remove_shared_tensors(process)

    def _send(self, **message: Any) -> None:
        self.channel.send(json.dumps(message).encode())


def serve(channel: socket.socket, launcher: int, preload: Preload, program: RankProgram) -> None:
    """Serve requests until the launcher closes the channel.

    preload: imports, from the run's config, what ranks need; it must start no threads. program: what each rank does.
    `preload` calls its second argument with a check of the config once what that needs is imported: the check runs in
    a process of its own beside the other imports. A process that `preload` replaces by exec does not call it again; it
    reads the config again, which stays in the channel until the imports are done.
    """
    processes.die_with_parent(launcher)
    processes.ignore_stop_signals()
    message, begin = json.loads(channel.recv(MESSAGE_BYTES, socket.MSG_PEEK)), time.monotonic()
    config = message["config"]

    def start_check(check: Check) -> None:
        if message["check"]:
            _fork_check(check, config, channel)

    preload(config, start_check)
    _wait_for_check(channel)
    channel.recv(MESSAGE_BYTES)
    gc.collect()
    gc.freeze()  # no collection writes to pages that all ranks share
    channel.send(json.dumps({"ready": time.monotonic() - begin}).encode())
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, MAX_DESCRIPTORS)
        if not message:
            return
        _fork_prefork_parent(program, config, launcher, descriptors, channel)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(json.dumps({"forked": len(descriptors)}).encode())


def _fork_check(check: Check, config: dict[str, Any], channel: socket.socket) -> None:
    """Run the check in a process that reports how it ended; it exits with 0 if it could."""
    parent = os.getpid()
    if os.fork():
        return
    code, found = 1, None
    try:
        processes.die_with_parent(parent)
        try:
            check(config)
        except (UserError, OSError) as error:
            if (user_error := error if isinstance(error, UserError) else outputs.user_error(error)) is None:
                raise
            found = user_error.fields()
        channel.send(json.dumps({"checked": found}).encode())
        code = 0
    except BaseException as error:
        traceback.print_exc()
        channel.send(json.dumps({"checked": type(error).__name__}).encode())
        code = 0
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait_for_check(channel: socket.socket) -> None:
    """Reap the process that checks, which an exec may have left to this process; report it if it was killed."""
    with contextlib.suppress(ChildProcessError):
        while True:
            _, status = os.wait()
            if status:
                how = processes.how_it_ended(os.waitstatus_to_exitcode(status))
                channel.send(json.dumps({"checked": how}).encode())


def _fork_prefork_parent(
    program: RankProgram, config: dict[str, Any], launcher: int, descriptors: Sequence[int], channel: socket.socket
) -> None:
    """Fork a prefork parent that serves the first descriptor; the others are those of the ranks' status and stacks.

    It is forked twice: its own parent exits at once, so that it becomes a child of the launcher, which adopts orphans.
    So it outlives the fork server.
    """
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
        while os.getppid() == between:  # until the launcher has adopted it
            time.sleep(0.0002)
        processes.die_with_parent(launcher)
        processes.adopt_orphans()
        channel.close()
        served, page, *dumps = descriptors
        PreforkParent(program, config, socket.socket(fileno=served), page, dumps).serve()
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without the shutdown of the fork server's interpreter
