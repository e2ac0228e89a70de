"""The global order of documents: a pure function of (seed, mixture, window), the same on every rank and restart.

Documents are taken in windows of WINDOW. Among the first k documents, the count of each source differs from its share
of k by less than one document, for every k. A source's documents are permuted again each epoch, by a keyed Feistel
network with cycle walking (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"): any position is computed
without storing or drawing the permutation. Hashes are SplitMix64 (Steele et al. 2014). numpy's generators are not used
because their streams may change between versions, which must not change a resumed run.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from megamm.common.errors import UserError
from megamm.common.sample import IntArray

WINDOW = 4096
"""Documents that are shuffled and packed together; it is part of the order, so not an option."""
_ROUNDS = 6
_Hash = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Source:
    """A sample set in the mixture: its name, relative weight (of documents) and number of documents.

    shards: digest of everything else that the order depends on (`TokenDataset.digest`), to detect changed shards.
    """

    name: str
    weight: float
    documents: int
    shards: str = ""


@dataclass(frozen=True)
class Window:
    """The documents of one window in order, `[WINDOW]` each: the sample, its source's epoch, and its turn.

    turn: a random number per sample plus the epoch, >= 0; it selects the parts and their order.
    """

    source: IntArray
    sample: IntArray
    epoch: IntArray
    turn: IntArray


@dataclass(frozen=True)
class Segment:
    """These sources have the shares given by their weights from window `window` until the next segment begins."""

    window: int
    sources: tuple[Source, ...]


class Mixture:
    """Weighted sources in one order; `then` changes them from a window on.

    Sources are identified by name: their documents are counted through all segments, so that their epochs continue.
    `sources` are all that ever took part, in order of first use. Raises UserError for a source that is empty or
    whose share is too small to be used.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self.seed = seed
        self.sources: tuple[Source, ...] = ()
        self.segments: tuple[Segment, ...] = ()
        self._bounds: list[list[Fraction]] = []
        """Cumulative shares of `sources`, for each segment; exact, so that rounding cannot change the order."""
        self._append(Segment(0, tuple(sources)))

    def then(self, window: int, sources: Sequence[Source]) -> "Mixture":
        """This mixture before `window`, and these sources from there on, replacing any later change.

        Raises UserError if a source's shards have changed.
        """
        kept = [segment for segment in self.segments if segment.window < window]
        first, *others = [*kept, Segment(window, tuple(sources))]
        changed = Mixture(first.sources, self.seed)
        for segment in others:
            changed._append(segment)
        return changed

    def require_same(self, sources: Sequence[Source]) -> None:
        """Raise UserError if the shards of a source differ from those of the same name here."""
        known = {source.name: source for source in self.sources}
        for source in sources:
            before = known.get(source.name, source)
            if (before.documents, before.shards) != (source.documents, source.shards):
                what = f"the shards of source {source.name!r} have changed since the run began with it"
                what += f" ({source.documents:,} samples now, {before.documents:,} before)"
                remedy = "restore its shards and `documents`, or put the new shards into a folder with another name"
                raise UserError(what, remedy=remedy)

    def has_shares_of(self, sources: Sequence[Source]) -> bool:
        """Whether the last segment gives these sources the shares of their weights, in any order."""
        return _shares(self.segments[-1].sources) == _shares(sources)

    def _append(self, segment: Segment) -> None:
        _check(segment.sources)
        assert not self.segments or segment.window > self.segments[-1].window, "segments follow one another"
        self.require_same(segment.sources)
        known = {source.name for source in self.sources}
        self.sources += tuple(source for source in segment.sources if source.name not in known)
        self.segments += (segment,)
        self._bounds = [list(accumulate(self._shares_in(segment))) for segment in self.segments]

    def _shares_in(self, segment: Segment) -> list[Fraction]:
        shares = _shares(segment.sources)
        return [shares.get(source.name, Fraction(0)) for source in self.sources]

    def counts(self, documents: int) -> list[int]:
        """Number of documents of each source among the first `documents`."""
        counts = [0] * len(self.sources)
        starts = [segment.window * WINDOW for segment in self.segments]
        for start, stop, bounds in zip(starts, [*starts[1:], documents], self._bounds, strict=True):
            inside = min(stop, documents) - start
            if inside <= 0:
                break
            ends = [(2 * inside * b.numerator + b.denominator) // (2 * b.denominator) for b in bounds]
            counts = [n + end - begin for n, begin, end in zip(counts, [0, *ends], ends, strict=False)]
        return counts

    def counts_in(self, w: int) -> list[int]:
        """Number of documents of each source in window w."""
        quotas = zip(self.counts(w * WINDOW), self.counts((w + 1) * WINDOW), strict=True)
        return [stop - start for start, stop in quotas]

    def window(self, w: int) -> Window:
        """The w-th window of WINDOW documents."""
        source, sample, epoch, turn = [], [], [], []
        quotas = zip(self.counts(w * WINDOW), self.counts((w + 1) * WINDOW), strict=True)
        for index, (start, stop) in enumerate(quotas):
            if start == stop:
                continue
            n = self.sources[index].documents
            epochs, places = np.divmod(np.arange(start, stop, dtype=np.int64), n)
            samples = np.empty_like(places)
            for e in np.unique(epochs).tolist():  # one window can contain several epochs of a small source
                samples[epochs == e] = permute(places[epochs == e], n, self._key(index, f"epoch {e}"))
            # Drawn once per sample, then increased every epoch, so that all orders of every sample occur.
            first = _hash(samples.astype(np.uint64) ^ self._key(index, "turn")).astype(np.int64) & 0x7FFFFFFF
            source.append(np.full(stop - start, index, dtype=np.int64))
            sample.append(samples)
            epoch.append(epochs)
            turn.append(first + epochs)
        order = permute(np.arange(WINDOW), WINDOW, _key(f"{self.seed}/window {w}"))
        return Window(*(np.concatenate(column)[order] for column in (source, sample, epoch, turn)))

    def _key(self, index: int, purpose: str) -> np.uint64:
        return _key(f"{self.seed}/{self.sources[index].name}/{purpose}")


def _check(sources: Sequence[Source]) -> None:
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
        if share * WINDOW < 1:
            what = f"source {name!r} would get less than one in {WINDOW} documents"
            raise UserError(what, remedy="raise its weight or remove it")


def _shares(sources: Sequence[Source]) -> dict[str, Fraction]:
    total = sum(Fraction(source.weight) for source in sources)
    return {source.name: Fraction(source.weight) / total for source in sources}


def permute(places: IntArray, n: int, key: np.uint64) -> IntArray:
    """The images of these places (each in [0, n)) under a permutation of range(n) chosen by the key."""
    half = max(1, -(-(n - 1).bit_length() // 2))
    mask = np.uint64((1 << half) - 1)
    result = places.astype(np.uint64)
    outside = np.ones(len(result), dtype=np.bool_)
    while outside.any():  # follow the cycle in the larger power of two back into the range; < 4 steps on average
        left, right = result[outside] >> np.uint64(half), result[outside] & mask
        for turn in range(_ROUNDS):
            salt = key + np.uint64(turn * 0x9E3779B9)
            left, right = right, left ^ (_hash(right ^ salt) & mask)
        result[outside] = left << np.uint64(half) | right
        outside = result >= n
    return result.astype(np.int64)


def _key(text: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))


def _hash(x: _Hash) -> _Hash:
    """SplitMix64's output function, elementwise; unsigned 64-bit arithmetic wraps."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
