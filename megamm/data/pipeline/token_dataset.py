"""One source's split of shards as documents: token caches joined by key; lengths are known without reading tokens.

    TokenDataset(SHARDS/<source>/<split>, codec_ids)
        .pieces(i, turn, row_length) -> [Piece]   the parts of sample i for a row, for planning
        .read(i, piece) -> Document               its tokens

The order of a sample's parts depends on `turn` (see `selection`), or is their own order if they are numbered. A piece
is a whole document; only text without media is cut at the end of a row, and a document of numbered parts there or
between two parts. Lengths are in tokens, including marks.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from megamm.common.errors import UserError
from megamm.common.sample import Document, IntArray
from megamm.data.pipeline.packing import DOCUMENT_MARKS, MEDIA_MARKS
from megamm.data.pipeline.row_reader import StoredDocument, StoredPart, read_document
from megamm.shards.folder import UNNUMBERED, ShardFolder
from megamm.shards.tar_reader import TarReader

DocumentKind = Literal["whole", "pairs", "answers"]


@dataclass(frozen=True)
class Slice:
    """Tokens [start, stop) of one member of a modality's cache."""

    modality: str
    member: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Length in a row, including marks."""
        return self.stop - self.start + (0 if self.modality == "text" else MEDIA_MARKS)


Piece = tuple[Slice, ...]


def piece_length(piece: Piece) -> int:
    """Tokens in a row."""
    return DOCUMENT_MARKS + sum(part.length for part in piece)


def selections(parts: int, kind: DocumentKind) -> int:
    """Number of documents that can be made from a sample with that many unnumbered parts."""
    return parts * (parts - 1) if kind != "whole" and parts > 1 else math.factorial(parts)


def selection(parts: int, turn: int, kind: DocumentKind) -> list[int]:
    """The selected parts of a sample, in order: the turn-th of all permutations, or of all ordered pairs.

    kind "answers" has the same pairs as "pairs", but their first part counts towards no loss (`locate`).
    """
    turn %= selections(parts, kind)
    if kind != "whole" and parts > 1:
        first, second = divmod(turn, parts - 1)
        return [first, second + (second >= first)]
    left, order = list(range(parts)), []
    for remaining in range(parts, 0, -1):
        place, turn = divmod(turn, math.factorial(remaining - 1))
        order.append(left.pop(place))
    return order


class TokenDataset:
    """The samples of SHARDS/<source>/<split>: the contents of each modality's token cache, joined by key.

    codec_ids: modality -> codec_id, in the order of turn 0 (text first). Modalities without a folder in the split are
    absent. Raises UserError if a cache is missing, no modality is present, or a sample's part numbers have a gap.
    """

    def __init__(self, folder: Path, codec_ids: Mapping[str, str], kind: DocumentKind = "whole") -> None:
        self.folder, self.kind = folder, kind
        self._caches = _open_caches(folder, codec_ids)
        self._names = list(self._caches)
        self._tars = TarReader()
        self.keys, samples = _join([cache.keys for cache in self._caches.values()])
        columns: list[tuple[IntArray, IntArray, IntArray, IntArray]] = []
        for cache, sample in zip(self._caches.values(), samples, strict=True):
            tokens = cache.tokens if cache.tokens is not None else np.zeros(0, dtype=np.int64)
            columns.append((sample, cache.parts, np.arange(len(cache)), tokens))
        modality = np.repeat(np.arange(len(columns)), [len(column[0]) for column in columns])
        sample_of, part, member, tokens = (np.concatenate(c).astype(np.int64) for c in zip(*columns, strict=True))
        order = np.lexsort((modality, part, sample_of))
        self._modality, self._part = modality[order], part[order]
        self._member, self._tokens = member[order], tokens[order]
        self._starts = np.searchsorted(sample_of[order], np.arange(len(self.keys) + 1))
        self._check_numbers()
        self.needed = self._needed()

    def __len__(self) -> int:
        return len(self.keys)

    def _check_numbers(self) -> None:
        """Raise UserError unless every sample's parts are all unnumbered or numbered 0, 1, 2 ..."""
        place = np.arange(len(self._part)) - np.repeat(self._starts[:-1], np.diff(self._starts))
        unnumbered = self._part == UNNUMBERED
        sample = np.repeat(np.arange(len(self)), np.diff(self._starts))
        mixed = np.bincount(sample, unnumbered, len(self)) % np.maximum(np.diff(self._starts), 1) != 0
        wrong = (~unnumbered & (self._part != place)) | mixed[sample]
        if wrong.any():
            key = self.keys[int(sample[wrong.argmax()])]
            what = f"the parts of {key!r} are not numbered 0, 1, 2 ... over the modalities of this run"
            remedy = "set tokenizers for every modality of this source, or build it again"
            raise UserError(what, where=self.folder, remedy=remedy)

    def _parts(self, i: int) -> list[Slice]:
        places = range(int(self._starts[i]), int(self._starts[i + 1]))
        names = [self._names[self._modality[p]] for p in places]
        return [Slice(n, int(self._member[p]), 0, int(self._tokens[p])) for n, p in zip(names, places, strict=True)]

    def is_ordered(self, i: int) -> bool:
        """Whether the sample's parts have an order of their own."""
        return self._part[self._starts[i]] != UNNUMBERED

    def pieces(self, i: int, turn: int, row_length: int) -> list[Piece]:
        """Sample i in its turn-th order, cut to rows. Raises UserError if its media are longer than a row."""
        parts = self._parts(i)
        if not self.is_ordered(i):
            parts = [parts[p] for p in selection(len(parts), turn, self.kind)]
        room = row_length - DOCUMENT_MARKS
        if sum(part.length for part in parts) <= room:
            return [tuple(parts)]
        if self.is_ordered(i) or all(part.modality == "text" for part in parts):
            return list(_cut(parts, room, self.keys[i]))
        what = f"sample {self.keys[i]!r} has {piece_length(tuple(parts))} tokens, but a row has {row_length}"
        remedy = f"set data.seq_length to at least {piece_length(tuple(parts))}"
        raise UserError(what, where=self.folder, remedy=remedy)

    def turns(self, i: int) -> int:
        """Number of distinct documents of sample i; its turns repeat after that many."""
        parts = int(self._starts[i + 1] - self._starts[i])
        return 1 if self.is_ordered(i) else selections(parts, self.kind)

    def _needed(self) -> IntArray:
        """Tokens that a row must have for each sample in every turn `[samples]`: those of all uncuttable parts."""
        is_text = np.array([name == "text" for name in self._names])[self._modality]
        length = self._tokens + np.where(is_text, 0, MEDIA_MARKS)
        sample = np.repeat(np.arange(len(self)), np.diff(self._starts))
        place = np.arange(len(length)) - self._starts[sample]
        by_length = np.lexsort((-length, sample))
        of_pairs = np.bincount(sample, np.where(place < 2, length[by_length], 0), len(self))
        whole = np.bincount(sample, length, len(self)) if self.kind == "whole" else of_pairs
        media = np.zeros(len(self), dtype=np.int64)
        np.maximum.at(media, sample, np.where(is_text, 0, length))
        uncut = np.where(self._part[self._starts[:-1]] != UNNUMBERED, media, whole)
        return DOCUMENT_MARKS + np.where(media > 0, uncut, 1).astype(np.int64)

    def read(self, i: int, piece: Piece) -> Document:
        """The tokens of a piece of sample i."""
        return read_document(self._tars, self.locate(i, piece))

    def locate(self, i: int, piece: Piece) -> StoredDocument:
        """The places of the tokens of a piece of sample i."""
        parts = []
        for part in piece:
            cache = self._caches[part.modality]
            assert cache.tokens is not None, "_open_caches refuses a cache without lengths"
            member, tokens = cache.stored(part.member), int(cache.tokens[part.member])
            parts.append(StoredPart(part.modality, member, tokens, part.start, part.stop))
        given = int(self.kind == "answers" and len(parts) > 1 and not self.is_ordered(i))
        return StoredDocument(self.keys[i], tuple(parts), given)

    @cached_property
    def digest(self) -> str:
        """12 hex digits over everything that determines a run's order: keys, modalities, lengths, kind of document."""
        digest = hashlib.sha256(f"{self.kind} {self._names}\n".encode() + "\n".join(self.keys).encode())
        for column in (self._starts, self._modality, self._part, self._tokens):
            digest.update(np.ascontiguousarray(column, dtype="<i8").data)
        return digest.hexdigest()[:12]

    def whole(self, i: int) -> Document:
        """All parts of sample i in reading order, whatever their length."""
        return self.read(i, tuple(self._parts(i)))

    def documents(self, i: int, row_length: int) -> Iterator[Document]:
        """Sample i for evaluation, cut to rows: its first and last turn (opposite orders), or its own order."""
        for turn in sorted({0, self.turns(i) - 1}):
            for piece in self.pieces(i, turn, row_length):
                yield self.read(i, piece)


def _join(keys: list[list[str]]) -> tuple[list[str], list[IntArray]]:
    """All distinct keys, and for each list the number of every key in it."""
    if all(other == keys[0] for other in keys[1:]) and len(set(keys[0])) == len(keys[0]):  # aligned, as built
        return keys[0], [np.arange(len(keys[0]))] * len(keys)
    joined = list(dict.fromkeys(key for one in keys for key in one))
    number_of = {key: i for i, key in enumerate(joined)}
    return joined, [np.array([number_of[key] for key in one], dtype=np.int64) for one in keys]


def _cut(parts: list[Slice], room: int, key: str) -> Iterator[Piece]:
    """Pieces of at most `room` tokens, each as long as possible, the last one shorter."""
    taken: list[Slice] = []
    left = room
    for part in parts:
        while part.length > left:
            if part.modality == "text" and left > 0:
                taken.append(Slice("text", part.member, part.start, part.start + left))
                part = Slice("text", part.member, part.start + left, part.stop)
            elif not taken:
                remedy = f"set data.seq_length to at least {part.length + DOCUMENT_MARKS}"
                raise UserError(f"{part.modality} of sample {key!r} is longer than a row", remedy=remedy)
            yield tuple(taken)
            taken, left = [], room
        taken.append(part)
        left -= part.length
    yield tuple(taken)


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
