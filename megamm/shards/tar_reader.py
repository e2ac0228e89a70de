"""Reads single members of tars by their offset, without an index, in data workers.

In: a `StoredMember`. Out: its bytes, after checking the header before them. Offsets and sizes are in bytes. A
`RemoteMember` is read from the cache of its node (shard_cache.py), after comparing its checksum.
"""

import os
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

from megamm.common.errors import UserError
from megamm.shards.shard_cache import CachedReader, RemoteMember

BLOCK = 512
"""Bytes of a tar block: a header is one block, data is padded to whole blocks, two zero blocks end the file."""
_OPEN = 128
"""Maximum number of open tars: a process can open about 1,000 files, and a data set has more shards."""


class StoredMember(NamedTuple):
    """A member `name` of a tar: the start and size of its data."""

    tar: str
    name: str
    offset: int
    size: int


class TarReader:
    """Opens tars when they are first read; a copy in another process opens its own."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, int] = OrderedDict()
        self._cached = CachedReader()

    def read(self, member: StoredMember | RemoteMember) -> bytes:
        """The data of a member. Raises UserError if the tar's header there does not match this member."""
        if isinstance(member, RemoteMember):
            return self._cached.read(member)
        # One system call reads header and data. pread has no file position, so threads and forked workers can share a
        # file.
        block = os.pread(self._file(member.tar), BLOCK + member.size, member.offset - BLOCK)
        if len(block) < BLOCK + member.size or not _is_header_of(block, member):
            _require_header(block, member)
            if len(block) < BLOCK + member.size:
                raise _mismatch(member, f"the tar ends after {len(block) - BLOCK} of them")
        return block[BLOCK:]

    def verify(self, member: StoredMember) -> None:
        """Raise UserError if the tar's header there does not match this member; the data is not read."""
        block = os.pread(self._file(member.tar), BLOCK, member.offset - BLOCK)
        if len(block) < BLOCK or not _is_header_of(block, member):
            _require_header(block, member)

    def _file(self, tar: str) -> int:
        """The descriptor of a tar, opened if necessary; the least recently used one is closed beyond the limit."""
        if tar not in self._files:
            if len(self._files) == _OPEN:
                # The first entry is the least recently used: `_file` moves each one that it returns to the end.
                os.close(self._files.popitem(last=False)[1])
            try:
                self._files[tar] = os.open(tar, os.O_RDONLY)
            except OSError as error:
                what = f"a shard can no longer be read: {error.strerror}"
                raise UserError(what, where=tar, remedy="restore it; the same command resumes the run") from error
        self._files.move_to_end(tar)
        return self._files[tar]

    def close(self) -> None:
        """Close the tars; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])
        self._cached.close()

    def __reduce__(self) -> "tuple[type[TarReader], tuple[()]]":
        return TarReader, ()

    def __del__(self) -> None:
        if hasattr(self, "_cached"):
            self.close()


def _is_header_of(block: bytes, member: StoredMember) -> bool:
    """Whether a plain ustar or GNU header has this name and size: ten times as fast as parsing it."""
    return block[:100].rstrip(b"\0") == member.name.encode() and block[124:136].rstrip(b" \0") == b"%011o" % member.size


def _require_header(block: bytes, member: StoredMember) -> None:
    """Raise UserError unless the block begins with the member's header, of any kind."""
    try:
        # Other valid headers, with other padding or base-256 sizes, fail the quick comparison: parse before reporting.
        header = tarfile.TarInfo.frombuf(block[:BLOCK], "utf-8", "strict")
    except (tarfile.HeaderError, ValueError):
        header = tarfile.TarInfo("no tar header")
    if (header.name, header.size) != (member.name, member.size):
        raise _mismatch(member, f"{header.name} ({header.size}) found")


def _mismatch(member: StoredMember, found: str) -> UserError:
    what = f"index and tar do not match: {member.name} ({member.size} bytes) expected, {found}"
    return UserError(
        what, where=member.tar, remedy=f"rebuild the index with `megamm data index {Path(member.tar).parent}`"
    )
