"""How long samples are, and which of them are used with rows of a given length.

    needed(parts, kind, long_documents) -> IntArray      tokens that a row must have for each of some samples
    SampleUse.find(table, ...)                           which samples are not used; how many are longer than a row

A pass over a split looks at the lengths of the samples zone by zone. It skips a zone in which no sample can be longer
than a row, from the largest lengths in the index, and applies the rules to the longer ones only.
Lengths are in tokens and include marks.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from megamm.common.sample import IntArray
from megamm.data.pipeline.packing import DOCUMENT_MARKS
from megamm.data.pipeline.sample_table import PartLengths, SampleTable, segment_sum, windows
from megamm.data.pipeline.split_cache import Made, SplitCache

DocumentKind = Literal["whole", "pairs", "answers"]
LongDocuments = Literal["auto", "cut", "skip", "error"]


def needed(parts: PartLengths, kind: DocumentKind, long_documents: LongDocuments) -> IntArray:
    """Tokens that a row must have for each sample, cut as far as allowed, whatever the permutation `[n]`."""
    length, is_text = parts.length, parts.is_text
    if long_documents in ("skip", "error"):
        uncut = np.where(parts.is_ordered, segment_sum(length, parts.starts), _selected(parts, length, kind))
        return DOCUMENT_MARKS + uncut
    # A document of text alone can be split anywhere, a page around its media. Others must fit as they are, or with
    # one token of their text.
    longest_media = np.maximum.reduceat(np.where(is_text, 0, length), parts.starts[:-1])
    kept = np.where(is_text, np.minimum(length, 1), length) if long_documents == "cut" else length
    uncut = np.where(parts.is_ordered, longest_media, _selected(parts, kept, kind))
    return DOCUMENT_MARKS + np.where(longest_media > 0, uncut, 1)


def longest(parts: PartLengths, kind: DocumentKind) -> IntArray:
    """Tokens of each sample's longest document, uncut `[n]`."""
    return needed(parts, kind, "skip")


def _selected(parts: PartLengths, length: IntArray, kind: DocumentKind) -> IntArray:
    """The length of each sample's longest selection of unnumbered parts, from that of every part `[parts]`."""
    if kind == "whole":
        return segment_sum(length, parts.starts)
    # Any two parts can be the pair: the two longest. Sorting by length keeps each sample's parts together.
    counts = np.diff(parts.starts)
    sample = np.repeat(np.arange(len(counts)), counts)
    longest_first = length[np.lexsort((-length, sample))]
    index_in_sample = np.arange(len(length)) - parts.starts[sample]
    return segment_sum(np.where(index_in_sample < 2, longest_first, 0), parts.starts)


@dataclass(frozen=True)
class Named:
    """A number of samples and the keys of the first ones."""

    NAMES: ClassVar[int] = 3
    count: int
    first: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.count:,} ({', '.join(self.first)}{', ...' if self.count > len(self.first) else ''})"


@dataclass(frozen=True)
class LongSamples:
    """The samples of one split that are longer than a row: split into documents, with a shorter text, or skipped.

    samples: number of all samples of the split.
    """

    folder: Path | str
    row_length: int
    samples: int
    split: Named
    shortened: Named
    skipped: Named

    def __bool__(self) -> bool:
        return any(named.count for named in (self.split, self.shortened, self.skipped))

    def __str__(self) -> str:
        done = {"split": self.split, "with shortened text": self.shortened, "skipped": self.skipped}
        words = ", ".join(f"{what}: {named}" for what, named in done.items() if named.count)
        return (
            f"{self.folder}: of {self.samples:,} samples, longer than a row of {self.row_length:,} tokens and {words}"
        )


class UsedSamples(Sequence[int]):
    """The numbers of the samples that are used, in order: all but some, so only those are stored.

    gaps: of the j-th unused sample, the number of used ones before it, `[unused]`, ascending.
    """

    def __init__(self, samples: int, gaps: np.ndarray) -> None:
        self._numbers, self._gaps = range(samples - len(gaps)), gaps

    def __len__(self) -> int:
        return len(self._numbers)

    def take(self, positions: IntArray) -> IntArray:
        """The used samples at these positions, each in [0, len)."""
        if not len(self._gaps):
            return positions
        # Used sample k comes after all unused ones with at most k used ones before them. Numbers above the last gap
        # count as that one, so that they fit into its type: searchsorted would convert all gaps to another.
        bounded = np.minimum(positions, int(self._gaps[-1])).astype(self._gaps.dtype)
        return positions + np.searchsorted(self._gaps, bounded, side="right")

    def __contains__(self, sample: object) -> bool:
        if not isinstance(sample, int) or not 0 <= sample < len(self) + len(self._gaps):
            return False
        # The j-th unused sample is gaps[j] + j.
        j = bisect_left(range(len(self._gaps)), sample, key=lambda j: int(self._gaps[j]) + j)
        return j == len(self._gaps) or int(self._gaps[j]) + j != sample

    def unused(self) -> IntArray:
        """The numbers of the other samples, in order."""
        return self._gaps.astype(np.int64) + np.arange(len(self._gaps))

    def __getitem__(self, k: Any) -> Any:
        found = self._numbers[k]
        if isinstance(found, range):
            return self.take(np.array(found, dtype=np.int64)).tolist()
        return int(self.take(np.array([found], dtype=np.int64))[0])


@dataclass(frozen=True)
class SampleUse:
    """What becomes of the samples of a split in rows of one length.

    The last three are the numbers of the samples longer than a row and their first ones.
    """

    used: UsedSamples
    split: tuple[int, tuple[int, ...]]
    shortened: tuple[int, tuple[int, ...]]
    skipped: tuple[int, tuple[int, ...]]

    @classmethod
    def find(
        cls, folder: Path, table: SampleTable, kind: DocumentKind, long_documents: LongDocuments, row_length: int
    ) -> "SampleUse":
        """Find it by a pass over all samples; that over a large split is made once, see SplitCache."""
        settings = f"{table.identity} {kind} {long_documents} {row_length}"
        kept = SplitCache(folder, "used", xxhash.xxh3_128(settings.encode()).hexdigest())
        made = kept.get(len(table), lambda: _Pass(table, kind, long_documents, row_length).made())
        counts = [int(count) for count in made.metadata["counts"].split()]
        numbers = [made.arrays[name].tolist() for name in _FATES]
        first = ((count, tuple(samples)) for count, samples in zip(counts, numbers, strict=True))
        return cls(UsedSamples(len(table), made.arrays["gaps"]), *first)


_FATES = ("split", "shortened", "skipped")


class _Pass:
    """The pass over all samples of a table."""

    def __init__(self, table: SampleTable, kind: DocumentKind, long_documents: LongDocuments, row_length: int) -> None:
        self._table, self._kind, self._long_documents = table, kind, long_documents
        self._row_length = row_length
        self._counts = dict.fromkeys(_FATES, 0)
        self._first: dict[str, list[int]] = {fate: [] for fate in _FATES}
        self._unused: list[IntArray] = []

    def made(self) -> Made:
        """Make the pass."""
        for start, stop in windows(len(self._table)):
            if DOCUMENT_MARKS + self._table.most(start, stop) > self._row_length:
                totals = DOCUMENT_MARKS + self._table.totals(start, stop)
                # No document of a sample is longer than all its parts.
                self._look_at(start + np.flatnonzero(totals > self._row_length))
                self._table.release()
        unused = np.concatenate([np.zeros(0, dtype=np.int64), *self._unused])
        arrays = {"gaps": unused - np.arange(len(unused))}
        arrays |= {fate: np.array(first, dtype=np.int64) for fate, first in self._first.items()}
        return arrays, {"counts": " ".join(str(self._counts[fate]) for fate in _FATES)}

    def _look_at(self, samples: IntArray) -> None:
        """Note what becomes of these samples."""
        if not len(samples):
            return
        parts = self._table.parts_of(samples)
        is_long = longest(parts, self._kind) > self._row_length
        is_used = needed(parts, self._kind, self._long_documents) <= self._row_length
        is_split = np.logical_and.reduceat(parts.is_text, parts.starts[:-1]) | parts.is_ordered
        self._note("split", samples[is_long & is_used & is_split])
        self._note("shortened", samples[is_long & is_used & ~is_split])
        self._note("skipped", samples[is_long & ~is_used])
        self._unused.append(samples[~is_used])

    def _note(self, fate: str, samples: npt.NDArray[np.int64]) -> None:
        self._counts[fate] += len(samples)
        self._first[fate] += samples[: Named.NAMES - len(self._first[fate])].tolist()
