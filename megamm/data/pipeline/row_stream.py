"""The global sequence of packed rows: documents in the mixture's order, packed into rows block by block.

    RowStream   .row_spec(r) -> RowSpec   the content of row r, and where its tokens are stored
    RowReader   .row(spec) -> Row         its tokens; the whole work of a data worker

Row r is a pure function of (seed, mixture, shards, vocabulary, row_length), independent of ranks and world size.
Shuffle blocks are planned one after the other, because their numbers of rows differ; a resumed stream starts at the
block recorded in the checkpoint (`block_start`).
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megamm.common.sample import Row
from megamm.data.pipeline.bin_dataset import BinDocument, ChosenDocuments, DocumentDataset, read_bin_document
from megamm.data.pipeline.mixture import Mixture
from megamm.data.pipeline.packing import PackingSpecs, pack, plan_rows
from megamm.data.pipeline.sample_lengths import UsedSamples
from megamm.data.pipeline.token_dataset import DocumentSpec, read_document
from megamm.model.vocabulary import Vocabulary
from megamm.shards.indexed_dataset import BinReader
from megamm.shards.tar_reader import TarReader

_BLOCKS_KEPT = 4
"""Planned blocks in memory. A step reads at most the end of one and the start of others; a row read again is near."""


class RowSpec(NamedTuple):
    """A row that is planned but not read. It names every file and offset, so that a worker needs no data set."""

    documents: tuple[DocumentSpec | BinDocument, ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document, including marks."""
        return [document.length for document in self.documents]


class RowReader:
    """Reads and packs rows of `row_length` tokens. A copy in another process is a few kilobytes; it opens its files."""

    def __init__(self, vocabulary: Vocabulary, row_length: int, packing: PackingSpecs) -> None:
        self.vocabulary, self.row_length, self.packing = vocabulary, row_length, packing
        self.tars, self.bins = TarReader(), BinReader()

    def row(self, spec: RowSpec) -> Row:
        """Read a row. Raises UserError if a member is damaged or does not match its index."""
        documents = [
            read_bin_document(self.bins, d) if isinstance(d, BinDocument) else read_document(self.tars, d)
            for d in spec.documents
        ]
        return pack(documents, self.vocabulary, self.row_length, self.packing)


@dataclass(frozen=True)
class BlockStart:
    """A shuffle block, and the number of its first row."""

    block: int = 0
    row: int = 0


def used_samples(dataset: DocumentDataset, row_length: int) -> UsedSamples | ChosenDocuments:
    """The numbers of the samples that are trained on. Raises UserError if there is none, or as `used` does."""
    used = dataset.used(row_length)
    if len(dataset) and not len(used):
        raise dataset.too_long(row_length)
    return used


class RowStream:
    """The endless sequence, from `start` on.

    datasets are in the order of mixture.sources; None for a source whose documents are all before `start`. The mixture
    counts the samples that are used. Raises UserError if no sample of a data set fits into a row.
    """

    def __init__(
        self,
        datasets: Sequence[DocumentDataset | None],
        mixture: Mixture,
        vocabulary: Vocabulary,
        row_length: int,
        packing: PackingSpecs,
        start: BlockStart = BlockStart(),
    ) -> None:
        self._samples = [None if dataset is None else used_samples(dataset, row_length) for dataset in datasets]
        """Of each data set, the numbers of the samples that are used."""
        for samples, source in zip(self._samples, mixture.sources, strict=True):
            assert samples is None or len(samples) == source.documents
        self.datasets, self.mixture, self.start = list(datasets), mixture, start
        self.reader = RowReader(vocabulary, row_length, packing)
        self._first_rows = [start.row]
        """First row of each planned block from `start` on."""
        self._blocks: OrderedDict[int, list[RowSpec]] = OrderedDict()
        """The blocks used last, the latest at the end."""

    @property
    def row_length(self) -> int:
        """Tokens of a row."""
        return self.reader.row_length

    def row_spec(self, r: int) -> RowSpec:
        """Row r of the sequence."""
        start = self.block_start(r)
        return self._rows_of(start.block)[r - start.row]

    def block_start(self, r: int) -> BlockStart:
        """The block that row r is in."""
        assert r >= self.start.row, "a stream has no rows before its start"
        while self._first_rows[-1] <= r:  # plan one block more: its number of rows says where the next one starts
            self.first_row(self.start.block + len(self._first_rows))
        # The last block that starts at or before r: its rows include r, as the next block starts after it.
        b = bisect_right(self._first_rows, r) - 1
        return BlockStart(self.start.block + b, self._first_rows[b])

    def first_row(self, b: int) -> int:
        """Number of the first row of block b."""
        while len(self._first_rows) <= b - self.start.block:
            last = self.start.block + len(self._first_rows) - 1
            self._first_rows.append(self._first_rows[-1] + len(self._rows_of(last)))
        return self._first_rows[b - self.start.block]

    def _rows_of(self, b: int) -> list[RowSpec]:
        """The rows of block b, in order."""
        if b not in self._blocks:
            self._blocks[b] = self._plan(b)  # takes tenths of a second
            if len(self._blocks) > _BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(b)
        return self._blocks[b]

    def _plan(self, b: int) -> list[RowSpec]:
        """Pack the documents of block b into rows, from their lengths alone."""
        block = self.mixture.block(b)
        documents: list[DocumentSpec | BinDocument] = []
        numbers = np.empty_like(block.sample)
        for source in np.unique(block.source).tolist():
            samples, of_source = self._samples[source], block.source == source
            assert samples is not None, "a source is absent only after its last block"
            numbers[of_source] = samples.take(block.sample[of_source])
        columns = (block.source.tolist(), numbers.tolist(), block.permutation.tolist())
        for source, sample, permutation in zip(*columns, strict=True):
            dataset = self.datasets[source]
            assert dataset is not None
            documents += dataset.plan(sample, permutation, self.row_length)
        for dataset in self.datasets:
            if dataset is not None:
                dataset.release()  # the next block has samples elsewhere in the index
        # Blocks are packed separately: a row never mixes two, so a block can be planned without the ones before it.
        lengths = np.array([document.length for document in documents], dtype=np.int64)
        return [RowSpec(tuple(documents[d] for d in row)) for row in plan_rows(lengths, self.row_length)]
