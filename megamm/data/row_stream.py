"""The one global sequence of packed rows: documents in the mixture's order, a window at a time, packed to rows.

    RowStream   .plan(r) -> RowPlan (what row r is made of)   .read(plan) -> Row   .row(r) -> Row

Row r is a pure function of (seed, mixture, shards, vocabulary, row_length): it knows no rank and no world size.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megamm.data.mixture import Mixture
from megamm.data.packing import Forms, pack, plan_rows
from megamm.data.sample import Row
from megamm.data.sample_set import Piece, SampleSet, piece_length
from megamm.errors import UserError
from megamm.model.vocabulary import Vocabulary

_WINDOWS_KEPT = 4


@dataclass(frozen=True)
class RowPlan:
    """What a row is made of: (source, sample, piece of it) of each document in it, by number."""

    documents: tuple[tuple[int, int, Piece], ...]


class RowStream:
    """The endless sequence. sample_sets are in the order of mixture.sources.

    UserError if a sample with media is longer than a row; text alone and interleaved documents are cut.
    """

    def __init__(
        self,
        sample_sets: Sequence[SampleSet],
        mixture: Mixture,
        vocabulary: Vocabulary,
        row_length: int,
        forms: Forms,
    ) -> None:
        assert [len(s) for s in sample_sets] == [source.documents for source in mixture.sources]
        for sample_set in sample_sets:
            needed = sample_set.needed
            if needed.max() > row_length:
                key = sample_set.keys[int(needed.argmax())]
                what = f"sample {key!r} needs {needed.max()} tokens, a row has {row_length} "
                what += f"({int((needed > row_length).sum())} such samples)"
                raise UserError(what, where=sample_set.folder, remedy=f"set seq_length to at least {needed.max()}")
        self.sample_sets, self.mixture = list(sample_sets), mixture
        self.vocabulary, self.row_length, self.forms = vocabulary, row_length, forms
        self._rows_before = [0]
        """Rows before window w, for the windows planned so far."""
        self._windows: OrderedDict[int, list[RowPlan]] = OrderedDict()

    def plan(self, r: int) -> RowPlan:
        """What row r is made of."""
        while self._rows_before[-1] <= r:
            w = len(self._rows_before) - 1
            self._rows_before.append(self._rows_before[-1] + len(self._window(w)))
        w = bisect_right(self._rows_before, r) - 1
        return self._window(w)[r - self._rows_before[w]]

    def read(self, plan: RowPlan) -> Row:
        """The row of a plan, its tokens read from the shards."""
        documents = [self.sample_sets[source].read(sample, piece) for source, sample, piece in plan.documents]
        return pack(documents, self.vocabulary, self.row_length, self.forms)

    def row(self, r: int) -> Row:
        """Row r of the sequence."""
        return self.read(self.plan(r))

    def _window(self, w: int) -> list[RowPlan]:
        """The rows of window w, in order."""
        if w not in self._windows:
            window = self.mixture.window(w)
            pieces = [
                (source, sample, piece)
                for source, sample, turn in zip(
                    window.source.tolist(), window.sample.tolist(), window.turn.tolist(), strict=True
                )
                for piece in self.sample_sets[source].pieces(sample, turn, self.row_length)
            ]
            lengths = np.array([piece_length(piece) for _, _, piece in pieces], dtype=np.int64)
            rows = plan_rows(lengths, self.row_length)
            self._windows[w] = [RowPlan(tuple(pieces[p] for p in row)) for row in rows]
            if len(self._windows) > _WINDOWS_KEPT:
                self._windows.popitem(last=False)
        self._windows.move_to_end(w)
        return self._windows[w]
