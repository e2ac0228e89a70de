"""Groups of real gloo ranks, forked from one process that has imported torch and Megatron-core once.

A `Worlds` is a server process without threads. For each job it forks a world of the requested size, calls a function in
every rank and returns the ranks' results. The world exits with its job, because the threads and sockets of process
groups exist as long as their process. A world that fails is killed, and the failure tells what every rank was doing.

A job's function is at module level: `function(argument) -> result`, both picklable.
"""

import datetime
import faulthandler
import gc
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from megamm.common.processes import threads, without_blas_threads

_GRACE = 1.0  # seconds in which other ranks may still report their own error after a crash


@dataclass(frozen=True)
class WorldFailure:
    """A failed world: kind "crash" or "hang", and for each rank its error or its stack."""

    kind: str
    ranks: dict[int, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Format for people: for every rank the error, or the innermost calls of its stack."""
        found = []
        for rank, text in sorted(self.ranks.items()):
            lines = [line.strip() for line in text.strip().splitlines()]
            told = lines[-1:] if lines and not lines[-1].startswith("File") else lines[1:7]
            found.append(f"rank {rank}: {' < '.join(told)[:600]}")
        return found


@dataclass(frozen=True)
class _Job:
    size: int
    function: Callable[[Any], Any]
    argument: Any
    timeout: float


class Worlds:
    """Client of the server process, for one job at a time; it is a context manager."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far,))
        with without_blas_threads():
            self._process.start()
        far.close()

    def __enter__(self) -> "Worlds":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._connection.close()  # the server exits at the end of its input
        self._process.join()

    def run(self, size: int, function: Callable[[Any], Any], argument: Any, timeout: float) -> list[Any] | WorldFailure:
        """Run function(argument) in each of `size` ranks; return their results in rank order, or their failure."""
        self._connection.send(_Job(size, function, argument, timeout))
        answer: list[Any] | WorldFailure = self._connection.recv()
        return answer


class _World:
    """Forked ranks, as seen in the server process."""

    def __init__(self, job: _Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        context = multiprocessing.get_context("fork")
        self.connections: list[Connection] = []
        self.processes = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for rank in range(job.size):
                near, far = context.Pipe(duplex=False)
                process = context.Process(target=_rank, args=(rank, job, listener, far, folder), daemon=True)
                process.start()
                # The process has it now; while it is open here too, the end of that process ends no connection.
                far.close()
                self.connections.append(near)
                self.processes.append(process)

    def answer(self) -> list[Any] | WorldFailure:
        size = self.job.size
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + self.job.timeout
        while len(results) + len(errors) < size:
            pending = [rank for rank in range(size) if rank not in results and rank not in errors]
            ready = wait([self.connections[rank] for rank in pending], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in pending:
                if self.connections[rank] not in ready:
                    continue
                try:
                    is_error, value = self.connections[rank].recv()
                except EOFError:
                    self.processes[rank].join()
                    is_error, value = True, f"ended with exit code {self.processes[rank].exitcode}"
                (errors if is_error else results)[rank] = value
                if is_error:
                    # The others' errors are mostly consequences: they get little time to report them.
                    deadline = min(deadline, time.monotonic() + _GRACE)
        if len(results) == size:
            return [results[rank] for rank in range(size)]
        return WorldFailure("crash" if errors else "hang", errors or self._stacks(results))

    def _stacks(self, done: dict[int, Any]) -> dict[int, str]:
        """Return the stack of each rank."""
        waiting = [rank for rank in range(self.job.size) if rank not in done]
        for rank in waiting:
            os.kill(self.processes[rank].pid or 0, signal.SIGUSR1)
        time.sleep(0.3)  # the signal's handler writes to a file, and nothing tells when it is done
        stacks = {rank: (self.folder / f"stack_{rank}").read_text() for rank in waiting}
        return {rank: stacks.get(rank, "done") for rank in range(self.job.size)}

    def end(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.join()


def _serve(connection: Connection) -> None:
    """Run the server: import once, then fork. There must be no thread and no collective before a fork."""
    import torch

    from megamm.mcore import cpu

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cpu.install()
    # The job's own code, and modules that Megatron and torch import at first use: this saves a second in each rank.
    import torch._dynamo

    import megamm.engine.native
    import megamm.parity.rank  # noqa: F401

    gc.freeze()  # a collection in a rank would write to, and so copy, every page that holds an object
    while True:
        try:
            job: _Job = connection.recv()
        except EOFError:
            return
        assert len(threads()) == 1, f"a fork copies only one thread, but there are {threads()}"
        with tempfile.TemporaryDirectory(prefix="megamm-world-") as folder:
            world = _World(job, Path(folder))
            answer = world.answer()
            world.end()
        connection.send(answer)


def _rank(rank: int, job: _Job, listener: socket.socket, connection: Connection, folder: Path) -> None:
    """Run a forked rank: join its world over loopback and run the job."""
    import torch.distributed as dist

    faulthandler.register(signal.SIGUSR1, file=(folder / f"stack_{rank}").open("w"), all_threads=False)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    host, port = listener.getsockname()
    # Longer than the server waits, so that the server reports a hang with the stacks of all ranks.
    timeout = datetime.timedelta(seconds=2 * job.timeout)
    listening = listener.detach() if rank == 0 else None
    try:
        store = dist.TCPStore(
            host, port, job.size, rank == 0, timeout, wait_for_workers=False, master_listen_fd=listening
        )
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job.size, timeout=timeout)
        result = job.function(job.argument)
    except Exception as error:
        connection.send((True, traceback.format_exc()))
        raise SystemExit(1) from error
    connection.send((False, result))
