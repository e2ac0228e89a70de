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
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megamm.common.errors import UserError
from megamm.common.sample import Document, IntArray, Part
from megamm.common.urls import shown, url_of
from megamm.data.pipeline.packing import DOCUMENT_MARKS
from megamm.data.pipeline.sample_lengths import (
    DocumentKind,
    LongDocuments,
    LongSamples,
    Named,
    SampleUse,
    UsedSamples,
    longest,
    needed,
)
from megamm.data.pipeline.sample_table import TokenSpan, open_samples, windows
from megamm.shards.folder import MemberTexts, ShardFolder, tokens_from_bytes
from megamm.shards.index import INDEX
from megamm.shards.range_store import MissingFile
from megamm.shards.remote_folder import RemoteShardFolder
from megamm.shards.shard_cache import ShardCache
from megamm.shards.tar_reader import TarReader

_DIGEST = "2:"
"""Begins a digest of today's version. Earlier ones have none."""


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
    where, remedy = span.member.tar.rpartition("/")[0], "delete that token cache and run `megamm data tokenize` again"
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
        cache: ShardCache | None = None,
    ) -> None:
        """cache: where shards at a URL are kept, which then must be given."""
        self.folder, self.kind, self.long_documents = folder, kind, long_documents
        self.source, self._where = folder.parent, shown(folder)
        caches = _open_caches(folder, codec_ids) if cache is None else _open_remote(folder, codec_ids, cache)
        self.remote_folders = [folder for folder in caches.values() if isinstance(folder, RemoteShardFolder)]
        """The token caches that are at a URL."""
        self._modalities = list(caches)
        self._kept_in = self.remote_folders[0].folder if self.remote_folders else folder
        self.table = open_samples(self._kept_in, caches)
        self.keys = MemberTexts(len(self.table), self.table.key)
        """The key of each sample."""
        self._tars = TarReader()
        self._uses: dict[int, SampleUse] = {}
        """Which samples are used, by length of row."""

    def __len__(self) -> int:
        return len(self.table)

    def longest(self, samples: IntArray) -> IntArray:
        """Tokens of the longest document of each of these samples, uncut `[n]`."""
        return longest(self.table.parts_of(samples), self.kind)

    def needed(self, samples: IntArray, long_documents: LongDocuments | None = None) -> IntArray:
        """Tokens that a row must have for each of these samples, cut as far as allowed `[n]`."""
        return needed(self.table.parts_of(samples), self.kind, long_documents or self.long_documents)

    def _use(self, row_length: int) -> SampleUse:
        if row_length not in self._uses:
            use = SampleUse.find(self._kept_in, self.table, self.kind, self.long_documents, row_length)
            self._uses[row_length] = use
        return self._uses[row_length]

    def used(self, row_length: int) -> UsedSamples:
        """The numbers of the samples that are used with rows of this length. UserError if a longer one is an error."""
        used = self._use(row_length).used
        if self.long_documents == "error" and len(used) < len(self):
            raise self.too_long(row_length)
        return used

    def long_samples(self, row_length: int) -> LongSamples:
        """What becomes of the samples that are longer than a row."""
        use = self._use(row_length)
        fates = (use.split, use.shortened, use.skipped)
        named = (Named(count, tuple(self.keys[i] for i in first)) for count, first in fates)
        return LongSamples(self._where, row_length, len(self), *named)

    def too_long(self, row_length: int) -> UserError:
        """The error about samples that do not fit into a row; it names the first of them."""
        unused = self._use(row_length).used.unused()
        pieces = [unused[start:stop] for start, stop in windows(len(unused))]
        first, most = int(unused[0]), max(int(self.needed(piece).max()) for piece in pieces)
        what = f"sample {self.keys[first]!r} needs {self.needed(unused[:1])[0]} tokens, but a row has {row_length} "
        what += f"({len(unused)} such samples, the longest needs {most})"
        remedy = f"set data.seq_length to at least {most}"
        # What is used now is also used with fewer restrictions.
        options: tuple[LongDocuments, ...] = ("auto", "cut")
        others = [
            other
            for other in options
            if len(unused) < len(self) or any((self.needed(piece, other) <= row_length).any() for piece in pieces)
        ]
        if others:
            remedy += f", or data.long_documents to {others[0]}"
        return UserError(what, where=self._where, remedy=remedy)

    def is_ordered(self, i: int) -> bool:
        """Whether the sample's parts have an order of their own."""
        return self.table.is_ordered(i)

    def permutations(self, i: int) -> int:
        """Number of distinct documents of sample i; indexes of permutations repeat after that many."""
        return 1 if self.is_ordered(i) else selections(self.table.parts(i), self.kind)

    def plan(self, i: int, permutation: int, row_length: int) -> list[DocumentSpec]:
        """Sample i in the order of that permutation, cut to rows; none if the sample is skipped."""
        # Whether it is skipped does not depend on the permutation: another pair of its parts may be longer.
        if i not in self._use(row_length).used:
            return []
        is_ordered, count = self.is_ordered(i), self.table.parts(i)
        selected = range(count) if is_ordered else selection(count, permutation, self.kind)
        spans = self.table.spans(i, selected)
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

    def read(self, document: DocumentSpec) -> Document:
        """The tokens of a planned document."""
        return read_document(self._tars, document)

    def whole(self, i: int) -> Document:
        """All parts of sample i in reading order, whatever their length."""
        count = self.table.parts(i)
        spans = self.table.spans(i, range(count))
        given = self._given(count, self.is_ordered(i))
        return self.read(DocumentSpec(self.keys[i], tuple(spans), _length(spans), given))

    def evaluated(self, i: int, row_length: int) -> Iterator[DocumentSpec]:
        """Sample i for evaluation, cut to rows: its first and last permutation (opposite orders), or its own order."""
        for permutation in sorted({0, self.permutations(i) - 1}):
            yield from self.plan(i, permutation, row_length)

    def documents(self, i: int, row_length: int) -> Iterator[Document]:
        """The tokens of sample i for evaluation."""
        return map(self.read, self.evaluated(i, row_length))

    def release(self) -> None:
        """Unmap the pages of the index read so far: they no longer count as memory of this process."""
        self.table.release()

    @cached_property
    def digest(self) -> str:
        """Everything that determines a run's order: keys, modalities, lengths, kind of document; in no time."""
        text = f"{self.kind} {self._modalities} {self.table.identity}"
        return _DIGEST + hashlib.sha256(text.encode()).hexdigest()[:12]

    def digest_like(self, recorded: str) -> str:
        """The digest of the version that recorded this one in a checkpoint; that before 2 reads the whole index."""
        return self.digest if recorded.startswith(_DIGEST) else self._digest_of_version_1

    @cached_property
    def _digest_of_version_1(self) -> str:
        """12 hex digits, over the columns in this order and this width."""
        digest = hashlib.sha256(f"{self.kind} {self._modalities}\n".encode())
        passes = list(windows(len(self)))
        for start, stop in passes:
            digest.update(("\n" if start else "").encode() + "\n".join(self.table.columns(start, stop).keys).encode())
        starts = np.zeros(1, dtype="<i8")
        digest.update(starts.data)
        for start, stop in passes:
            starts = starts[-1] + np.cumsum(self.table.columns(start, stop).counts)
            digest.update(np.ascontiguousarray(starts, dtype="<i8").data)
        for column in ("modality", "number", "tokens"):
            for start, stop in passes:
                values = getattr(self.table.columns(start, stop), column)
                digest.update(np.ascontiguousarray(values, dtype="<i8").data)
                self.release()
        return digest.hexdigest()[:12]


def _length(spans: Sequence[TokenSpan]) -> int:
    """Tokens of a document in a row, including marks."""
    return DOCUMENT_MARKS + sum([span.length for span in spans])


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


def _open_remote(folder: Path, codec_ids: Mapping[str, str], cache: ShardCache) -> dict[str, ShardFolder]:
    """The same for a split at a URL. A modality is there if its token cache, or its own folder, has an index."""
    url, caches = url_of(folder), dict[str, ShardFolder]()
    assert url is not None, "a cache is given for URLs only"
    for modality, codec_id in codec_ids.items():
        path = f"{url}/{modality}.tokens-{codec_id}"
        try:
            caches[modality] = RemoteShardFolder(path, cache.options)
        except MissingFile:
            try:
                cache.store(f"{url}/{modality}").read(INDEX, 0, 1)
            except MissingFile:
                continue
            remedy = "run `megamm data tokenize` with the codec of the run, and upload the new folders"
            raise UserError(f"no {modality} tokens of codec {codec_id}", where=path, remedy=remedy) from None
    if not caches:
        remedy = "correct the path of the source, or upload the folders that `megamm data tokenize` wrote"
        raise UserError(f"no {' or '.join(codec_ids)} in this split", where=url, remedy=remedy)
    return caches
