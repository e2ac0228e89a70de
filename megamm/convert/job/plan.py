"""The plan of a conversion: files as lists of items, known before any data, split into segments of items.

Any process can make any segment, in any order: its position in the file is known.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

SHARD_SIZE = 5_000_000_000
"""Bytes of a file; only a single larger tensor exceeds it."""
SEGMENT = 64 << 20
"""Maximum bytes of a segment; only a single larger item exceeds it."""


@dataclass(frozen=True)
class Item:
    """A number of bytes that are made together; `what` identifies them for the conversion."""

    size: int
    what: Any


class Maker(Protocol):
    """A conversion, opened on a process."""

    def __call__(self, what: Any, /) -> Iterable[bytes | memoryview]:
        """The bytes of an item, in pieces. Raises UserError if the source is damaged."""


class Conversion(Protocol):
    """The plan of a conversion: plain data, so that it can be sent to every process."""

    @property
    def name(self) -> str:
        """A name for log lines."""

    @property
    def files(self) -> Mapping[str, Sequence[Item]]:
        """Items by path in the folder that is made."""

    @property
    def identity(self) -> str:
        """Identity of source and options: partial output with another identity is discarded."""

    def opened(self) -> AbstractContextManager[Maker]:
        """Open the conversion for making items in this process."""


@dataclass(frozen=True)
class Segment:
    """Consecutive items of a file, from byte `start` on."""

    number: int
    file: str
    start: int
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        return sum(item.size for item in self.items)


def segments(of: Mapping[str, Sequence[Item]]) -> list[Segment]:
    """Segments of all files, numbered in their order."""
    found: list[Segment] = []
    for file, items in of.items():
        start, size, run = 0, 0, list[Item]()
        for item in items:
            if run and size + item.size > SEGMENT:
                found.append(Segment(len(found), file, start, tuple(run)))
                start, size, run = start + size, 0, []
            run.append(item)
            size += item.size
        found.append(Segment(len(found), file, start, tuple(run)))
    return found
