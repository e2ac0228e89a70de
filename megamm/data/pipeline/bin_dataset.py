"""One split of Megatron's .bin/.idx as documents of text; lengths are known from the index, without reading tokens.

    open_split(source, split, ...) -> TokenDataset | BinDataset   for a source of the config, whichever it is
    BinDataset(PREFIX, split, ...)
        .plan(i, permutation, row_length) -> [BinDocument]   document i, cut to rows
        .read(spec) -> Document                              the tokens of one of them

A sample is a document of the file, with all its sequences in order. Document i is held out if a hash of i is below the
source's `heldout`; that depends neither on the run's seed nor on the number of documents. Empty documents are skipped.
`long_documents` is that of token_dataset.py: text is split at the end of a row. Lengths are in tokens, with marks.
"""

import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from megamm.common.errors import UserError
from megamm.common.sample import Document, IntArray, Part
from megamm.common.urls import url_of
from megamm.config import SourceConfig
from megamm.config.sections import EndRule
from megamm.data.pipeline.mixture import split_mix
from megamm.data.pipeline.packing import DOCUMENT_MARKS
from megamm.data.pipeline.sample_lengths import DocumentKind, LongDocuments, LongSamples, Named
from megamm.data.pipeline.token_dataset import TokenDataset
from megamm.modalities.protocol import Modality
from megamm.modalities.text import TextModality
from megamm.shards.indexed_dataset import BinReader, IndexedTokens, bin_file, idx_file
from megamm.shards.shard_cache import ShardCache

logger = logging.getLogger(__name__)

Split = Literal["train", "heldout"]

_GROUP = 512
"""Documents whose chosen ones are counted together: one count of 8 bytes is kept for them, not their numbers."""
_CHUNK = _GROUP * 128
"""Documents that are counted at a time; their arrays fit the processor's cache."""
_SAMPLED = 4096
"""Documents whose offsets are part of the digest."""

Chooses = Callable[[int, int], npt.NDArray[np.bool_]]
"""(start, stop) -> whether each of the documents [start, stop) is chosen."""


class EndToken(NamedTuple):
    """The end-of-text token of a source: its id and text, and what is done with it.

    "check": every document must end with it. "remove": the same, and it is not trained on. "add": no document may end
    with it, and it is appended to each.
    """

    rule: EndRule
    token: int
    text: str


class BinTokens(NamedTuple):
    """What a data worker needs to read a file: its path, dtype, number of valid ids and end-of-text token."""

    file: str
    dtype: str
    vocabulary_size: int
    end: EndToken | None


class BinDocument(NamedTuple):
    """A document that is planned but not read: tokens [start, stop) of document `number` of a file, as trained on.

    offset: its first byte; stored: its tokens in the file, with the end-of-text token if they have one.
    """

    source: BinTokens
    number: int
    offset: int
    stored: int
    start: int
    stop: int

    @property
    def key(self) -> str:
        """The number of the document in its file."""
        return str(self.number)

    @property
    def length(self) -> int:
        """Tokens in a row, including marks."""
        return self.stop - self.start + DOCUMENT_MARKS


def read_bin_document(bins: BinReader, document: BinDocument) -> Document:
    """Read the tokens of a document. Raises UserError for a value that is not an id, or a wrong end of the document."""
    source = document.source
    # The last piece is read up to the last stored token, which is compared with the end-of-text token.
    is_last = document.stop == document.stored + _extra(source.end)
    first, stop = min(document.start, document.stored - 1), document.stored if is_last else document.stop
    offset = document.offset + first * np.dtype(source.dtype).itemsize
    values = bins.read(source.file, source.dtype, offset, stop - first)
    with np.errstate(invalid="ignore"):  # NaN, in a file of floating-point numbers
        ids = values.astype(np.int64)
    is_wrong = (ids < 0) | (ids >= source.vocabulary_size) | (ids != values)
    if is_wrong.any():
        at = int(is_wrong.argmax())
        what = f"document {document.number}, token {first + at}: {values[at]} is not one of the "
        what += f"{source.vocabulary_size:,} ids of the text tokenizer"
        raise UserError(what, where=source.file, remedy="set tokenizers.text to the tokenizer that made this file")
    if is_last and source.end is not None:
        ids = _ended(ids, document, source.end)
    return Document(document.key, (Part("text", ids[document.start - first :]),))


def _extra(end: EndToken | None) -> int:
    """Tokens that a document has more than in the file."""
    return 0 if end is None else {"check": 0, "add": 1, "remove": -1}[end.rule]


def _ended(ids: IntArray, document: BinDocument, end: EndToken) -> IntArray:
    """These last tokens of a document, with its end-of-text token as the rule says."""
    has_end = int(ids[-1]) == end.token
    if end.rule == "add" and has_end:
        what = f"document {document.number} already ends with {end.text!r} (id {end.token})"
        remedy = "set end_token of this source to `check` or `remove` that token"
        raise UserError(what, where=document.source.file, remedy=remedy)
    if end.rule != "add" and not has_end:
        what = f"document {document.number} ends with id {ids[-1]}, not with {end.text!r} (id {end.token})"
        remedy = "set end_token of this source to `add` that token, or remove the key"
        raise UserError(what, where=document.source.file, remedy=remedy)
    return {"check": ids, "add": np.append(ids, end.token), "remove": ids[:-1]}[end.rule]


class ChosenDocuments(Sequence[int]):
    """The numbers of the chosen documents of a file, ascending; only counts of groups are kept in memory."""

    def __init__(self, documents: int, chooses: Chooses) -> None:
        self._documents, self._chooses = documents, chooses
        counts = [np.zeros(1, dtype=np.int64)]
        for first in range(0, documents, _CHUNK):
            chosen = chooses(first, min(first + _CHUNK, documents))
            counts.append(np.add.reduceat(chosen, np.arange(0, len(chosen), _GROUP), dtype=np.int64))
        self._before = np.cumsum(np.concatenate(counts))
        """Chosen documents before each group, and their number `[groups + 1]`."""

    def __len__(self) -> int:
        return int(self._before[-1])

    def __iter__(self) -> Iterator[int]:
        for first in range(0, self._documents, _CHUNK):
            chosen = np.flatnonzero(self._chooses(first, min(first + _CHUNK, self._documents)))
            yield from (chosen + first).tolist()

    def take(self, positions: IntArray) -> IntArray:
        """The numbers of the chosen documents at these positions `[n]`."""
        return np.array([self[i] for i in positions.tolist()], dtype=np.int64)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        """The number of one chosen document; those of a slice, in a list."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        if len(self) == self._documents:
            return index
        group = bisect_right(self._before, index) - 1
        first = group * _GROUP
        chosen = np.flatnonzero(self._chooses(first, min(first + _GROUP, self._documents)))
        return first + int(chosen[index - int(self._before[group])])


class BinDataset:
    """The documents of one split of PREFIX.bin and PREFIX.idx; samples have the numbers of their documents in the file.

    heldout: share of the documents that is held out. Raises UserError as IndexedTokens does.
    """

    kind: DocumentKind = "whole"

    def __init__(
        self,
        prefix: Path,
        split: Split,
        vocabulary_size: int,
        heldout: float = 0.0,
        end: EndToken | None = None,
        long_documents: LongDocuments = "auto",
    ) -> None:
        self.source, self.split, self.heldout, self.long_documents = prefix, split, heldout, long_documents
        self._file = IndexedTokens(prefix)
        self._tokens = BinTokens(str(self._file.bin), self._file.dtype.str, vocabulary_size, end)
        self._bins = BinReader()
        self._samples = ChosenDocuments(len(self._file), self._is_in_split)
        stored = self._file.bytes // self._file.dtype.itemsize
        logger.info("%s: %d of %d documents; %d tokens in all", self.folder, len(self), len(self._file), stored)

    def __len__(self) -> int:
        """Number of documents of the split that are not empty."""
        return len(self._samples)

    @property
    def folder(self) -> Path:
        """The name of the split in messages."""
        return self.source / self.split

    def _lengths(self, start: int, stop: int) -> IntArray:
        """Tokens of the documents [start, stop) as they are trained on, without marks `[stop - start]`."""
        stored = self._file.lengths(start, stop)
        # An empty document stays one: it is skipped, and gets no end-of-text token.
        return np.where(stored > 0, stored + _extra(self._tokens.end), 0)

    def _is_in_split(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        is_in_split = self._lengths(start, stop) > 0
        if self.heldout:
            # 53 bits of the hash as a number in [0, 1), exact in floating point.
            hashed = split_mix(np.arange(start, stop, dtype=np.uint64)) >> np.uint64(11)
            is_in_split &= (hashed * 2.0**-53 < self.heldout) == (self.split == "heldout")
        elif self.split == "heldout":
            is_in_split[:] = False
        return is_in_split

    def _by_length(self, row_length: int, is_long: bool) -> ChosenDocuments:
        """The documents of the split that are longer than a row, or the others."""

        def chooses(start: int, stop: int) -> npt.NDArray[np.bool_]:
            is_longer = self._lengths(start, stop) + DOCUMENT_MARKS > row_length
            return self._is_in_split(start, stop) & (is_longer == is_long)

        return ChosenDocuments(len(self._file), chooses)

    def used(self, row_length: int) -> ChosenDocuments:
        """The numbers of the documents that are used with rows of this length. UserError if a longer one is an error.

        A document of text alone is split, so that only "skip" and "error" depend on its length.
        """
        if self.long_documents in ("auto", "cut"):
            return self._samples
        used = self._by_length(row_length, is_long=False)
        if self.long_documents == "error" and len(used) < len(self):
            raise self.too_long(row_length)
        return used

    def long_samples(self, row_length: int) -> LongSamples:
        """What becomes of the documents that are longer than a row."""
        long, none = self._by_length(row_length, is_long=True), Named(0, ())
        named = Named(len(long), tuple(map(str, long[: Named.NAMES])))
        is_split = self.long_documents in ("auto", "cut")
        split, skipped = (named, none) if is_split else (none, named)
        return LongSamples(self.folder, row_length, len(self), split=split, shortened=none, skipped=skipped)

    def too_long(self, row_length: int) -> UserError:
        """The error about documents that do not fit into a row; it names the first of them."""
        long = self._by_length(row_length, is_long=True)
        first, longest = long[0], 0
        for start in range(0, len(self._file), _CHUNK):
            stop = min(start + _CHUNK, len(self._file))
            longest = max(longest, int((self._lengths(start, stop) * self._is_in_split(start, stop)).max()))
        needed, longest = int(self._lengths(first, first + 1)[0]) + DOCUMENT_MARKS, longest + DOCUMENT_MARKS
        what = f"document {first} needs {needed} tokens, but a row has {row_length} "
        what += f"({len(long)} such documents, the longest needs {longest})"
        remedy = f"set data.seq_length to at least {longest}, or data.long_documents to auto"
        return UserError(what, where=self.folder, remedy=remedy)

    def plan(self, i: int, permutation: int, row_length: int) -> list[BinDocument]:
        """Document i of the file, cut to rows; it has one order, so every permutation is the same."""
        length, room = int(self._lengths(i, i + 1)[0]), row_length - DOCUMENT_MARKS
        if length > room and self.long_documents in ("skip", "error"):
            return []
        offset, stored = int(self._file.offsets(i, i)[0]), int(self._file.lengths(i, i + 1)[0])
        starts = range(0, length, room)
        return [BinDocument(self._tokens, i, offset, stored, start, min(start + room, length)) for start in starts]

    def release(self) -> None:
        """Unmap the pages of the index read so far: they no longer count as memory of this process."""
        self._file.release()

    def read(self, document: BinDocument) -> Document:
        """The tokens of a planned document."""
        return read_bin_document(self._bins, document)

    def evaluated(self, i: int, row_length: int) -> Iterator[BinDocument]:
        """Document i of the file for evaluation, cut to rows."""
        yield from self.plan(i, 0, row_length)

    def documents(self, i: int, row_length: int) -> Iterator[Document]:
        """The tokens of document i for evaluation."""
        return map(self.read, self.evaluated(i, row_length))

    @property
    def options(self) -> dict[str, Any]:
        """The keys of the source that determine its documents, for a checkpoint."""
        end = self._tokens.end
        return {"heldout": self.heldout, "end_token": None if end is None else {end.rule: end.text}}

    @cached_property
    def digest(self) -> str:
        """12 hex digits over what determines a run's order: size and dtype of the file, its documents, the split.

        Of more than 4,096 documents, evenly spaced ones are hashed: their offsets are sums of all lengths before them.
        """
        file = self._file
        facts = [file.dtype.str, file.bytes, file.sequences, len(file), self.split, self.options]
        digest = hashlib.sha256(json.dumps(facts).encode())
        # Checkpoints record the digest: which documents are hashed, and their width, must stay.
        sampled = np.unique(np.linspace(0, len(file), _SAMPLED, dtype=np.int64))
        digest.update(np.array([file.offsets(i, i)[0] for i in sampled.tolist()], dtype="<i8").data)
        return digest.hexdigest()[:12]

    def digest_like(self, recorded: str) -> str:
        """The digest: every version that has .bin and .idx sources has the same one."""
        return self.digest


DocumentDataset = TokenDataset | BinDataset
"""A split of a source, as documents."""


def open_split(
    source: SourceConfig,
    split: Split,
    modalities: Mapping[str, Modality],
    long_documents: LongDocuments,
    cache: ShardCache | None = None,
) -> DocumentDataset:
    """Open a split of a source: PREFIX of PREFIX.bin and PREFIX.idx, or a shard set; cache: for one at a URL.

    Raises UserError as both do, if the path can be either, or if keys are set that its kind of source does not have.
    """
    path = source.path
    codec_ids = {name: modality.codec_id for name, modality in modalities.items()}
    if url := url_of(path):
        if source.heldout or source.end_token or cache is None:
            remedy = "copy the files to a local folder and give its path"
            what = (
                "only training reads from a URL" if cache is None else "`heldout` and `end_token` are for local files"
            )
            raise UserError(what, where=url, remedy=remedy)
        return TokenDataset(path / split, codec_ids, source.documents, long_documents, cache)
    if path.suffix in (".bin", ".idx") and path.is_file():
        remedy = f"set its path to {path.with_suffix('')}, without {path.suffix}"
        raise UserError("a source names a .bin or .idx file", where=path, remedy=remedy)
    found = [file for file in (bin_file(path), idx_file(path)) if file.is_file()]
    if found and path.is_dir():
        remedy = "rename the folder or the files"
        raise UserError(f"a source can be this shard set or {found[0].name} beside it", where=path, remedy=remedy)
    if not found:
        if source.heldout or source.end_token:
            key = "heldout" if source.heldout else "end_token"
            what = f"the key `{key}` of a source is for .bin and .idx files, which are not there"
            raise UserError(what, where=path, remedy=f"set path to the PREFIX of PREFIX.bin, or remove `{key}`")
        return TokenDataset(path / split, codec_ids, source.documents, long_documents)
    if source.documents != "whole":
        what = f"documents: {source.documents} needs samples of several parts, but these files hold text alone"
        raise UserError(what, where=path, remedy="remove `documents` from this source")
    text = modalities.get("text")
    if not isinstance(text, TextModality):
        raise UserError("a source of text, but no text tokenizer", where=path, remedy="set tokenizers.text")
    end = _end_token(source, text)
    return BinDataset(path, split, text.vocabulary_size, source.heldout, end, long_documents)


def _end_token(source: SourceConfig, text: TextModality) -> EndToken | None:
    """The end-of-text token of the source. Raises UserError if the tokenizer has no such token."""
    if source.end_token is None:
        return None
    ((rule, name),) = source.end_token.items()
    token = text.tokenizer.token_to_id(name)
    if token is None:
        remedy = "give the token as the tokenizer spells it, for example <|endoftext|>"
        raise UserError(f"end_token: the text tokenizer has no token {name!r}", where=source.path, remedy=remedy)
    return EndToken(rule, token, name)
