"""The global order of documents: a pure function of (seed, mixture, block), the same on every rank and restart.

Documents are taken in shuffle blocks of BLOCK. Among the first k documents, the count of each source differs from its
share of k by less than one document, for every k. A source's documents are permuted again each epoch, by a keyed
Feistel network with cycle walking (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): any position is
computed without storing or drawing the permutation. Hashes are SplitMix64 (Steele et al. 2014). numpy's generators are
not used because their streams may change between versions, which must not change a resumed run.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megamm.common.errors import UserError
from megamm.common.sample import IntArray

BLOCK = 4096
"""Documents that are shuffled and packed together; it is part of the order, so not an option."""
_ROUNDS = 6
"""Rounds of the Feistel network."""
_Hash = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class MixtureSource:
    """A data set in the mixture: its name, relative weight (of documents) and number of documents.

    shards: digest of everything else that the order depends on (`TokenDataset.digest`), to detect changed shards.
    """

    name: str
    weight: float
    documents: int
    shards: str = ""


@dataclass(frozen=True)
class ShuffleBlock:
    """The documents of one block in order, `[BLOCK]` each: the sample, its source's epoch, and its permutation.

    permutation: a random number per sample plus the epoch, >= 0; it selects the parts and their order.
    """

    source: IntArray
    sample: IntArray
    epoch: IntArray
    permutation: IntArray


@dataclass(frozen=True)
class MixtureSegment:
    """These sources have the shares given by their weights from block `block` on, until the next segment begins."""

    block: int
    sources: tuple[MixtureSource, ...]


class Mixture:
    """Weighted sources in one order; `then` changes them from a block on.

    Sources are identified by name: their documents are counted through all segments, so that their epochs continue.
    `sources` are all that ever took part, in order of first use. Raises UserError for a source that is empty or
    whose share is too small to be used.
    """

    def __init__(self, sources: Sequence[MixtureSource], seed: int) -> None:
        self.seed = seed
        self.sources: tuple[MixtureSource, ...] = ()
        self.segments: tuple[MixtureSegment, ...] = ()
        self._bounds: list[list[Fraction]] = []
        """Cumulative shares of `sources`, for each segment; exact, so that rounding cannot change the order."""
        self._append(MixtureSegment(0, tuple(sources)))

    def then(self, block: int, sources: Sequence[MixtureSource]) -> "Mixture":
        """This mixture before `block`, and these sources from there on, replacing any later change.

        Raises UserError if a source's shards have changed.
        """
        kept = [segment for segment in self.segments if segment.block < block]
        first, *others = [*kept, MixtureSegment(block, tuple(sources))]
        changed = Mixture(first.sources, self.seed)
        for segment in others:
            changed._append(segment)
        return changed

    def require_same(self, sources: Sequence[MixtureSource]) -> None:
        """Raise UserError if the shards of a source differ from those of the same name here."""
        known = {source.name: source for source in self.sources}
        for source in sources:
            before = known.get(source.name, source)
            if (before.documents, before.shards) != (source.documents, source.shards):
                what = f"the shards of source {source.name!r} have changed since the run began with it"
                what += f" ({source.documents:,} samples now, {before.documents:,} before)"
                remedy = "restore its shards and `documents`, or put the new shards into a folder with another name"
                raise UserError(what, remedy=remedy)

    def has_shares_of(self, sources: Sequence[MixtureSource]) -> bool:
        """Whether the last segment gives these sources the shares of their weights, in any order."""
        return _shares(self.segments[-1].sources) == _shares(sources)

    def _append(self, segment: MixtureSegment) -> None:
        _check(segment.sources)
        assert not self.segments or segment.block > self.segments[-1].block, "segments follow one another"
        self.require_same(segment.sources)
        known = {source.name for source in self.sources}
        self.sources += tuple(source for source in segment.sources if source.name not in known)
        self.segments += (segment,)
        self._bounds = [list(accumulate(self._shares_in(segment))) for segment in self.segments]

    def _shares_in(self, segment: MixtureSegment) -> list[Fraction]:
        shares = _shares(segment.sources)
        return [shares.get(source.name, Fraction(0)) for source in self.sources]

    def counts(self, documents: int) -> list[int]:
        """Number of documents of each source among the first `documents`."""
        counts = [0] * len(self.sources)
        starts = [segment.block * BLOCK for segment in self.segments]
        for start, stop, bounds in zip(starts, [*starts[1:], documents], self._bounds, strict=True):
            inside = min(stop, documents) - start
            if inside <= 0:
                break
            # Each cumulative share of the documents, rounded to the nearest integer: floor(inside * b + 1/2).
            ends = [(2 * inside * b.numerator + b.denominator) // (2 * b.denominator) for b in bounds]
            # A source has the documents between its neighbours' bounds, so the counts add up to `inside` exactly.
            counts = [n + end - begin for n, begin, end in zip(counts, [0, *ends], ends, strict=False)]
        return counts

    def counts_in(self, b: int) -> list[int]:
        """Number of documents of each source in block b."""
        return [stop - start for start, stop in self._quotas(b)]

    def _quotas(self, b: int) -> list[tuple[int, int]]:
        """For each source, which of its documents, counted from the start of the run, are in block b: [start, stop)."""
        return list(zip(self.counts(b * BLOCK), self.counts((b + 1) * BLOCK), strict=True))

    def block(self, b: int) -> ShuffleBlock:
        """The b-th block of BLOCK documents."""
        source, sample, epoch, permutation = [], [], [], []
        for index, (start, stop) in enumerate(self._quotas(b)):
            if start == stop:
                continue
            n = self.sources[index].documents
            epochs, positions = np.divmod(np.arange(start, stop, dtype=np.int64), n)
            samples = np.empty_like(positions)
            for e in np.unique(epochs).tolist():  # one block can contain several epochs of a small source
                samples[epochs == e] = permute(positions[epochs == e], n, self._key(index, f"epoch {e}"))
            # Drawn once per sample, then increased every epoch, so that all orders of every sample occur.
            first = split_mix(samples.astype(np.uint64) ^ self._key(index, "turn")).astype(np.int64) & 0x7FFFFFFF
            source.append(np.full(stop - start, index, dtype=np.int64))
            sample.append(samples)
            epoch.append(epochs)
            permutation.append(first + epochs)
        # The texts of the keys ("window", "turn", "epoch") are part of the order: they must never change.
        order = permute(np.arange(BLOCK), BLOCK, _key(f"{self.seed}/window {b}"))
        return ShuffleBlock(*(np.concatenate(column)[order] for column in (source, sample, epoch, permutation)))

    def _key(self, index: int, purpose: str) -> np.uint64:
        return _key(f"{self.seed}/{self.sources[index].name}/{purpose}")


def _check(sources: Sequence[MixtureSource]) -> None:
    if not sources:
        raise UserError("no data sources", remedy="add at least one under data.sources")
    for source in sources:
        if not 0 < source.weight < float("inf"):
            raise UserError(f"source {source.name!r} has weight {source.weight}", remedy="set a weight above 0")
        if source.documents < 1:
            raise UserError(f"source {source.name!r} has no documents", remedy="remove it or build its shards")
    if len({source.name for source in sources}) < len(sources):
        raise UserError("two sources have the same name", remedy="rename one")
    for name, share in _shares(sources).items():
        if share * BLOCK < 1:
            what = f"source {name!r} would get less than one in {BLOCK} documents"
            raise UserError(what, remedy="raise its weight or remove it")


def _shares(sources: Sequence[MixtureSource]) -> dict[str, Fraction]:
    total = sum(Fraction(source.weight) for source in sources)
    return {source.name: Fraction(source.weight) / total for source in sources}


def source_names(paths: Sequence[Path]) -> list[str]:
    """Short distinct names of the sources: last parts of their paths, so that moved data keeps its order."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def permute(positions: IntArray, n: int, key: np.uint64) -> IntArray:
    """The images of these positions (each in [0, n)) under a permutation of range(n) chosen by the key."""
    half = max(1, -(-(n - 1).bit_length() // 2))
    mask = np.uint64((1 << half) - 1)
    result = positions.astype(np.uint64)
    outside = np.ones(len(result), dtype=np.bool_)
    # The network permutes [0, 4 ** half), the smallest such range that contains [0, n). A result outside [0, n) is
    # mapped again until it is inside: on average less than four times.
    while outside.any():
        left, right = result[outside] >> np.uint64(half), result[outside] & mask
        for number in range(_ROUNDS):
            # A round can be undone whatever the hash is, because it keeps one half: so the network is a permutation.
            salt = key + np.uint64(number * 0x9E3779B9)
            left, right = right, left ^ (split_mix(right ^ salt) & mask)
        result[outside] = left << np.uint64(half) | right
        outside = result >= n
    return result.astype(np.int64)


def _key(text: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))


def split_mix(x: _Hash) -> _Hash:
    """SplitMix64's output function, elementwise; unsigned 64-bit arithmetic wraps."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
