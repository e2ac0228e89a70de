"""Plan of a conversion: the parts of each output file, known before any data, and grouped into chunks.

The position of a chunk in its file is known, so any process can make any chunk, in any order.
This module imports neither torch nor Megatron: the command line reads SHARD_SIZE from it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

SHARD_SIZE = 5_000_000_000
"""Bytes of a file; only a single larger tensor exceeds it."""
CHUNK_BYTES = 64 << 20
"""Maximum bytes of a chunk; only a single larger part exceeds it."""
WINDOW = 16 << 20
"""Bytes of a table's rows that form one part of a file; also the elements cast at a time."""
Unit = TypeVar("Unit")


@dataclass(frozen=True)
class FilePart:
    """A number of bytes of a file that are made together; `source` tells the conversion's Maker how."""

    size: int
    source: Any


class Maker(Protocol):
    """A conversion, opened in a process."""

    def __call__(self, source: Any, /) -> Iterable[bytes | memoryview]:
        """The bytes of a FilePart, in pieces. Raises UserError if the input is damaged."""


class Conversion(Protocol):
    """The plan of a conversion: plain data, so that it can be sent to every process."""

    @property
    def name(self) -> str:
        """A name for log lines."""

    @property
    def files(self) -> Mapping[str, Sequence[FilePart]]:
        """Parts of each file, by its path in the output folder."""

    @property
    def identity(self) -> str:
        """Identity of input and options: partial output with another identity is discarded."""

    def opened(self) -> AbstractContextManager[Maker]:
        """Open the conversion for making parts in this process."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive parts of a file, from byte `start` on: the unit of work, and of the journal."""

    number: int
    file: str
    start: int
    parts: tuple[FilePart, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


def chunks(files: Mapping[str, Sequence[FilePart]]) -> list[Chunk]:
    """Chunks of all files, numbered in their order."""
    found: list[Chunk] = []
    for file, parts in files.items():
        start, size, run = 0, 0, list[FilePart]()
        for part in parts:
            # A part is never split: it is made in one piece.
            if run and size + part.size > CHUNK_BYTES:
                found.append(Chunk(len(found), file, start, tuple(run)))
                start, size, run = start + size, 0, []
            run.append(part)
            size += part.size
        found.append(Chunk(len(found), file, start, tuple(run)))
    return found


def row_windows(rows: int, row_bytes: int) -> Iterator[range]:
    """Ranges of a table's rows, WINDOW bytes each: a vocabulary's table can be too large to be made at once."""
    step = max(1, WINDOW // max(1, row_bytes))
    return (range(row, min(rows, row + step)) for row in range(0, rows, step))


def pack_into_files(units: Sequence[Unit], size: Callable[[Unit], int], limit: int) -> list[list[Unit]]:
    """Units in their order, split into files of at most `limit` bytes; a larger unit gets its own file."""
    found: list[list[Unit]] = [[]]
    filled = 0
    for unit in units:
        if found[-1] and filled + size(unit) > limit:
            found.append([])
            filled = 0
        found[-1].append(unit)
        filled += size(unit)
    return found
