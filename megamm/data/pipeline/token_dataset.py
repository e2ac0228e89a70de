"""One source's split of shards as documents: token caches joined by key; lengths are known without reading tokens.

    TokenDataset(SHARDS/<source>/<split>, codec_ids)
        .plan(i, permutation, row_length) -> [DocumentSpec]   the documents of sample i, and where their tokens are
        .read(spec) -> Document                               the tokens of one of them

A sample's parts are in the order given by the index of a permutation (see `selection`), or in their own order if they
are numbered. A document is a whole sample. `long_documents` says what becomes of one that is longer than a row: "auto"
splits text without media at the end of a row, and a page (numbered parts) there or between two parts, and skips other
samples; "cut" also shortens the text beside media; "skip" and "error" change no document. No medium is ever cut.
Lengths are in tokens and include marks.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from megamm.common.errors import UserError
from megamm.common.sample import Document, IntArray, Part
from megamm.data.pipeline.packing import DOCUMENT_MARKS, MEDIA_MARKS
from megamm.shards.folder import UNNUMBERED, ShardFolder, tokens_from_bytes
from megamm.shards.tar_reader import StoredMember, TarReader

DocumentKind = Literal["whole", "pairs", "answers"]
LongDocuments = Literal["auto", "cut", "skip", "error"]

_PARTS = np.dtype([("sample", "i8"), ("member", "i8"), ("tokens", "i8"), ("number", "i4"), ("modality", "i4")])
"""A row of the table of parts: the index of its sample, of its member in the cache, its length without marks, its
number in the sample (or UNNUMBERED), and the index of its modality."""


class TokenSpan(NamedTuple):
    """Tokens [start, stop) of a part of a sample; the part is one `member` of a token cache, `tokens` long in total.

    It carries the member's file and offset, so that a data worker needs no index of the data set.
    """

    modality: str
    member: StoredMember
    tokens: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Tokens in a row, including marks."""
        return self.stop - self.start + (0 if self.modality == "text" else MEDIA_MARKS)


class DocumentSpec(NamedTuple):
    """A document that is planned but not read: its sample's key and its parts in reading order.

    length: tokens in a row, including marks; given: see Document.
    """

    key: str
    spans: tuple[TokenSpan, ...]
    length: int
    given: int = 0


def read_document(tars: TarReader, document: DocumentSpec) -> Document:
    """Read the tokens of a document. Raises UserError if a member is damaged or does not match its index."""
    parts = tuple(Part(span.modality, _read_ids(tars, document.key, span)) for span in document.spans)
    return Document(document.key, parts, document.given)


def _read_ids(tars: TarReader, key: str, span: TokenSpan) -> IntArray:
    where, remedy = Path(span.member.tar).parent, "delete that token cache and run `megamm data tokenize` again"
    try:
        ids = tokens_from_bytes(tars.read(span.member))
    except (ValueError, EOFError) as error:
        raise UserError(f"damaged tokens of {key!r}", where=where, remedy=remedy) from error
    if ids.size != span.tokens:
        what = f"the number of tokens of {key!r} does not match the index"
        raise UserError(what, where=where, remedy=remedy)
    return ids[span.start : span.stop]


def selections(parts: int, kind: DocumentKind) -> int:
    """Number of documents that can be made from a sample with that many unnumbered parts."""
    return parts * (parts - 1) if kind != "whole" and parts > 1 else math.factorial(parts)


def selection(parts: int, index: int, kind: DocumentKind) -> list[int]:
    """The selected parts of a sample, in order: the permutation of that index, or the ordered pair of that index.

    kind "answers" has the same pairs as "pairs", but their first part counts towards no loss.
    """
    index %= selections(parts, kind)
    if kind != "whole" and parts > 1:
        # The second part is numbered without the first one.
        first, second = divmod(index, parts - 1)
        return [first, second + (second >= first)]
    # The digits of the index in the factorial number system name each time one of the parts that are left (Lehmer
    # code), so that consecutive indexes go through all permutations.
    left, order = list(range(parts)), []
    for remaining in range(parts, 0, -1):
        digit, index = divmod(index, math.factorial(remaining - 1))
        order.append(left.pop(digit))
    return order


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

    folder: Path
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


class TokenDataset:
    """The samples of SHARDS/<source>/<split>: the contents of each modality's token cache, joined by key.

    codec_ids: modality -> codec_id, in the order of permutation 0 (text first). Modalities without a folder in the
    split are absent. Raises UserError if a cache is missing, no modality is present, or a sample's part numbers have a
    gap.
    """

    def __init__(
        self,
        folder: Path,
        codec_ids: Mapping[str, str],
        kind: DocumentKind = "whole",
        long_documents: LongDocuments = "auto",
    ) -> None:
        self.folder, self.kind, self.long_documents = folder, kind, long_documents
        caches = _open_caches(folder, codec_ids)
        self._modalities, self._caches = list(caches), list(caches.values())
        self._tars = TarReader()
        self.keys, sample_of = _join([cache.keys for cache in self._caches])
        parts = np.concatenate(
            [_parts_of(m, cache, sample_of[m]) for m, cache in enumerate(self._caches)], dtype=_PARTS
        )
        # Sample by sample, in reading order: by number if the parts have one, otherwise by modality.
        self._parts = parts[np.lexsort((parts["modality"], parts["number"], parts["sample"]))]
        self._starts = np.searchsorted(self._parts["sample"], np.arange(len(self.keys) + 1))
        """First part of each sample, and the number of parts `[samples + 1]`; no sample is without parts."""
        self._check_numbers()
        self.longest = self._needed("skip")
        """Tokens of each sample's longest document, uncut `[samples]`."""
        self.needed = self.longest if long_documents in ("skip", "error") else self._needed(long_documents)
        """Tokens that a row must have for each sample, cut as far as allowed `[samples]`."""

    def __len__(self) -> int:
        return len(self.keys)

    def _check_numbers(self) -> None:
        """Raise UserError unless every sample's parts are all unnumbered or numbered 0, 1, 2 ..."""
        sample, number = self._parts["sample"], self._parts["number"]
        is_unnumbered = number == UNNUMBERED
        unnumbered = segment_sum(is_unnumbered, self._starts)
        is_mixed = (unnumbered > 0) & (unnumbered < np.diff(self._starts))
        has_gap = ~is_unnumbered & (number != self._index_in_sample())
        wrong = is_mixed[sample] | has_gap
        if wrong.any():
            key = self.keys[int(sample[wrong.argmax()])]
            what = f"the parts of {key!r} are not numbered 0, 1, 2 ... over the modalities of this run"
            remedy = "set tokenizers for every modality of this source, or build it again"
            raise UserError(what, where=self.folder, remedy=remedy)

    def _index_in_sample(self) -> IntArray:
        """0, 1, 2 ... for the parts of each sample `[parts]`."""
        return np.arange(len(self._parts)) - self._starts[self._parts["sample"]]

    def _is_text(self) -> npt.NDArray[np.bool_]:
        """Whether each part is a text `[parts]`."""
        return np.array([name == "text" for name in self._modalities])[self._parts["modality"]]

    def _needed(self, long_documents: LongDocuments) -> IntArray:
        """Tokens that a row must have for each sample, whatever the permutation `[samples]`."""
        is_text = self._is_text()
        length = self._parts["tokens"] + np.where(is_text, 0, MEDIA_MARKS)
        is_ordered = self._parts["number"][self._starts[:-1]] != UNNUMBERED
        if long_documents in ("skip", "error"):
            return DOCUMENT_MARKS + np.where(is_ordered, segment_sum(length, self._starts), self._selected(length))
        # A document of text alone can be split anywhere, a page around its media. Others must fit as they are, or with
        # one token of their text.
        longest_media = np.maximum.reduceat(np.where(is_text, 0, length), self._starts[:-1])
        kept = np.where(is_text, np.minimum(length, 1), length) if long_documents == "cut" else length
        uncut = np.where(is_ordered, longest_media, self._selected(kept))
        return DOCUMENT_MARKS + np.where(longest_media > 0, uncut, 1)

    def _selected(self, length: IntArray) -> IntArray:
        """The length of each sample's longest selection of unnumbered parts, from that of every part `[parts]`."""
        if self.kind == "whole":
            return segment_sum(length, self._starts)
        # Any two parts can be the pair: the two longest. Sorting by length keeps each sample's parts together.
        longest_first = length[np.lexsort((-length, self._parts["sample"]))]
        return segment_sum(np.where(self._index_in_sample() < 2, longest_first, 0), self._starts)

    def used(self, row_length: int) -> IntArray:
        """The numbers of the samples that are used with rows of this length. UserError if a longer one is an error."""
        used = np.flatnonzero(self.needed <= row_length)
        if self.long_documents == "error" and len(used) < len(self):
            raise self.too_long(row_length)
        return used

    def long_samples(self, row_length: int) -> LongSamples:
        """What becomes of the samples that are longer than a row."""
        is_long, is_used = self.longest > row_length, self.needed <= row_length
        is_split = np.logical_and.reduceat(self._is_text(), self._starts[:-1])
        is_split |= self._parts["number"][self._starts[:-1]] != UNNUMBERED
        return LongSamples(
            self.folder,
            row_length,
            len(self),
            split=self._named(is_long & is_used & is_split),
            shortened=self._named(is_long & is_used & ~is_split),
            skipped=self._named(is_long & ~is_used),
        )

    def _named(self, samples: npt.NDArray[np.bool_]) -> Named:
        chosen = np.flatnonzero(samples)
        return Named(len(chosen), tuple(self.keys[i] for i in chosen[: Named.NAMES].tolist()))

    def too_long(self, row_length: int) -> UserError:
        """The error about samples that do not fit into a row; it names the first of them."""
        is_unused = self.needed > row_length
        first, longest = int(is_unused.argmax()), self.needed.max()
        what = f"sample {self.keys[first]!r} needs {self.needed[first]} tokens, but a row has {row_length} "
        what += f"({is_unused.sum()} such samples, the longest needs {longest})"
        remedy = f"set data.seq_length to at least {longest}"
        others = [other for other in ("auto", "cut") if (self._needed(other) <= row_length).any()]
        if others:
            remedy += f", or data.long_documents to {others[0]}"
        return UserError(what, where=self.folder, remedy=remedy)

    def is_ordered(self, i: int) -> bool:
        """Whether the sample's parts have an order of their own."""
        return bool(self._parts["number"][self._starts[i]] != UNNUMBERED)

    def permutations(self, i: int) -> int:
        """Number of distinct documents of sample i; indexes of permutations repeat after that many."""
        parts = int(self._starts[i + 1] - self._starts[i])
        return 1 if self.is_ordered(i) else selections(parts, self.kind)

    def plan(self, i: int, permutation: int, row_length: int) -> list[DocumentSpec]:
        """Sample i in the order of that permutation, cut to rows; none if the sample is skipped."""
        if self.needed[i] > row_length:
            return []
        is_ordered, count = self.is_ordered(i), int(self._starts[i + 1] - self._starts[i])
        selected = range(count) if is_ordered else selection(count, permutation, self.kind)
        spans = self._spans(i, selected)
        length = _length(spans)
        if length <= row_length:
            return [DocumentSpec(self.keys[i], tuple(spans), length, self._given(count, is_ordered))]
        if is_ordered or all(span.modality == "text" for span in spans):
            pieces = _split(spans, row_length - DOCUMENT_MARKS)
            return [DocumentSpec(self.keys[i], tuple(piece), _length(piece)) for piece in pieces]
        spans = [_shortened(span, length - row_length) if span.modality == "text" else span for span in spans]
        return [DocumentSpec(self.keys[i], tuple(spans), row_length, self._given(count, is_ordered))]

    def _given(self, count: int, is_ordered: bool) -> int:
        # With "answers", the first part of a pair is the question. A single part and a page have none: all is learned.
        return int(self.kind == "answers" and count > 1 and not is_ordered)

    def _spans(self, i: int, selected: Sequence[int]) -> list[TokenSpan]:
        """These parts of sample i, which are numbered in reading order."""
        parts = self._parts[self._starts[i] : self._starts[i + 1]].tolist()
        spans = []
        for _, member, tokens, _, modality in [parts[p] for p in selected]:
            stored = self._caches[modality].stored(member)
            spans.append(TokenSpan(self._modalities[modality], stored, tokens, 0, tokens))
        return spans

    def read(self, document: DocumentSpec) -> Document:
        """The tokens of a planned document."""
        return read_document(self._tars, document)

    def whole(self, i: int) -> Document:
        """All parts of sample i in reading order, whatever their length."""
        count = int(self._starts[i + 1] - self._starts[i])
        spans = self._spans(i, range(count))
        given = self._given(count, self.is_ordered(i))
        return self.read(DocumentSpec(self.keys[i], tuple(spans), _length(spans), given))

    def documents(self, i: int, row_length: int) -> Iterator[Document]:
        """Sample i for evaluation, cut to rows: its first and last permutation (opposite orders), or its own order."""
        for permutation in sorted({0, self.permutations(i) - 1}):
            for document in self.plan(i, permutation, row_length):
                yield self.read(document)

    @cached_property
    def digest(self) -> str:
        """12 hex digits over everything that determines a run's order: keys, modalities, lengths, kind of document."""
        digest = hashlib.sha256(f"{self.kind} {self._modalities}\n".encode() + "\n".join(self.keys).encode())
        # Checkpoints record the digest: the columns, their order and their width must stay.
        for column in (self._starts, *(self._parts[name] for name in ("modality", "number", "tokens"))):
            digest.update(np.ascontiguousarray(column, dtype="<i8").data)
        return digest.hexdigest()[:12]


def _length(spans: Sequence[TokenSpan]) -> int:
    """Tokens of a document in a row, including marks."""
    return DOCUMENT_MARKS + sum([span.length for span in spans])


def segment_sum(values: np.ndarray, starts: IntArray) -> IntArray:
    """The sum of the values in each segment [starts[i], starts[i + 1]), of which none may be empty."""
    # reduceat gives values[starts[i]] for an empty segment instead of 0.
    return np.add.reduceat(values, starts[:-1], dtype=np.int64)


def _parts_of(modality: int, cache: ShardFolder, samples: IntArray) -> np.ndarray:
    """The rows of the table of parts for one cache; samples: index of the sample of each member."""
    parts = np.empty(len(cache), dtype=_PARTS)
    parts["sample"], parts["member"], parts["number"], parts["modality"] = (
        samples,
        range(len(cache)),
        cache.parts,
        modality,
    )
    parts["tokens"] = cache.tokens if cache.tokens is not None else 0  # None only if the cache is empty
    return parts


def _join(keys: list[list[str]]) -> tuple[list[str], list[IntArray]]:
    """All distinct keys, and for each list the number of every key in it."""
    if all(other == keys[0] for other in keys[1:]) and len(set(keys[0])) == len(keys[0]):  # aligned, as built
        return keys[0], [np.arange(len(keys[0]))] * len(keys)
    joined = list(dict.fromkeys(key for one in keys for key in one))
    number_of = {key: i for i, key in enumerate(joined)}
    return joined, [np.array([number_of[key] for key in one], dtype=np.int64) for one in keys]


def _shortened(span: TokenSpan, excess: int) -> TokenSpan:
    """A sample's text without its last tokens; an unnumbered sample has one text."""
    assert span.length > excess, "a sample that needs more than a row is skipped"
    return span._replace(stop=span.stop - excess)


def _split(spans: Sequence[TokenSpan], room: int) -> Iterator[list[TokenSpan]]:
    """Pieces of at most `room` tokens, each as long as possible, the last one shorter."""
    taken: list[TokenSpan] = []
    left = room
    for span in spans:
        while span.length > left:
            if span.modality == "text" and left > 0:
                taken.append(span._replace(stop=span.start + left))
                span = span._replace(start=span.start + left)
            assert taken, "a page with a medium longer than a row is skipped"
            yield taken
            taken, left = [], room
        taken.append(span)
        left -= span.length
    yield taken


def _open_caches(folder: Path, codec_ids: Mapping[str, str]) -> dict[str, ShardFolder]:
    """The token caches of the modalities that the split has, in the order of codec_ids."""
    caches: dict[str, ShardFolder] = {}
    for modality, codec_id in codec_ids.items():
        path = folder / f"{modality}.tokens-{codec_id}"
        if path.is_dir():
            caches[modality] = ShardFolder(path)
            if len(caches[modality]) and caches[modality].tokens is None:
                remedy = "delete the folder and run `megamm data tokenize` again"
                raise UserError("the index of a token cache has no lengths", where=path, remedy=remedy)
        elif (folder / modality).is_dir():
            remedy = f"run `megamm data tokenize {folder.parent} --codec NAME=DIR` with the codec of the run"
            raise UserError(f"no {modality} tokens of codec {codec_id}", where=path, remedy=remedy)
    if not caches:
        remedy = "create it with `megamm data build` and `megamm data tokenize`"
        raise UserError(f"no {' or '.join(codec_ids)} in this split", where=folder, remedy=remedy)
    return caches
