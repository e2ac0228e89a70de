"""The global sequence of packed rows: documents in the mixture's order, packed into rows window by window.

    RowStream   .plan(r) -> RowPlan (content of row r)   .locate(plan) -> Recipe (where it is stored)   .row(r) -> Row

Row r is a pure function of (seed, mixture, shards, vocabulary, row_length), independent of ranks and world size.
Windows are planned one after the other, because their numbers of rows differ; a resumed stream starts at the window
recorded in the checkpoint (`place`).
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megamm.common.errors import UserError
from megamm.common.sample import Row
from megamm.data.pipeline.mixture import Mixture
from megamm.data.pipeline.packing import Forms, plan_rows
from megamm.data.pipeline.row_reader import Recipe, RowReader
from megamm.data.pipeline.token_dataset import Piece, TokenDataset, piece_length
from megamm.model.vocabulary import Vocabulary

_WINDOWS_KEPT = 4


@dataclass(frozen=True)
class RowPlan:
    """The content of a row: (source, sample, piece) of each document in it, by number; tokens of each."""

    documents: tuple[tuple[int, int, Piece], ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """A window, and the number of its first row."""

    window: int = 0
    row: int = 0


class RowStream:
    """The endless sequence, from `start` on.

    sample_sets are in the order of mixture.sources; None for a source whose documents are all before `start`. Raises
    UserError if a sample with media is longer than a row; text-only and interleaved documents are cut.
    """

    def __init__(
        self,
        sample_sets: Sequence[TokenDataset | None],
        mixture: Mixture,
        vocabulary: Vocabulary,
        row_length: int,
        forms: Forms,
        start: Place = Place(),
    ) -> None:
        for sample_set, source in zip(sample_sets, mixture.sources, strict=True):
            if sample_set is not None:
                assert len(sample_set) == source.documents
                _check_lengths(sample_set, row_length)
        self.sample_sets, self.mixture, self.start = list(sample_sets), mixture, start
        self.reader = RowReader(vocabulary, row_length, forms)
        self._first_rows = [start.row]
        """First row of each planned window from `start` on."""
        self._windows: OrderedDict[int, list[RowPlan]] = OrderedDict()

    @property
    def row_length(self) -> int:
        """Tokens of a row."""
        return self.reader.row_length

    def first_row(self, w: int) -> int:
        """Number of the first row of window w."""
        while len(self._first_rows) <= w - self.start.window:
            last = self.start.window + len(self._first_rows) - 1
            self._first_rows.append(self._first_rows[-1] + len(self._window(last)))
        return self._first_rows[w - self.start.window]

    def place(self, r: int) -> Place:
        """The window that row r is in."""
        assert r >= self.start.row, "a stream has no rows before its start"
        while self._first_rows[-1] <= r:
            self.first_row(self.start.window + len(self._first_rows))
        w = bisect_right(self._first_rows, r) - 1
        return Place(self.start.window + w, self._first_rows[w])

    def plan(self, r: int) -> RowPlan:
        """The content of row r."""
        place = self.place(r)
        return self._window(place.window)[r - place.row]

    def locate(self, plan: RowPlan) -> Recipe:
        """The places of a planned row's tokens, for `RowReader.row`."""
        return tuple(self._set(source).locate(sample, piece) for source, sample, piece in plan.documents)

    def row(self, r: int) -> Row:
        """Row r of the sequence."""
        return self.reader.row(self.locate(self.plan(r)))

    def _set(self, source: int) -> TokenDataset:
        sample_set = self.sample_sets[source]
        assert sample_set is not None, "a source is absent only after its last window"
        return sample_set

    def _window(self, w: int) -> list[RowPlan]:
        """The rows of window w, in order."""
        if w not in self._windows:
            window = self.mixture.window(w)
            pieces = [
                (source, sample, piece)
                for source, sample, turn in zip(
                    window.source.tolist(), window.sample.tolist(), window.turn.tolist(), strict=True
                )
                for piece in self._set(source).pieces(sample, turn, self.row_length)
            ]
            lengths = [piece_length(piece) for _, _, piece in pieces]
            rows = plan_rows(np.array(lengths, dtype=np.int64), self.row_length)
            self._windows[w] = [RowPlan(tuple(pieces[p] for p in row), tuple(lengths[p] for p in row)) for row in rows]
            if len(self._windows) > _WINDOWS_KEPT:
                self._windows.popitem(last=False)
        self._windows.move_to_end(w)
        return self._windows[w]


def _check_lengths(sample_set: TokenDataset, row_length: int) -> None:
    needed = sample_set.needed
    if needed.max() > row_length:
        key = sample_set.keys[int(needed.argmax())]
        what = f"sample {key!r} needs {needed.max()} tokens, but a row has {row_length} "
        what += f"({int((needed > row_length).sum())} such samples)"
        raise UserError(what, where=sample_set.folder, remedy=f"set data.seq_length to at least {needed.max()}")
