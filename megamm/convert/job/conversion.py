"""Runs a conversion: several processes write its files, resumable after a kill; verified, then renamed.

    PLACE/.tmp-NAME/journal.jsonl    the conversion's identity, then number and digest of every segment written
    PLACE/.tmp-NAME/folder/          renamed to PLACE/NAME when everything is written and verified

The layout and length of every file are known before any data: a file is a list of items, a segment is a run of items,
and any process can make any segment. Segments whose digests are in the journal are done, so the same command resumes
after kill -9. At the end every file is synced and read back, and its segments must match their digests. This detects
segments that a power failure lost although the journal lists them; they are made again.
"""

import ctypes
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from megamm.checkpoint import code_version, files, manifest
from megamm.common.errors import UserError
from megamm.common.progress import Progress
from megamm.convert.job.plan import Conversion, Segment, segments
from megamm.convert.job.workers import Workers, made, making, read_back

log = logging.getLogger(__name__)


class Work:
    """The temporary folder of a conversion to `final`; only one process at a time can use it."""

    def __init__(self, conversion: Conversion, final: Path, nproc: int, more: int = 0) -> None:
        """nproc: processes, 0: one per core, at most one per segment; more: bytes besides the conversion's files.

        Raises UserError if there is not enough space, or another process uses the folder.
        """
        self.conversion, self.final, self.nproc = conversion, final, nproc
        self.place = final.with_name(f".tmp-{final.name}")
        self.folder = self.place / "folder"
        self.journal = _Journal(self.place, conversion)
        self.segments = segments(conversion.files)
        try:
            self._need(more)
        except UserError:
            if not self.folder.exists():
                files.remove_tree(self.place)
            self.close()
            raise

    def _need(self, more: int) -> None:
        """Check the free space for the files that are not written yet."""
        size = sum(segment.size for segment in self.segments) + more
        there = sum(f.stat().st_blocks * 512 for f in self.folder.rglob("*") if f.is_file())
        free = shutil.disk_usage(self.place).free
        if size - there > free:
            what = f"not enough disk space: {size - there:,} bytes needed, {free:,} bytes free"
            raise UserError(what, where=self.final.parent, remedy="free disk space or choose another folder")

    def fill(self) -> dict[str, manifest.ManifestEntry]:
        """Write and sync every file; returns their manifest entries. Raises UserError on failure."""
        self._clear()
        for file, items in self.conversion.files.items():
            files.make_folder((self.folder / file).parent)
            with (self.folder / file).open("ab") as opened:
                opened.truncate(sum(item.size for item in items))
        making_it = partial(making, self.conversion, self.folder)
        try:
            with Workers(making_it, self.nproc, len(self.segments)) as workers:
                log.info("%s: %d segments, %d processes", self.conversion.name, len(self.segments), workers.count)
                self._make(workers)
                found = self._verify(workers)
                if self._undone():  # segments of an earlier, killed process have been lost
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
        ctypes.CDLL(None).malloc_trim(0)  # memory kept by the C library would be a tenth of the gate's
        return found

    def _clear(self) -> None:
        """Remove other files that a killed process wrote beside the conversion's; they will be written again."""
        kept = {Path(file).parts[0] for file in self.conversion.files}
        for path in self.folder.glob("*"):
            if path.name not in kept:
                (files.remove_tree if path.is_dir() else files.remove_file)(path)

    def _undone(self) -> list[Segment]:
        return [segment for segment in self.segments if segment.number not in self.journal.done]

    def _make(self, workers: Workers) -> None:
        undone = self._undone()
        with Progress(self.conversion.name, sum(segment.size for segment in self.segments)) as progress:
            progress.add(progress.total - sum(segment.size for segment in undone), is_old=True)
            for segment, digest in workers.all(made, {segment: (segment,) for segment in undone}):
                self.journal.add(segment.number, digest)
                progress.add(segment.size)

    def _verify(self, workers: Workers) -> dict[str, manifest.ManifestEntry]:
        """Read all files back; segments with another digest are removed from the journal."""
        by_file: dict[str, list[Segment]] = {}
        for segment in self.segments:
            by_file.setdefault(segment.file, []).append(segment)
        arguments = {file: (file, [s.size for s in parts]) for file, parts in by_file.items()}
        found = {}
        with Progress(f"{self.conversion.name}, verifying", sum(s.size for s in self.segments)) as progress:
            for file, (entry, digests) in workers.all(read_back, arguments):
                found[file] = entry
                progress.add(entry.size)
                pairs = zip(by_file[file], digests, strict=True)
                wrong = [segment.number for segment, digest in pairs if self.journal.done[segment.number] != digest]
                self.journal.forget(wrong)
        return found

    def publish(self) -> None:
        """Rename the folder to its final name, durably, and remove the temporary one."""
        for path in (*self.folder.rglob("*"), self.folder):
            files.sync(path)
        files.rename(self.folder, self.final)
        files.sync(self.final.parent)
        files.remove_tree(self.place)

    def close(self) -> None:
        """Release the folder for other processes; finished segments are kept."""
        self.journal.close()

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Journal:
    """Segments that are written, by number, with their digests."""

    def __init__(self, place: Path, conversion: Conversion) -> None:
        """Resume a journal of the same conversion, or start a new one."""
        files.make_folder(place)
        self.path, self.done = place / "journal.jsonl", dict[int, str]()
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self.descriptor)
            raise UserError(
                "another process is converting to this folder", where=place, remedy="wait for it, or stop it"
            ) from None
        self.first = {"identity": conversion.identity, "code": code_version()}
        lines = list(_parsed(self.path.read_bytes()))
        if lines and lines[0] == self.first:
            self.done = {line["segment"]: line["digest"] for line in lines[1:]}
            log.info("%s: resuming, %d segments are done", conversion.name, len(self.done))
        elif (place / "folder").exists():
            log.info("%s: discarding partial output of different inputs", conversion.name)
            files.remove_tree(place / "folder")
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


def _parsed(data: bytes) -> Iterator[dict[str, Any]]:
    """Parsed lines up to the first one that is cut off."""
    for line in data.splitlines(keepends=True):
        try:
            yield dict(json.loads(line)) if line.endswith(b"\n") else {}
        except ValueError:
            return
