"""From token caches to this rank's batches: SampleSet -> RowStream -> Loader.

    SampleSet   one source's split: token caches joined by key           .document(i, reversed) -> Document
    RowStream   the one global sequence of packed rows                   .row(r) -> Row
    Loader      this data rank's microbatches of the next global batch   .step() -> list[Batch]

Row r is a pure function of (seed, mixture, shards, vocabulary, row_length): it knows no rank and no world size.
So the whole state is the number of rows consumed, and it is valid at any data-parallel size. Lengths in tokens.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamm.data.mixture import Mixture, Window
from megamm.data.packing import DOCUMENT_MARKS, Positions, document_length, pack, padding_share, plan_rows, split_text
from megamm.data.sample import Batch, Document, IntArray, Part, Row
from megamm.data.shards import ShardFolder, tokens_from_bytes
from megamm.errors import UserError
from megamm.model.vocabulary import Vocabulary

_PLANS_KEPT = 4


class SampleSet:
    """The samples of SHARDS/<source>/<split>: what each modality's token cache holds, joined by key.

    codec_ids: modality -> codec_id, in reading order (text first: caption, then image). A modality that the split
    has no folder for is absent from its samples. UserError if a cache is missing, or no modality is there.
    """

    def __init__(self, folder: Path, codec_ids: Mapping[str, str]) -> None:
        self.folder = folder
        self._caches = _open_caches(folder, codec_ids)
        self.keys = list(dict.fromkeys(key for cache in self._caches.values() for key in cache.keys))
        number = {key: i for i, key in enumerate(self.keys)}
        self._members: dict[str, IntArray] = {}
        """Modality -> number of each sample's member in the cache `[samples]`, -1 where it has none."""
        self.lengths: IntArray = np.full(len(self.keys), DOCUMENT_MARKS, dtype=np.int64)
        """Tokens of each sample's document `[samples]`, marks included; the same in both orders."""
        self.is_text_only = np.ones(len(self.keys), dtype=np.bool_)
        for modality, cache in self._caches.items():
            has = np.array([number[key] for key in cache.keys], dtype=np.int64)
            self._members[modality] = np.full(len(self.keys), -1, dtype=np.int64)
            self._members[modality][has] = np.arange(len(cache))
            if cache.tokens is not None:
                self.lengths[has] += cache.tokens + document_length({modality: 0}) - DOCUMENT_MARKS
            self.is_text_only[has] &= modality == "text"

    def __len__(self) -> int:
        return len(self.keys)

    def document(self, i: int, reversed: bool) -> Document:
        """Sample i with its parts in reading order, or in the opposite one."""
        parts = []
        for modality, cache in self._caches.items():
            member = int(self._members[modality][i])
            if member >= 0:
                parts.append(Part(modality, self._ids(cache, member)))
        return Document(self.keys[i], tuple(parts[::-1] if reversed else parts))

    @staticmethod
    def _ids(cache: ShardFolder, member: int) -> IntArray:
        remedy = "delete that token cache and run `megamm data tokenize` again"
        try:
            ids = tokens_from_bytes(cache.read(member))
        except (ValueError, EOFError) as error:
            raise UserError(f"broken tokens of {cache.keys[member]!r}", where=cache.folder, remedy=remedy) from error
        if cache.tokens is None or ids.size != cache.tokens[member]:
            what = f"tokens of {cache.keys[member]!r} are not as many as its index says"
            raise UserError(what, where=cache.folder, remedy=remedy)
        return ids


def _open_caches(folder: Path, codec_ids: Mapping[str, str]) -> dict[str, ShardFolder]:
    """The token caches of the modalities that the split has, in the order of codec_ids."""
    caches: dict[str, ShardFolder] = {}
    for modality, codec_id in codec_ids.items():
        path = folder / f"{modality}.tokens-{codec_id}"
        if path.is_dir():
            caches[modality] = ShardFolder(path)
            if len(caches[modality]) and caches[modality].tokens is None:
                remedy = "delete the folder and run `megamm data tokenize` again"
                raise UserError("no lengths in the index of a token cache", where=path, remedy=remedy)
        elif (folder / modality).is_dir():
            remedy = f"run `megamm data tokenize {folder.parent} --codec {modality}=DIR` with the codec of the run"
            raise UserError(f"no {modality} tokens of codec {codec_id}", where=path, remedy=remedy)
    if not caches:
        remedy = "make it with `megamm data build` and `megamm data tokenize`"
        raise UserError(f"no {' or '.join(codec_ids)} in this split", where=folder, remedy=remedy)
    return caches


def heldout_documents(sample_set: SampleSet) -> Iterator[Document]:
    """Every sample in order, once in each order of its parts (once, if it has only one)."""
    for i in range(len(sample_set)):
        document = sample_set.document(i, reversed=False)
        yield document
        if len(document.parts) > 1:
            yield Document(document.key, document.parts[::-1])


@dataclass(frozen=True)
class _Plan:
    """A window's rows: of pieces `[pieces]`, each the `part`-th row-sized part of the window's document `index`."""

    window: Window
    index: IntArray
    part: IntArray
    rows: list[list[int]]


class RowStream:
    """The endless global sequence of packed rows. sample_sets are in the order of mixture.sources.

    UserError if a sample with media is longer than a row; text alone is split.
    """

    def __init__(
        self,
        sample_sets: Sequence[SampleSet],
        mixture: Mixture,
        vocabulary: Vocabulary,
        row_length: int,
        positions: Positions,
    ) -> None:
        assert [len(s) for s in sample_sets] == [source.documents for source in mixture.sources]
        for sample_set in sample_sets:
            too_long = np.flatnonzero((sample_set.lengths > row_length) & ~sample_set.is_text_only)
            if too_long.size:
                longest = int(sample_set.lengths.max())
                what = f"sample {sample_set.keys[too_long[0]]!r} has {sample_set.lengths[too_long[0]]} tokens, "
                what += f"a row {row_length} ({too_long.size} such samples)"
                raise UserError(what, where=sample_set.folder, remedy=f"set seq_length to at least {longest}")
        self.sample_sets, self.mixture = list(sample_sets), mixture
        self.vocabulary, self.row_length, self.positions = vocabulary, row_length, positions
        self._rows_before = [0]
        """Rows before window w, for the windows planned so far."""
        self._plans: OrderedDict[int, _Plan] = OrderedDict()

    def row(self, r: int) -> Row:
        """Row r of the sequence."""
        while self._rows_before[-1] <= r:
            w = len(self._rows_before) - 1
            self._rows_before.append(self._rows_before[-1] + len(self._plan(w).rows))
        w = bisect_right(self._rows_before, r) - 1
        plan = self._plan(w)
        pieces = plan.rows[r - self._rows_before[w]]
        documents = [self._piece(plan, piece) for piece in pieces]
        return pack(documents, self.vocabulary, self.row_length, self.positions)

    def _plan(self, w: int) -> _Plan:
        if w not in self._plans:
            window = self.mixture.window(w)
            lengths = np.empty(len(window.source), dtype=np.int64)
            for number, sample_set in enumerate(self.sample_sets):
                here = window.source == number
                lengths[here] = sample_set.lengths[window.sample[here]]
            room = self.row_length - DOCUMENT_MARKS
            parts = np.where(lengths > self.row_length, -(-(lengths - DOCUMENT_MARKS) // room), 1)
            index = np.repeat(np.arange(len(lengths)), parts)
            part = np.arange(len(index)) - np.repeat(np.cumsum(parts) - parts, parts)
            piece_lengths = np.minimum(lengths[index] - part * room, self.row_length)
            self._plans[w] = _Plan(window, index, part, plan_rows(piece_lengths, self.row_length))
            if len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(w)
        return self._plans[w]

    def _piece(self, plan: _Plan, piece: int) -> Document:
        i, part = int(plan.index[piece]), int(plan.part[piece])
        sample_set = self.sample_sets[int(plan.window.source[i])]
        document = sample_set.document(int(plan.window.sample[i]), bool(plan.window.reversed[i]))
        return split_text(document, self.row_length)[part]


class Loader:
    """This data rank's share of each global batch: rows consumed + (j * data_size + data_rank) * micro_batch ...

    for microbatch j. global_batch and micro_batch are in rows. UserError if they do not divide.
    """

    def __init__(
        self,
        stream: RowStream,
        *,
        global_batch: int,
        micro_batch: int,
        data_rank: int,
        data_size: int,
        consumed_rows: int = 0,
    ) -> None:
        if global_batch % (micro_batch * data_size):
            what = f"global batch {global_batch} is not a multiple of micro batch {micro_batch} x data size {data_size}"
            raise UserError(what, remedy=f"set it to a multiple of {micro_batch * data_size}")
        assert 0 <= data_rank < data_size
        self.stream, self.global_batch, self.micro_batch = stream, global_batch, micro_batch
        self.data_rank, self.data_size, self.consumed_rows = data_rank, data_size, consumed_rows
        self.padding_share = 0.0
        """Share of padding in the rows that this rank loaded in the last step."""

    def step(self) -> list[Batch]:
        """The microbatches of the next global batch."""
        batches, padding = [], 0.0
        for j in range(self.global_batch // (self.micro_batch * self.data_size)):
            first = self.consumed_rows + (j * self.data_size + self.data_rank) * self.micro_batch
            rows = [self.stream.row(r) for r in range(first, first + self.micro_batch)]
            padding += sum(padding_share(row) for row in rows)
            batches.append(Batch.stack(rows))
        self.consumed_rows += self.global_batch
        self.padding_share = padding * self.data_size / self.global_batch
        return batches

    def state(self) -> dict[str, int]:
        """All there is to save; pass it to a new Loader at any data size."""
        return {"consumed_rows": self.consumed_rows}
