"""A bounded cache of shards from an object store, shared by all processes of a node.

    CACHE/state, lock                counters of the node, and the lock of the space
    CACHE/<folder>/index.safetensors       the index of a folder of shards (remote_folder.py)
    CACHE/<folder>/000000.tar        a sparse file: members that were downloaded, at their offsets; holes elsewhere
    CACHE/<folder>/000000.when       of every block of 4 KiB, when it was last wanted (u32; 0: a hole)

Whether a member is there follows from its bytes alone: they have the checksum of the index, or the member is
downloaded. So nothing that a killed process leaves, and no damage of the disk, is ever believed. A download holds a
lock on its range of the file (fcntl, of the open file: it ends with the process); others wait, and then find it.

Space is reserved before a download. At the limit, the blocks that were wanted longest ago become holes. Members are
wanted in the order of training, so these have been used already.
"""

import fcntl
import mmap
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megamm.common.errors import UserError
from megamm.common.sample import IntArray
from megamm.shards.cache_space import BLOCK_BYTES, SPACE_KEPT, evict, fixed_bytes, punch, when_file
from megamm.shards.index import checksum_of
from megamm.shards.range_store import RangeStore, StoreError

PIECE = 16 << 20
"""Most bytes of one request, unless a member is larger."""
_FULL_BLOCKS = 2 * 512
"""Bytes between members that follow each other in a tar are fewer: a header and the padding before it."""
_OPEN = 128
"""Most open files of a reader."""
MISMATCHES = 3
"""Downloads with a wrong checksum after which a member counts as damaged in the store."""
_COUNTERS = ("clock", "bytes", "downloaded", "requests", "failures", "evicted")


class CacheOptions(NamedTuple):
    """Folder of the cache, its limit in bytes, and seconds for which a failing store is asked again."""

    folder: str
    limit: int
    patience: float


class RemoteFolder(NamedTuple):
    """A folder of shards at a URL: its folder in the cache, and that cache."""

    url: str
    local: str
    options: CacheOptions


class RemoteMember(NamedTuple):
    """A member of a tar at a URL: the start and size of its data, and its checksum."""

    folder: RemoteFolder
    shard: int
    name: str
    offset: int
    size: int
    checksum: int

    @property
    def tar(self) -> str:
        """The URL of the tar."""
        return f"{self.folder.url}/{tar_name(self.shard)}"


def tar_name(shard: int) -> str:
    """The name of the tar of that number."""
    return f"{shard:06d}.tar"


class Wanted(NamedTuple):
    """Members of one tar, by offset: start and size of their data `[n]`, and checksums `[n]`."""

    folder: RemoteFolder
    shard: int
    offset: IntArray
    size: IntArray
    checksum: np.ndarray


def wanted_of(members: Sequence[RemoteMember]) -> list[Wanted]:
    """These members, by tar."""
    by_tar: dict[tuple[RemoteFolder, int], dict[int, RemoteMember]] = {}
    for member in members:
        by_tar.setdefault((member.folder, member.shard), {})[member.offset] = member
    result = []
    for (folder, shard), found in by_tar.items():
        ordered = [found[offset] for offset in sorted(found)]
        offset, size = np.array([(m.offset, m.size) for m in ordered], dtype=np.int64).T
        checksum = np.array([m.checksum for m in ordered], dtype=np.uint64)
        result.append(Wanted(folder, shard, offset, size, checksum))
    return result


class ShardCache:
    """One cache of this node; all its processes may use it at a time.

    UserError if its file system cannot be used, or the limit is too small for a member; StoreError if the store fails.
    """

    def __init__(self, options: CacheOptions) -> None:
        self.options, self.folder = options, Path(options.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock_file = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
            state = os.open(self.folder / "state", os.O_RDWR | os.O_CREAT)
            if os.fstat(state).st_size < mmap.PAGESIZE:
                os.truncate(state, mmap.PAGESIZE)
            self._state = np.frombuffer(mmap.mmap(state, mmap.PAGESIZE), dtype=np.uint64)
            os.close(state)
            _require_holes(self.folder)
            fcntl.flock(self._lock_file, fcntl.LOCK_EX)
            if not self._state[1]:  # new, or lost
                self._state[1] = evict(self.folder, options.limit)
            fcntl.flock(self._lock_file, fcntl.LOCK_UN)
        except OSError as error:
            remedy = "set data.cache.folder to a folder of a local disk (ext4, xfs, btrfs or tmpfs)"
            raise UserError(f"the cache cannot be used: {error.strerror}", where=self.folder, remedy=remedy) from error
        self._thread_lock = threading.Lock()
        self._stores: dict[str, RangeStore] = {}

    def store(self, url: str) -> RangeStore:
        """The store at a URL, whose failures are counted."""
        if url not in self._stores:
            self._stores[url] = RangeStore(url, self.options.patience, lambda: self.count(failures=1))
        return self._stores[url]

    def figures(self) -> dict[str, int]:
        """The counters of this node since the cache was created; "bytes" is what it holds."""
        return {name: int(value) for name, value in zip(_COUNTERS, self._state, strict=False)}

    def count(self, **changes: int) -> None:
        """Add to counters of the node."""
        with self._locked():
            self._add(**changes)

    def _add(self, **changes: int) -> None:
        for name, change in changes.items():
            at = _COUNTERS.index(name)
            self._state[at] = max(0, int(self._state[at]) + change)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._thread_lock:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def reserve_file(self, size: int) -> None:
        """Make space for a file that is kept as long as its folder is in use."""
        with self._locked():
            self._make_space(size + BLOCK_BYTES)

    def _make_space(self, size: int) -> None:
        """Evict if necessary, and count these bytes as held. UserError if the limit is too small."""
        held, limit = int(self._state[1]), self.options.limit
        if held + size > limit:
            left = evict(self.folder, int(limit * SPACE_KEPT) - size)
            self._add(evicted=max(0, held - left))
            self._state[1] = left
            if left + size > limit:
                fixed = fixed_bytes(self.folder) / 1e9
                what = f"the cache is too small: {size / 1e9:.6f} GB are needed beside {fixed:.6f} GB of indexes"
                raise UserError(what, where=self.folder, remedy="set data.cache.gb to a larger limit")
        self._add(bytes=size)

    def _reserve(self, tar: Path, start: int, stop: int) -> None:
        """Make space for the bytes [start, stop) of a tar, and note that they are wanted now."""
        first, last = start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
        with self._locked(), open(os.open(when_file(tar), os.O_RDWR | os.O_CREAT), "r+b") as file:
            table = file.fileno()
            if new := _holes(table, first, last):
                # The table grows too, by at most one block for 1,024 and one more.
                growth = BLOCK_BYTES * (2 + (last - first) // 1024)
                self._make_space(new * BLOCK_BYTES + growth)
                # The eviction may have taken blocks of this range.
                self._add(bytes=(_holes(table, first, last) - new) * BLOCK_BYTES - growth)
            self._add(clock=1)
            now = int(self._state[0]) & 0xFFFFFFFF or 1
            before = os.fstat(table).st_blocks
            os.pwrite(table, np.full(last - first, now, dtype="<u4").tobytes(), 4 * first)
            self._add(bytes=(os.fstat(table).st_blocks - before) * 512)

    def fetch(self, wanted: Wanted) -> None:
        """Download what is missing of these members; neighbours come in one request of up to PIECE bytes."""
        tar = Path(wanted.folder.local) / tar_name(wanted.shard)
        for first, last in _pieces(wanted):
            start, stop = int(wanted.offset[first]), int(wanted.offset[last - 1] + wanted.size[last - 1])
            file = os.open(tar, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lock_range(file, start, stop)
                missing = [i for i in range(first, last) if _held(file, wanted, i) is None]
                for begin, end in _runs(missing):
                    self._download(file, tar, wanted, begin, end)
                if len(missing) < last - first:
                    self._reserve(tar, start, stop)  # notes that they are wanted
            finally:
                os.close(file)

    def _download(self, file: int, tar: Path, wanted: Wanted, first: int, last: int) -> None:
        """Download the members [first, last), which are neighbours, and verify them."""
        start, stop = int(wanted.offset[first]), int(wanted.offset[last - 1] + wanted.size[last - 1])
        store = self.store(wanted.folder.url)
        for _ in range(MISMATCHES):
            data = store.read(tar.name, start, stop)
            self.count(downloaded=len(data), requests=1)
            wrong = [i for i in range(first, last) if not _is_valid(_part(data, wanted, i, start), wanted, i)]
            if not wrong:
                break
            self.count(failures=1)
        else:
            where = f"{wanted.folder.url}/{tar.name}"
            what = f"{len(wrong)} members from byte {int(wanted.offset[wrong[0]])} on do not match the index"
            remedy = "upload the tar again, or rebuild and upload the index (`megamm data index FOLDER`)"
            raise StoreError(what, where=where, remedy=remedy)
        self._reserve(tar, start, stop)
        try:
            os.pwrite(file, data, start)
        except OSError as error:
            remedy = "free some space, or lower data.cache.gb"
            raise UserError(f"cannot write to the cache: {error.strerror}", where=tar, remedy=remedy) from error


def _holes(table: int, first: int, last: int) -> int:
    """The number of blocks in this range that are not held, of a file as `when_file`."""
    found = os.pread(table, 4 * (last - first), 4 * first)
    when = np.frombuffer(found[: len(found) // 4 * 4], dtype="<u4")
    return last - first - int(np.count_nonzero(when))


def _part(data: bytes, wanted: Wanted, i: int, start: int) -> memoryview:
    offset = int(wanted.offset[i]) - start
    return memoryview(data)[offset : offset + int(wanted.size[i])]


def _is_valid(data: bytes | memoryview, wanted: Wanted, i: int) -> bool:
    return len(data) == int(wanted.size[i]) and checksum_of(data) == int(wanted.checksum[i])


def _held(file: int, wanted: Wanted, i: int) -> bytes | None:
    """The data of a member if the file holds it."""
    data = os.pread(file, int(wanted.size[i]), int(wanted.offset[i]))
    return data if _is_valid(data, wanted, i) else None


def _pieces(wanted: Wanted) -> Iterator[tuple[int, int]]:
    """Ranges [first, last) of members that follow each other in the tar, of up to PIECE bytes each."""
    first = 0
    for i in range(1, len(wanted.offset) + 1):
        if i < len(wanted.offset):
            gap = int(wanted.offset[i] - wanted.offset[i - 1] - wanted.size[i - 1])
            length = int(wanted.offset[i] + wanted.size[i] - wanted.offset[first])
            if gap < _FULL_BLOCKS and length <= PIECE:
                continue
        yield first, i
        first = i


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The ranges [first, last) of consecutive ascending numbers."""
    first = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[first], numbers[i - 1] + 1
            first = i


def _lock_range(file: int, start: int, stop: int) -> None:
    """Wait for the exclusive lock of a range; closing the file, or the end of the process, ends it."""
    # struct flock: type, whence, start, length, pid. A lock of the open file also excludes other threads.
    fcntl.fcntl(file, fcntl.F_OFD_SETLKW, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, stop - start, 0))


def _require_holes(folder: Path) -> None:
    """Raise OSError if files of this folder cannot have holes."""
    probe = folder / f".probe.{os.getpid()}.{threading.get_ident()}"
    try:
        with open(probe, "wb") as file:
            file.write(b"x" * 2 * BLOCK_BYTES)
            file.flush()
            punch(file.fileno(), 0, BLOCK_BYTES)
    finally:
        with suppress(FileNotFoundError):
            probe.unlink()


@lru_cache(maxsize=8)
def cache_of(options: CacheOptions) -> ShardCache:
    """This process's access to a cache."""
    return ShardCache(options)


class CachedReader:
    """Reads members of remote tars, from the cache if they are there. Keeps files open, one reader for each process."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, member: RemoteMember) -> bytes:
        """The data of a member, verified. Raises UserError as ShardCache does."""
        wanted = wanted_of([member])[0]
        file = self._file(member)
        data = None if file is None else _held(file, wanted, 0)
        attempts = iter(range(MISMATCHES))
        while data is None:
            if next(attempts, None) is None:
                # Other processes evict it before it is read.
                remedy = "set data.cache.gb to a larger limit"
                raise UserError("the cache is too small for its processes", where=member.folder.local, remedy=remedy)
            cache_of(member.folder.options).fetch(wanted)
            file = self._file(member)
            data = None if file is None else _held(file, wanted, 0)
        return data

    def _file(self, member: RemoteMember) -> int | None:
        """The descriptor of a tar in the cache; None if nothing of it is there."""
        path = f"{member.folder.local}/{tar_name(member.shard)}"
        if path not in self._files:
            if len(self._files) == _OPEN:
                os.close(self._files.popitem(last=False)[1])
            try:
                self._files[path] = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                return None
        self._files.move_to_end(path)
        return self._files[path]

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])
