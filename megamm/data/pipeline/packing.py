"""Packs documents into rows of fixed length; attention, loss and positions stay inside each document.

A document renders as `<document_start> part part ... <document_end>`; a text part is its ids, a media part is
`<X_start> ids <X_end>`; all ids are shifted to their range of the vocabulary. Rows are planned from lengths alone, one
after the other and the longest documents first; a row is filled exactly if a subset sum allows it (minimum bin slack:
Gupta & Ho 1999). Positions (t, h, w) follow Qwen2-VL (Wang et al. 2024, section 2.1): text increments all three, a
media part starts at the running position, and the next part starts at its maximum + 1.
Lengths are in tokens; the arrays of a row are described in `sample.Row`.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from megamm.common.errors import UserError
from megamm.common.sample import IGNORE_LABEL, Document, IntArray, Part, Row
from megamm.model.vocabulary import Vocabulary

DOCUMENT_MARKS = 2
"""<document_start> and <document_end>."""
MEDIA_MARKS = 2
"""<X_start> and <X_end> around a media part."""
_EXACT = 3
"""About how many documents of a row are chosen to fill it exactly; more gain nothing and cost time."""
_CANDIDATES = 32
"""About how many lengths they are chosen from."""


@dataclass(frozen=True)
class Form:
    """A modality's parts: `Modality.positions` (length T to `[3, T]`), and whether all parts have the same length."""

    positions: Callable[[int], IntArray]
    has_fixed_length: bool


Forms = Mapping[str, Form]
"""Forms by modality name."""


def document_length(*parts: tuple[str, int]) -> int:
    """Tokens of a document in a row, including marks, from (modality, tokens) of its parts."""
    return DOCUMENT_MARKS + sum(length + (0 if name == "text" else MEDIA_MARKS) for name, length in parts)


def plan_rows(lengths: IntArray, row_length: int) -> list[list[int]]:
    """Assign the documents `[documents]` to rows: each exactly once, in order within a row.

    Raises UserError if a document is longer than a row.
    """
    if lengths.size and lengths.max() > row_length:
        what = f"document {int(lengths.argmax())} has {lengths.max()} tokens, but a row has {row_length}"
        raise UserError(what, remedy=f"set data.seq_length to at least {lengths.max()}")
    waiting: dict[int, list[int]] = {}  # length -> its documents, the first one last
    for i in range(len(lengths) - 1, -1, -1):
        waiting.setdefault(int(lengths[i]), []).append(i)
    distinct = sorted(waiting)
    rows: list[list[int]] = []
    while distinct:
        row: list[int] = []
        for length in _fill_row(distinct, waiting, row_length):
            row.append(waiting[length].pop())
            if not waiting[length]:
                del distinct[bisect_left(distinct, length)]
        rows.append(sorted(row))
    # Sorted by first document, so that rows of long documents do not all come first.
    return sorted(rows)


def _fill_row(distinct: list[int], waiting: Mapping[int, list[int]], space: int) -> list[int]:
    """Lengths for an empty row: the longest first; the last few are chosen to leave the least space."""
    taken: list[int] = []
    place = len(distinct)
    while place := bisect_right(distinct, space, 0, place):
        place -= 1
        length = distinct[place]
        copies = min(len(waiting[length]), space // length - _EXACT)
        if not taken:
            copies = max(1, copies)
        if copies < 1:
            break
        taken += [length] * copies
        space -= length * copies
    fitting = distinct[: bisect_right(distinct, space)]
    candidates = fitting[:: -max(1, len(fitting) // _CANDIDATES)]
    return taken + _best_sum(candidates, waiting, taken, space)


def _best_sum(candidates: list[int], waiting: Mapping[int, list[int]], taken: list[int], space: int) -> list[int]:
    """The lengths with the largest sum up to `space`: subset sum, with reachable sums as the bits of an integer."""
    reachable, steps = 1, []
    mask = (1 << (space + 1)) - 1
    for length in candidates:
        for _ in range(min(len(waiting[length]) - taken.count(length), space // length)):
            more = reachable | (reachable << length & mask)
            if more == reachable:
                break
            steps.append((length, reachable))
            reachable = more
        if reachable >> space:
            break
    total, chosen = reachable.bit_length() - 1, []
    for length, before in reversed(steps):
        if not before >> total & 1:
            chosen.append(length)
            total -= length
    return chosen


def pack(documents: list[Document], vocabulary: Vocabulary, row_length: int, forms: Forms) -> Row:
    """Pack documents that fit into one row `[S = row_length]`. Raises UserError if an id is out of range."""
    used = sum(document_length(*document.sizes) for document in documents)
    assert used <= row_length, "plan_rows never exceeds a row"
    row = Row(
        input_ids=np.full(row_length, vocabulary.padding, dtype=np.int64),
        labels=np.full(row_length, IGNORE_LABEL, dtype=np.int64),
        loss_weight=np.zeros(row_length, dtype=np.float32),
        segment=np.full(row_length, -1, dtype=np.int64),
        position=np.zeros((3, row_length), dtype=np.int64),
        modality=np.full(row_length, -1, dtype=np.int64),
    )
    counts_to = np.full(row_length, -1, dtype=np.int64)
    """The modality whose loss a token counts towards as a label `[S]`; -1 for a token that is certain or given."""
    start = 0
    for segment, document in enumerate(documents):
        stop = _render(document, row, counts_to, start, vocabulary, forms)
        row.segment[start:stop] = segment
        start = stop
    inside = np.flatnonzero((row.segment[:-1] == row.segment[1:]) & (row.segment[:-1] >= 0))
    row.labels[inside] = row.input_ids[inside + 1]
    row.modality[inside] = counts_to[inside + 1]
    row.loss_weight[:] = row.modality >= 0
    return row


class _Codes(NamedTuple):
    """The vocabulary values that packing needs for one modality; begin and end are -1 for text, which has no marks."""

    number: int
    start: int
    size: int
    begin: int
    end: int


@cache
def _codes(vocabulary: Vocabulary) -> dict[str, _Codes]:
    """Codes by modality: a row has hundreds of parts, and the vocabulary searches its ranges on each access."""
    codes = {}
    for number, name in enumerate(vocabulary.modalities):
        marks = (-1, -1) if name == "text" else (vocabulary.begin(name), vocabulary.end(name))
        codes[name] = _Codes(number, vocabulary[name].start, vocabulary[name].size, *marks)
    return codes


def _render(document: Document, row: Row, counts_to: IntArray, start: int, vocabulary: Vocabulary, forms: Forms) -> int:
    """Write ids, positions and modalities of a document into a row from `start` on; returns the end position."""
    codes = _codes(vocabulary)
    place, at = start, 0  # the next token's index in the row, and its position if it is text

    def mark(token: int, modality: int) -> None:
        nonlocal place, at
        row.input_ids[place], row.position[:, place], counts_to[place] = token, at, modality
        place, at = place + 1, at + 1

    mark(vocabulary.document_start, 0)
    for number, part in enumerate(document.parts):
        code, form, size = codes[part.modality], forms[part.modality], part.ids.size
        if code.begin >= 0:
            mark(code.begin, 0)
        if size:
            _check_ids(part, document.key, code)
            stop, position = place + size, form.positions(size)
            row.input_ids[place:stop], counts_to[place:stop] = part.ids + code.start, code.number
            row.position[:, place:stop] = position + at
            place, at = stop, at + int(position.max()) + 1
        if code.end >= 0:
            # If the length is fixed, the end mark is certain: there is nothing to learn.
            mark(code.end, -1 if form.has_fixed_length else code.number)
        if number < document.given:
            counts_to[start:place] = -1
    mark(vocabulary.document_end, 0)
    return place


def _check_ids(part: Part, key: str, code: _Codes) -> None:
    if not 0 <= part.ids.min() <= part.ids.max() < code.size:
        what = f"{part.modality} token id {part.ids.max()} in sample {key!r}, but its codec has {code.size}"
        raise UserError(what, remedy="delete this token cache and run `megamm data tokenize` with this codec")


def padding_share(row: Row) -> float:
    """Share of the row's positions that hold no document."""
    return float(np.mean(row.segment < 0))
