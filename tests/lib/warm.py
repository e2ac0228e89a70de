"""Starts Python programs of this repository like subprocess, but forked from a process that has imported megamm.

    warm.start([sys.executable, "-m", "megamm", ...], env=...)     like subprocess.Popen
    warm.run([sys.executable, "-m", "megamm", ...], env=...)       like subprocess.run

Importing torch and Megatron-core takes seconds, a fork milliseconds. Commands for which a fork would differ are started
by subprocess, cold: another interpreter option than `-m MODULE` or a script, an environment that differs in variables
that modules may read at import, a machine with a GPU. There is one server for this process; it starts at first use and
ends with the process.
"""

import functools
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import warm_process
from warm_server import MESSAGE_BYTES

ROOT = Path(__file__).parents[2]
_SERVER = Path(__file__).with_name("warm_server.py")
_ROOM = "x" * 8192
_OPTIONS = {"env", "cwd", "stdin", "stdout", "stderr", "text", "start_new_session"}


class Server:
    """The process that forks."""

    def __init__(self) -> None:
        self.cold: list[str] = []
        """Why commands were not forked from here."""
        self.variables = environment()
        self.channel, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
        command = [sys.executable, str(_SERVER), str(far.fileno()), str(os.getpid()), _ROOM]
        # A command sets this before it imports torch.
        variables = self.variables | {"OMP_WAIT_POLICY": "PASSIVE"}
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=variables, pass_fds=[far.fileno()], **quiet)
        far.close()

    def fork(self, request: dict[str, Any], files: list[int]) -> int:
        """Request a process; return the pipe on which it is reported."""
        near, far = os.pipe()
        socket.send_fds(self.channel, [json.dumps(request).encode()], [far, *files])
        os.close(far)
        return near

    def close(self) -> None:
        """End it, and the processes that it has forked."""
        self.channel.close()
        self.process.wait()


class WarmPopen(subprocess.Popen):
    """A process that is the server's child: its status comes through a pipe; the rest is as in the standard library."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more):
        """See subprocess.Popen._execute_child; `unlike` has checked the arguments."""
        *_, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = more[:9]
        request = {
            "arguments": [os.fspath(word) for word in args[1:]],
            "variables": dict(env),
            "folder": os.fspath(cwd or os.getcwd()),
            "new_session": more[-2],
        }
        files = [own if file == -1 else file for own, file in enumerate((p2cread, c2pwrite, errwrite))]
        self._status, self._told = server().fork(request, files), b""
        self.pid = int(self._line())
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _line(self) -> bytes:
        """Wait for the next line of the pipe and return it."""
        while b"\n" not in self._told:
            data = os.read(self._status, 64)
            if not data:
                raise RuntimeError("the warm server has ended")
            self._told += data
        line, _, self._told = self._told.partition(b"\n")
        return line

    def _try_wait(self, wait_flags):
        if wait_flags & os.WNOHANG and not select.select([self._status], [], [], 0)[0]:
            return 0, 0
        status = int(self._line())
        os.close(self._status)
        return self.pid, status

    def _internal_poll(self, _deadstate=None):
        if self.returncode is None and self._waitpid_lock.acquire(blocking=False):
            try:
                if self.returncode is None:
                    process, status = self._try_wait(os.WNOHANG)
                    if process:
                        self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


_SERVERS: list[Server] = []
EVENT = "warm.start"
"""Audit event of every use of the server."""


def server() -> Server:
    """Return the server of this process."""
    sys.audit(EVENT)
    if not _SERVERS:
        _SERVERS.append(Server())
    return _SERVERS[0]


def close() -> None:
    """End the server, at the end of the session."""
    while _SERVERS:
        _SERVERS.pop().close()


def environment() -> dict[str, str]:
    """Return variables with one thread per process, this repository importable, and none of another launcher."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


@functools.cache
def _has_gpu() -> bool:
    return torch.accelerator.is_available()


def unlike(command: Sequence[Any], options: Mapping[str, Any]) -> str:
    """Return why a fork would differ; empty if it would not."""
    if command[0] != sys.executable or (str(command[1]).startswith("-") and command[1] != "-m"):
        return f"it is not a module or a script: {command[:2]}"
    if other := options.keys() - _OPTIONS:
        return f"options {sorted(other)}"
    if _has_gpu():
        return "the machine has a GPU"
    names = warm_process.differing(os.environ if options.get("env") is None else options["env"], server().variables)
    return f"variables {names}" if names else ""


def start(command: Sequence[Any], **options: Any) -> subprocess.Popen:
    """Like subprocess.Popen, forked if that makes no difference."""
    why = unlike(command, options)
    if why:
        server().cold.append(why)
    return (subprocess.Popen if why else WarmPopen)(list(map(str, command)), **{"env": dict(os.environ)} | options)


def run(
    command: Sequence[Any],
    *,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    input: Any = None,
    **options: Any,
) -> subprocess.CompletedProcess:
    """Like subprocess.run, forked if that makes no difference."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with start(command, **options) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
        done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done
