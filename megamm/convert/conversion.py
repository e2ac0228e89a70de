"""Runs a conversion: several processes write its files, resumable after a kill; verified, then renamed.

    FOLDER/.tmp-NAME/journal.jsonl    the conversion's identity, then number and digest of every chunk written
    FOLDER/.tmp-NAME/folder/          renamed to FOLDER/NAME when everything is written and verified

The layout and length of every file are known before any data (plan.py), and any process can make any chunk. Chunks
whose digests are in the journal are done, so the same command resumes after kill -9. At the end every file is synced
and read back, and its chunks must match their digests. This detects chunks that a power failure lost although the
journal lists them; they are made again.
"""

import ctypes
import fcntl
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from megamm.checkpoint import code_version, files, manifest
from megamm.common.errors import UserError
from megamm.common.processes import die_with_parent
from megamm.common.progress import Progress
from megamm.convert.io.dtypes import DtypeChange, summary
from megamm.convert.plan import Chunk, Conversion, Maker, chunks

log = logging.getLogger(__name__)
Key = TypeVar("Key", bound=Hashable)
READ = 4 << 20
"""Bytes read back at a time."""
SYNC = 4 << 20
"""Chunks of at least this many bytes are synced when written, so that the disk is busy all the time."""


def log_plan(plan: Conversion, changes: Sequence[DtypeChange]) -> None:
    """Log the size of a conversion, and the dtypes of its tensors."""
    size = sum(part.size for parts in plan.files.values() for part in parts)
    log.info("%s: %d files, %.2f GB", plan.name, len(plan.files), size / 1e9)
    for line in summary(changes):
        log.info("%s: %s", plan.name, line)


class ConversionJob:
    """The temporary folder of a conversion to `final`; only one process at a time can use it."""

    def __init__(self, conversion: Conversion, final: Path, nproc: int, more: int = 0) -> None:
        """nproc: processes, 0: one per core, at most one per chunk; more: bytes besides the conversion's files.

        Raises UserError if there is not enough space, or another process uses the folder.
        """
        self.conversion, self.final, self.nproc = conversion, final, nproc
        self.temporary = final.with_name(f".tmp-{final.name}")
        self.folder = self.temporary / "folder"
        self.journal = _Journal(self.temporary, conversion)
        self.chunks = chunks(conversion.files)
        try:
            self._need(more)
        except UserError:
            if not self.folder.exists():
                files.remove_tree(self.temporary)
            self.close()
            raise

    def _need(self, more: int) -> None:
        """Check the free space for the files that are not written yet."""
        size = sum(chunk.size for chunk in self.chunks) + more
        there = sum(f.stat().st_blocks * 512 for f in self.folder.rglob("*") if f.is_file())
        free = shutil.disk_usage(self.temporary).free
        if size - there > free:
            what = f"not enough disk space: {size - there:,} bytes needed, {free:,} bytes free"
            raise UserError(what, where=self.final.parent, remedy="free disk space or choose another folder")

    def fill(self) -> dict[str, manifest.ManifestEntry]:
        """Write and sync every file; returns their manifest entries. Raises UserError on failure."""
        self._clear()
        for file, parts in self.conversion.files.items():
            files.make_folder((self.folder / file).parent)
            # Sparse, at full length: chunks are written in any order. Bytes of an earlier, killed process are kept.
            with (self.folder / file).open("ab") as opened:
                opened.truncate(sum(part.size for part in parts))
        open_worker = partial(_opened_worker, self.conversion, self.folder)
        try:
            with ConversionWorkers(open_worker, self.nproc, len(self.chunks)) as workers:
                log.info("%s: %d chunks, %d processes", self.conversion.name, len(self.chunks), workers.count)
                self._make(workers)
                found = self._verify(workers)
                if self._undone():  # lost by a power failure after an earlier process had written them: once more
                    self._make(workers)
                    found = self._verify(workers)
        except BrokenProcessPool:
            what = "a process of the conversion was killed"
            raise UserError(what, where=self.final, remedy="run the command again to resume") from None
        except OSError as error:
            remedy = "free disk space and run the command again to resume"
            raise UserError(f"cannot write: {error}", where=self.final, remedy=remedy) from None
        if wrong := self._undone():
            what = f"read-back mismatch after write: {wrong[0].file}"
            raise UserError(what, where=self.final, remedy="check the disk")
        ctypes.CDLL(None).malloc_trim(0)  # otherwise it keeps a tenth of what verification needs
        return found

    def _clear(self) -> None:
        """Remove other files that a killed process wrote beside the conversion's; they will be written again."""
        kept = {Path(file).parts[0] for file in self.conversion.files}
        for path in self.folder.glob("*"):
            if path.name not in kept:
                (files.remove_tree if path.is_dir() else files.remove_file)(path)

    def _undone(self) -> list[Chunk]:
        return [chunk for chunk in self.chunks if chunk.number not in self.journal.done]

    def _make(self, workers: "ConversionWorkers") -> None:
        """Make the chunks that the journal does not list; each is listed only after its bytes are written."""
        undone = self._undone()
        with Progress(self.conversion.name, sum(chunk.size for chunk in self.chunks)) as progress:
            progress.add(progress.total - sum(chunk.size for chunk in undone), is_old=True)
            for chunk, digest in workers.all(_make_chunk, {chunk: (chunk,) for chunk in undone}):
                self.journal.add(chunk.number, digest)
                progress.add(chunk.size)

    def _verify(self, workers: "ConversionWorkers") -> dict[str, manifest.ManifestEntry]:
        """Read all files back; chunks with another digest are removed from the journal."""
        by_file: dict[str, list[Chunk]] = {}
        for chunk in self.chunks:
            by_file.setdefault(chunk.file, []).append(chunk)
        arguments = {file: (file, [chunk.size for chunk in its_chunks]) for file, its_chunks in by_file.items()}
        found = {}
        with Progress(f"{self.conversion.name}, verifying", sum(chunk.size for chunk in self.chunks)) as progress:
            for file, (entry, digests) in workers.all(_read_back, arguments):
                found[file] = entry
                progress.add(entry.size)
                pairs = zip(by_file[file], digests, strict=True)
                wrong = [chunk.number for chunk, digest in pairs if self.journal.done[chunk.number] != digest]
                self.journal.forget(wrong)
        return found

    def publish(self) -> None:
        """Rename the folder to its final name, durably, and remove the temporary one."""
        # Everything inside is on the disk before the name is: the final name never shows an incomplete folder.
        for path in (*self.folder.rglob("*"), self.folder):
            files.sync(path)
        files.rename(self.folder, self.final)
        files.sync(self.final.parent)
        files.remove_tree(self.temporary)

    def close(self) -> None:
        """Release the folder for other processes; finished chunks are kept."""
        self.journal.close()

    def __enter__(self) -> "ConversionJob":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Journal:
    """Chunks that are written, by number, with their digests."""

    def __init__(self, temporary: Path, conversion: Conversion) -> None:
        """Resume a journal of the same conversion, or start a new one.

        The lock ends with the process, however it ends, so a killed conversion never blocks the next one.
        """
        files.make_folder(temporary)
        self.path, self.done = temporary / "journal.jsonl", dict[int, str]()
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self.descriptor)
            raise UserError(
                "another process is converting to this folder", where=temporary, remedy="wait for it, or stop it"
            ) from None
        # Another version of the code may lay out the same bytes differently: its journal does not count.
        self.first = {"identity": conversion.identity, "code": code_version()}
        lines = list(_parse(self.path.read_bytes()))
        if lines and lines[0] == self.first:
            self.done = {line["segment"]: line["digest"] for line in lines[1:]}
            log.info("%s: resuming, %d chunks are done", conversion.name, len(self.done))
        elif (temporary / "folder").exists():
            log.info("%s: discarding partial output of different inputs", conversion.name)
            files.remove_tree(temporary / "folder")
        self._rewrite()

    def _rewrite(self) -> None:
        os.ftruncate(self.descriptor, 0)
        self._append([self.first, *({"segment": n, "digest": digest} for n, digest in self.done.items())])

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        os.write(self.descriptor, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def add(self, number: int, digest: str) -> None:
        self.done[number] = digest
        self._append([{"segment": number, "digest": digest}])

    def forget(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            del self.done[number]
        if numbers:
            self._rewrite()

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _parse(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the lines of a journal, up to the first one that a kill has cut off."""
    for line in data.splitlines(keepends=True):
        try:
            yield dict(json.loads(line)) if line.endswith(b"\n") else {}
        except ValueError:
            return


@dataclass(frozen=True)
class _WorkerState:
    """The output folder, and the conversion as this process has opened it."""

    folder: Path
    make: Maker


Opened = Callable[[], AbstractContextManager[Any]]
_STATE: list[Any] = []
"""State of a pool process; the pool has no other way to pass it to calls."""


@contextmanager
def _opened_worker(conversion: Conversion, folder: Path) -> Iterator[_WorkerState]:
    """Open the state for `_make_chunk` and `_read_back`."""
    with conversion.opened() as make:
        yield _WorkerState(folder, make)


class ConversionWorkers:
    """A pool of worker processes; use it in a `with`."""

    def __init__(self, opened: Opened, most: int, useful: int) -> None:
        """opened: opens a process's state; most: processes, 0: one per core; useful: the number of calls."""
        self.opened, self.count = opened, max(1, min(most or len(os.sched_getaffinity(0)), useful))
        self.stack = ExitStack()
        self.state: Any = None
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "ConversionWorkers":
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


def _make_chunk(state: _WorkerState, chunk: Chunk) -> str:
    """Write a chunk; returns its digest. Raises UserError for a bad source, OSError for the disk."""
    digest, offset = manifest.hasher(), chunk.start
    descriptor = os.open(state.folder / chunk.file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for part in chunk.parts:
            end = offset + part.size
            for made in state.make(part.source):
                for piece in files.in_pieces(made):
                    digest.update(piece)
                    # A write may take less than it was given.
                    while piece:
                        written = os.pwrite(descriptor, piece, offset)
                        offset, piece = offset + written, piece[written:]
            assert offset == end, f"{part.source} does not have {part.size} bytes"
        if chunk.size >= SYNC:
            os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _read_back(state: _WorkerState, file: str, sizes: Sequence[int]) -> tuple[manifest.ManifestEntry, list[str]]:
    """Sync a file and read it back; returns its manifest entry and the digests of chunks of these sizes."""
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
