"""Processes of a conversion that make segments, read files back and compare. With one, it is the calling process."""

import os
import signal
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from megamm.checkpoint import files, manifest
from megamm.common.processes import die_with_parent
from megamm.convert.job.plan import Conversion, Maker, Segment

Key = TypeVar("Key", bound=Hashable)
READ = 4 << 20
"""Bytes read back at a time."""
SYNC = 4 << 20
"""Segments of at least this many bytes are synced when written, so that the disk is busy all the time."""


@dataclass(frozen=True)
class State:
    """State of a worker process."""

    folder: Path
    make: Maker


Opened = Callable[[], AbstractContextManager[Any]]
_STATE: list[Any] = []
"""State of a pool process; the pool has no other way to pass it to calls."""


@contextmanager
def making(conversion: Conversion, folder: Path) -> Iterator[State]:
    """Open the state for `made` and `read_back`."""
    with conversion.opened() as make:
        yield State(folder, make)


class Workers:
    """A pool of worker processes; use it in a `with`."""

    def __init__(self, opened: Opened, most: int, pieces: int) -> None:
        """opened: opens a process's state; most: processes, 0: one per core; pieces: the maximum that is useful."""
        self.opened, self.count = opened, max(1, min(most or len(os.sched_getaffinity(0)), pieces))
        self.stack = ExitStack()
        self.state: Any = None
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self.count == 1:
            self.state = self.stack.enter_context(self.opened())
        else:
            # Forked: importing torch again would take longer than converting a gigabyte.
            begin = (self.opened, os.getpid())
            self.pool = ProcessPoolExecutor(self.count, get_context("fork"), _begin, begin)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def all(self, work: Callable[..., Any], arguments: Mapping[Key, Sequence[Any]]) -> Iterator[tuple[Key, Any]]:
        """(key, result of work(state, *arguments)), in order of completion. Passes on exceptions.

        Raises BrokenProcessPool if a process was killed.
        """
        if self.pool is None:
            for key, given in arguments.items():
                yield key, work(self.state, *given)
            return
        futures = {self.pool.submit(_call, work, *given): key for key, given in arguments.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _begin(opened: Opened, parent: int) -> None:
    """Initialise a new process: it ends when its parent ends, even if that is killed."""
    die_with_parent(parent)
    torch.set_num_threads(1)  # the parent's threads were not forked
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets the signal too, and ends the others
    _STATE.append(opened().__enter__())


def _call(work: Callable[..., Any], *arguments: Any) -> Any:
    return work(_STATE[0], *arguments)


def made(state: State, segment: Segment) -> str:
    """Write a segment; returns its digest. Raises UserError for a bad source, OSError for the disk."""
    digest, place = manifest.hasher(), segment.start
    descriptor = os.open(state.folder / segment.file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for item in segment.items:
            end = place + item.size
            for piece in state.make(item.what):
                for part in files.in_pieces(piece):
                    digest.update(part)
                    while part:
                        written = os.pwrite(descriptor, part, place)
                        place, part = place + written, part[written:]
            assert place == end, f"{item.what} does not have {item.size} bytes"
        if segment.size >= SYNC:
            os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def read_back(state: State, file: str, sizes: Sequence[int]) -> tuple[manifest.ManifestEntry, list[str]]:
    """Sync a file and read it back; returns its manifest entry and the digests of segments of these sizes."""
    whole, digests = manifest.hasher(), []
    buffer = memoryview(bytearray(READ))
    with (state.folder / file).open("rb", buffering=0) as opened:
        os.fsync(opened.fileno())
        for size in sizes:
            digest, left = manifest.hasher(), size
            while left and (read := opened.readinto(buffer[: min(left, READ)])):
                digest.update(buffer[:read])
                whole.update(buffer[:read])
                left -= read
            digests.append(digest.hexdigest())
    return manifest.ManifestEntry(sum(sizes), whole.hexdigest()), digests
