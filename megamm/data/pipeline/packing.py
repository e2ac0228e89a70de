"""Packs documents into rows of fixed length; attention, loss and positions stay inside each document.

A document renders as `<document_start> part part ... <document_end>`; a text part is its ids, a media part is
`<X_start> ids <X_end>`; all ids are shifted to their range of the vocabulary. Rows are planned from lengths alone, one
after the other and the longest documents first; a row is filled exactly if a subset sum allows it (minimum bin slack:
Gupta & Ho 1999). Positions (t, h, w) follow Qwen2-VL (Wang et al. 2024, section 2.1): text increments all three, a
media part starts at the running position, and the next part starts at its maximum + 1.
Lengths are in tokens; the arrays of a row are described in `sample.Row`.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping
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
_CHOSEN_EXACTLY = 3
"""About how many documents of a row are chosen to fill it exactly; more gain nothing and cost time."""
_CANDIDATES = 32
"""About how many distinct lengths they are chosen from."""


@dataclass(frozen=True)
class PackingSpec:
    """How a modality is packed: its `Modality.positions` (length T to `[3, T]`), whether all parts are as long, and
    whether a part is a bidirectional span."""

    positions: Callable[[int], IntArray]
    has_fixed_length: bool
    is_span: bool = False


PackingSpecs = Mapping[str, PackingSpec]
"""By modality name."""


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
    # Documents of one length are interchangeable: rows are filled by length, and take the first waiting document of it.
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
    """Lengths for an empty row of `space` tokens; distinct: the lengths of `waiting`, ascending.

    Greedy while much space is left, exact at the end: short documents can fill almost any gap, long ones cannot.
    """
    taken: list[int] = []
    end = len(distinct)
    # 1. Take the longest document that fits, as many of it as wait. Stop when the space holds only about
    #    _CHOSEN_EXACTLY documents of the next length: these are left to step 3.
    while end := bisect_right(distinct, space, 0, end):
        end -= 1
        length = distinct[end]
        copies = min(len(waiting[length]), space // length - _CHOSEN_EXACTLY)
        if not taken:
            copies = max(1, copies)  # the longest document is always taken, so that no row stays empty
        if copies < 1:
            break
        taken += [length] * copies
        space -= length * copies
    # 2. Offer every k-th of the lengths that still fit, the longest first.
    fitting = distinct[: bisect_right(distinct, space)]
    candidates = fitting[:: -max(1, len(fitting) // _CANDIDATES)]
    # 3. Fill the rest as well as these can.
    copies_of = ((length, len(waiting[length]) - taken.count(length)) for length in candidates)
    return taken + best_subset(copies_of, space)


def best_subset(copies_of: Iterable[tuple[int, int]], space: int) -> list[int]:
    """The numbers with the largest sum up to `space`, from pairs of a number and how often it may be used.

    Subset sum by dynamic programming; bit s of an integer is set if the sum s can be reached.
    """
    reachable = 1  # the empty sum
    steps: list[tuple[int, int]] = []  # (number, sums that were reachable before it was offered)
    mask = (1 << (space + 1)) - 1
    for number, copies in copies_of:
        for _ in range(min(copies, space // number)):
            more = reachable | (reachable << number & mask)
            if more == reachable:
                break  # another copy reaches nothing new either
            steps.append((number, reachable))
            reachable = more
        if reachable >> space:
            break  # the sum `space` itself: nothing is better
    # Backwards from the largest sum: a number is part of it if the sum was not reachable without that number.
    total, chosen = reachable.bit_length() - 1, []
    for number, before in reversed(steps):
        if not before >> total & 1:
            chosen.append(number)
            total -= number
    return chosen


def pack(documents: list[Document], vocabulary: Vocabulary, row_length: int, packing: PackingSpecs) -> Row:
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
        span=np.full(row_length, -1, dtype=np.int64),
    )
    counts_to = np.full(row_length, -1, dtype=np.int64)
    """The modality whose loss a token counts towards as a label `[S]`; -1 for a token that is certain or given."""
    start = 0
    for segment, document in enumerate(documents):
        stop = _render(document, row, counts_to, start, vocabulary, packing)
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


def _render(
    document: Document, row: Row, counts_to: IntArray, start: int, vocabulary: Vocabulary, packing: PackingSpecs
) -> int:
    """Write ids, positions and modalities of a document into a row from index `start` on; return the end index."""
    codes = _codes(vocabulary)
    index, at = start, 0  # the next token's index in the row, and its position if it is text

    def mark(token: int, modality: int) -> None:
        nonlocal index, at
        row.input_ids[index], row.position[:, index], counts_to[index] = token, at, modality
        index, at = index + 1, at + 1

    # Marks count towards the loss of text (0) where the model chooses what comes next: an image, or the end.
    mark(vocabulary.document_start, 0)
    for number, part in enumerate(document.parts):
        code, spec, size = codes[part.modality], packing[part.modality], part.ids.size
        start_of_part = index
        if code.begin >= 0:
            mark(code.begin, 0)
        if size:
            _check_ids(part, document.key, code)
            stop, position = index + size, spec.positions(size)
            row.input_ids[index:stop], counts_to[index:stop] = part.ids + code.start, code.number
            row.position[:, index:stop] = position + at
            if spec.is_span:
                row.span[index:stop] = index  # the first token's index is a number that no other span of the row has
            index, at = stop, at + int(position.max()) + 1
        if code.end >= 0:
            # If the length is fixed, the end mark is certain: there is nothing to learn.
            mark(code.end, -1 if spec.has_fixed_length else code.number)
        if spec.is_span:
            # Every token of the part sees the one after it, and a modality that is not learned is not begun either.
            counts_to[start_of_part:index] = -1
        if number < document.given:
            counts_to[start:index] = -1
    mark(vocabulary.document_end, 0)
    return index


def _check_ids(part: Part, key: str, code: _Codes) -> None:
    if not 0 <= part.ids.min() <= part.ids.max() < code.size:
        what = f"{part.modality} token id {part.ids.max()} in sample {key!r}, but its codec has {code.size}"
        raise UserError(what, remedy="delete this token cache and run `megamm data tokenize` with this codec")
