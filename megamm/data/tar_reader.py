"""Reading single members of tars by where they lie, without an index: what a data worker does.

In: `Stored`, a member's place. Out: its bytes, after its header there has been checked. Offsets and sizes in bytes.
"""

import os
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

from megamm.errors import UserError

BLOCK = 512
"""Bytes of a tar block: a header is one, data is padded to whole ones, two zero blocks end the file."""
_OPEN = 128
"""Tars open at a time: a process may have some 1,000 files, a data set more shards."""


class Stored(NamedTuple):
    """A member `name` of a tar: where its data begins and how much it is."""

    tar: str
    name: str
    offset: int
    size: int


class TarReader:
    """Opens tars when they are first read; a copy in another process opens its own."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, member: Stored) -> bytes:
        """The data of a member. UserError if the tar's header there is not this member's."""
        block = os.pread(self._file(member.tar), BLOCK + member.size, member.offset - BLOCK)
        if len(block) < BLOCK + member.size or not _is_header_of(block, member):
            try:
                header = tarfile.TarInfo.frombuf(block[:BLOCK], "utf-8", "strict")
            except (tarfile.HeaderError, ValueError):
                header = tarfile.TarInfo("no tar header")
            if (header.name, header.size) != (member.name, member.size) or len(block) < BLOCK + member.size:
                what = f"index and tar do not match: {member.name} ({member.size} bytes) expected, "
                what += f"{header.name} ({header.size}) found"
                remedy = f"rebuild the index with `megamm data index {Path(member.tar).parent}`"
                raise UserError(what, where=member.tar, remedy=remedy)
        return block[BLOCK:]

    def _file(self, tar: str) -> int:
        if tar not in self._files:
            if len(self._files) == _OPEN:
                os.close(self._files.popitem(last=False)[1])
            try:
                self._files[tar] = os.open(tar, os.O_RDONLY)
            except OSError as error:
                what = f"a shard cannot be read any more: {error.strerror}"
                raise UserError(what, where=tar, remedy="restore it; the same command resumes the run") from error
        self._files.move_to_end(tar)
        return self._files[tar]

    def close(self) -> None:
        """Close the tars; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __reduce__(self) -> "tuple[type[TarReader], tuple[()]]":
        return TarReader, ()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()


def _is_header_of(block: bytes, member: Stored) -> bool:
    """Whether a plain ustar or GNU header names this member and its size: ten times as fast as parsing it."""
    return block[:100].rstrip(b"\0") == member.name.encode() and block[124:136].rstrip(b" \0") == b"%011o" % member.size
