"""What a conversion is to write: files as lists of items, known before any data, and runs of them as segments.

Any process makes any segment, in any order: it knows where its bytes go.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

SHARD_SIZE = 5_000_000_000
"""Bytes of a file, what a larger tensor needs aside."""
SEGMENT = 64 << 20
"""Bytes of a segment at most, one larger item aside."""


@dataclass(frozen=True)
class Item:
    """So many bytes that are made together; `what` tells the conversion which."""

    size: int
    what: Any


class Maker(Protocol):
    """A conversion, opened on a process."""

    def __call__(self, what: Any, /) -> Iterable[bytes | memoryview]:
        """The bytes of an item, in pieces. UserError if its source is damaged."""


class Conversion(Protocol):
    """Plain data, so that every process gets it."""

    @property
    def name(self) -> str:
        """For a person."""

    @property
    def files(self) -> Mapping[str, Sequence[Item]]:
        """By their path in the folder that is made."""

    @property
    def identity(self) -> str:
        """Of source and options: what was begun under another one is of no use."""

    def opened(self) -> AbstractContextManager[Maker]:
        """Ready to make items, on this process."""


@dataclass(frozen=True)
class Segment:
    """Items of a file, from byte `start` on."""

    number: int
    file: str
    start: int
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        return sum(item.size for item in self.items)


def segments(of: Mapping[str, Sequence[Item]]) -> list[Segment]:
    """Of all files, numbered in their order."""
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
