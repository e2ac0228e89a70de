"""Which parts a sample has, where they are stored, and how long they are: what a TokenDataset asks of its shards.

    table = open_samples(split, caches)
    table.spans(i, [1, 0])              two parts of sample i, in that order
    table.totals(start, stop)           lengths of these samples, for passes over all of them
    table.parts_of(samples)             lengths of all parts of some samples

`AlignedSamples`: every cache has the same keys in the same order and no part numbers, as for pairs and for text. Then
member i of each cache is a part of sample i, so nothing has to be computed or stored. `JoinedSamples`: all others, by a
table of parts, which is computed when the split is opened and, for a large split, kept beside its caches.
Lengths are in tokens; those of media include their two marks, as in a row.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from megamm.common.errors import UserError
from megamm.common.sample import IntArray
from megamm.data.pipeline.packing import MEDIA_MARKS
from megamm.data.pipeline.split_cache import SplitCache
from megamm.shards.folder import ShardFolder
from megamm.shards.index import UNNUMBERED, ZONE
from megamm.shards.shard_cache import RemoteMember
from megamm.shards.tar_reader import StoredMember

Caches = dict[str, ShardFolder]
"""Modality -> its token cache, in the order of permutation 0."""


class TokenSpan(NamedTuple):
    """Tokens [start, stop) of a part of a sample; the part is one `member` of a token cache, `tokens` long in total.

    It carries the member's file and offset, so that a data worker needs no index of the data set.
    """

    modality: str
    member: StoredMember | RemoteMember
    tokens: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Tokens in a row, including marks."""
        return self.stop - self.start + (0 if self.modality == "text" else MEDIA_MARKS)


class PartLengths(NamedTuple):
    """The parts of n samples, sample by sample in reading order: `[parts]`, and `[n]` for is_ordered.

    starts: first part of each sample, and the number of parts `[n + 1]`; is_ordered: whether the parts are numbered.
    """

    starts: IntArray
    length: IntArray
    is_text: npt.NDArray[np.bool_]
    is_ordered: npt.NDArray[np.bool_]


class SampleColumns(NamedTuple):
    """The columns of some samples for a digest: their keys and numbers of parts `[n]`, the others `[parts]`."""

    keys: list[str]
    counts: IntArray
    modality: IntArray
    number: IntArray
    tokens: IntArray


class SampleTable(Protocol):
    """The samples of a split, numbered from 0; a source of another format has these members too."""

    identity: str
    """Digest of everything that the order of documents depends on."""

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """The key of sample i."""

    def parts(self, i: int) -> int:
        """Number of parts of sample i, at least 1."""

    def is_ordered(self, i: int) -> bool:
        """Whether the parts of sample i have an order of their own."""

    def spans(self, i: int, selected: Sequence[int]) -> list[TokenSpan]:
        """These parts of sample i, which are numbered in reading order."""

    def totals(self, start: int, stop: int) -> IntArray:
        """The length of all parts together of each sample in [start, stop)."""

    def most(self, start: int, stop: int) -> int:
        """At least the largest of these totals, without reading them if that is possible."""

    def parts_of(self, samples: IntArray) -> PartLengths:
        """The parts of these samples."""

    def columns(self, start: int, stop: int) -> SampleColumns:
        """The columns of the samples in [start, stop)."""

    def release(self) -> None:
        """Unmap the pages of the index read so far: they no longer count as memory of this process."""


def windows(samples: int) -> Iterator[tuple[int, int]]:
    """The windows [start, stop) of a pass over all samples: as long as the zones of an index."""
    for start in range(0, samples, ZONE):
        yield start, min(start + ZONE, samples)


def open_samples(folder: Path, caches: Caches) -> SampleTable:
    """The samples of these caches of a split. Raises UserError if the part numbers of a sample have a gap."""
    first, *others = (cache.index for cache in caches.values())
    is_numbered = any(cache.index.part is not None for cache in caches.values())
    if not is_numbered and all(index.keys_digest == first.keys_digest for index in others):
        return AlignedSamples(caches)
    return JoinedSamples(folder, caches)


def _identity(caches: Caches) -> str:
    text = " ".join(f"{name} {cache.index.digest}" for name, cache in caches.items())
    return xxhash.xxh3_128(text.encode()).hexdigest()


def _marks(caches: Caches) -> list[int]:
    return [0 if name == "text" else MEDIA_MARKS for name in caches]


def _tokens(cache: ShardFolder) -> np.ndarray:
    """The lengths of a cache; an empty one has none."""
    return np.zeros(0, dtype=np.int64) if cache.tokens is None else cache.tokens


def _lengths(cache: ShardFolder, members: np.ndarray) -> np.ndarray:
    """The lengths of some members."""
    return _tokens(cache)[members]


def _numbers(cache: ShardFolder, members: np.ndarray) -> IntArray:
    """The part numbers of some members."""
    if cache.index.part is None:
        return np.full(len(members), UNNUMBERED, dtype=np.int64)
    return cache.index.part[members].astype(np.int64) - 1


def segment_sum(values: np.ndarray, starts: IntArray) -> IntArray:
    """The sum of the values in each segment [starts[i], starts[i + 1]), of which none may be empty."""
    # reduceat gives values[starts[i]] for an empty segment instead of 0.
    return np.add.reduceat(values, starts[:-1], dtype=np.int64)


class AlignedSamples:
    """Sample i has member i of every cache as parts."""

    def __init__(self, caches: Caches) -> None:
        self._caches, self._names, self._marks = list(caches.values()), list(caches), _marks(caches)
        self.identity = _identity(caches)

    def __len__(self) -> int:
        return len(self._caches[0])

    def key(self, i: int) -> str:
        """See SampleTable, as for all methods."""
        return self._caches[0].index.key_of(i)

    def parts(self, i: int) -> int:
        return len(self._caches)

    def is_ordered(self, i: int) -> bool:
        return False

    def spans(self, i: int, selected: Sequence[int]) -> list[TokenSpan]:
        spans = []
        for modality in selected:
            cache = self._caches[modality]
            tokens = int(_tokens(cache)[i])
            spans.append(TokenSpan(self._names[modality], cache.stored(i), tokens, 0, tokens))
        return spans

    def totals(self, start: int, stop: int) -> IntArray:
        total = np.full(stop - start, sum(self._marks), dtype=np.int64)
        for cache in self._caches:
            total += _tokens(cache)[start:stop]
        return total

    def most(self, start: int, stop: int) -> int:
        zones = slice(start // ZONE, -(-stop // ZONE))
        most = [cache.index.most_tokens for cache in self._caches]
        return sum(self._marks) + sum(int(tokens[zones].max()) for tokens in most if tokens is not None)

    def parts_of(self, samples: IntArray) -> PartLengths:
        width = len(self._caches)
        length = np.empty((len(samples), width), dtype=np.int64)
        for modality, (cache, marks) in enumerate(zip(self._caches, self._marks, strict=True)):
            length[:, modality] = _tokens(cache)[samples]
            length[:, modality] += marks
        is_text = np.tile([name == "text" for name in self._names], len(samples))
        starts = np.arange(len(samples) + 1, dtype=np.int64) * width
        return PartLengths(starts, length.reshape(-1), is_text, np.zeros(len(samples), dtype=np.bool_))

    def columns(self, start: int, stop: int) -> SampleColumns:
        keys = [key.decode() for key in self._caches[0].index.key[start:stop].tolist()]
        width = len(self._caches)
        tokens = np.stack([_tokens(cache)[start:stop] for cache in self._caches], axis=1).astype(np.int64)
        modality = np.tile(np.arange(width), len(keys))
        number = np.full(width * len(keys), UNNUMBERED, dtype=np.int64)
        return SampleColumns(keys, np.full(len(keys), width, dtype=np.int64), modality, number, tokens.reshape(-1))

    def release(self) -> None:
        for cache in self._caches:
            cache.index.release()


class JoinedSamples:
    """The members of all caches, joined by key: samples in the order in which their keys first occur."""

    def __init__(self, folder: Path, caches: Caches) -> None:
        self._caches, self._names = list(caches.values()), list(caches)
        self._marks_of = np.array(_marks(caches), dtype=np.int64)
        self.identity = _identity(caches)
        kept = SplitCache(folder, "samples", self.identity)
        self._table = kept.get(sum(map(len, self._caches)), lambda: (_joined(folder, self._caches), {}))
        self._starts = self._table.arrays["starts"]
        """First part of each sample, and the number of parts `[samples + 1]`; no sample is without parts."""
        self._modality, self._member = self._table.arrays["modality"], self._table.arrays["member"]
        """The index of each part's modality, and of its member in the cache `[parts]`."""

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _part(self, i: int, p: int) -> tuple[int, int]:
        """Modality and member of part p of sample i."""
        part = int(self._starts[i]) + p
        return int(self._modality[part]), int(self._member[part])

    def key(self, i: int) -> str:
        """See SampleTable, as for all methods."""
        modality, member = self._part(i, 0)
        return self._caches[modality].index.key_of(member)

    def parts(self, i: int) -> int:
        return int(self._starts[i + 1]) - int(self._starts[i])

    def is_ordered(self, i: int) -> bool:
        modality, member = self._part(i, 0)
        return self._caches[modality].index.number_of(member) != UNNUMBERED

    def spans(self, i: int, selected: Sequence[int]) -> list[TokenSpan]:
        spans = []
        for modality, member in (self._part(i, p) for p in selected):
            cache = self._caches[modality]
            tokens = int(_tokens(cache)[member])
            spans.append(TokenSpan(self._names[modality], cache.stored(member), tokens, 0, tokens))
        return spans

    def totals(self, start: int, stop: int) -> IntArray:
        parts = self.parts_of(np.arange(start, stop))
        return segment_sum(parts.length, parts.starts)

    def most(self, start: int, stop: int) -> int:
        return int(self.totals(start, stop).max(initial=0))

    def parts_of(self, samples: IntArray) -> PartLengths:
        starts, parts = self._parts_of(samples)
        modality, member = self._modality[parts], self._member[parts]
        length = self._marks_of[modality] + self._gather(modality, member, _lengths)
        is_text = np.array([name == "text" for name in self._names])[modality]
        first = starts[:-1]
        is_ordered = self._gather(modality[first], member[first], _numbers) != UNNUMBERED
        return PartLengths(starts, length, is_text, is_ordered)

    def _parts_of(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        """Starts `[n + 1]` in the parts of these samples, and the indexes of the parts in the table."""
        first = self._starts[samples].astype(np.int64)
        counts = self._starts[samples + 1].astype(np.int64) - first
        starts = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts)))
        return starts, np.arange(starts[-1]) + np.repeat(first - starts[:-1], counts)

    def _gather(
        self, modality: np.ndarray, member: np.ndarray, column: Callable[[ShardFolder, np.ndarray], np.ndarray]
    ) -> IntArray:
        """A column's number of each of these parts."""
        found = np.empty(len(modality), dtype=np.int64)
        for m, cache in enumerate(self._caches):
            of_cache = modality == m
            if of_cache.any():
                found[of_cache] = column(cache, member[of_cache])
        return found

    def columns(self, start: int, stop: int) -> SampleColumns:
        starts, parts = self._parts_of(np.arange(start, stop))
        modality, member = self._modality[parts].astype(np.int64), self._member[parts]
        number, tokens = (self._gather(modality, member, column) for column in (_numbers, _lengths))
        return SampleColumns([self.key(i) for i in range(start, stop)], np.diff(starts), modality, number, tokens)

    def release(self) -> None:
        self._table.release()
        for cache in self._caches:
            cache.index.release()


def _joined(folder: Path, caches: Sequence[ShardFolder]) -> dict[str, np.ndarray]:
    """Compute the table of parts. Raises UserError if the part numbers of a sample have a gap."""
    width = max(cache.index.key.itemsize for cache in caches)
    keys = np.concatenate([cache.index.key.astype(f"S{width}") for cache in caches])
    _, first, code = np.unique(keys, return_index=True, return_inverse=True)
    # Samples are numbered in the order in which their keys first occur; np.unique numbers them in key order.
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    sample = rank[code]
    modality = np.repeat(np.arange(len(caches)), [len(cache) for cache in caches])
    member = np.concatenate([np.arange(len(cache)) for cache in caches])
    number = np.concatenate([_numbers(cache, np.arange(len(cache))) for cache in caches])
    # Sample by sample, in reading order: by number if the parts have one, otherwise by modality.
    order = np.lexsort((modality, number, sample))
    sample, number = sample[order], number[order]
    starts = np.searchsorted(sample, np.arange(len(first) + 1))
    wrong = _wrongly_numbered(sample, number, starts)
    if wrong.any():
        key = keys[order[int(wrong.argmax())]].decode()
        what = f"the parts of {key!r} are not numbered 0, 1, 2 ... over the modalities of this run"
        remedy = "set tokenizers for every modality of this source, or build it again"
        raise UserError(what, where=folder, remedy=remedy)
    return {"starts": starts, "modality": modality[order], "member": member[order]}


def _wrongly_numbered(sample: IntArray, number: IntArray, starts: IntArray) -> npt.NDArray[np.bool_]:
    """Whether each part is of a sample whose parts are neither all unnumbered nor numbered 0, 1, 2 ... `[parts]`."""
    is_unnumbered = number == UNNUMBERED
    unnumbered = segment_sum(is_unnumbered, starts)
    is_mixed = (unnumbered > 0) & (unnumbered < np.diff(starts))
    index_in_sample = np.arange(len(sample)) - starts[sample]
    return is_mixed[sample] | (~is_unnumbered & (number != index_in_sample))
