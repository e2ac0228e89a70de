"""Packing: documents to rows of fixed length, with attention, loss and positions kept inside each document.

A document renders as `<document_start> part part ... <document_end>`; a text part is its ids, a media part is
`<X_start> ids <X_end>`; all ids are shifted to their range of the vocabulary. Rows are planned from lengths alone,
one after the other and the longest documents first, each filled exactly where a subset sum does (minimum bin
slack: Gupta & Ho 1999). Positions (t, h, w) follow Qwen2-VL (Wang et al. 2024, section 2.1): text counts all
three up, a media part starts at the running position, what follows starts at its maximum + 1.
Lengths are in tokens; the arrays of a row are described in `sample.Row`.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from megamm.data.sample import IGNORE_LABEL, Document, IntArray, Part, Row
from megamm.errors import UserError
from megamm.model.vocabulary import Vocabulary

DOCUMENT_MARKS = 2
"""<document_start> and <document_end>."""
MEDIA_MARKS = 2
"""<X_start> and <X_end> around a media part."""
_EXACT = 3
"""How many documents of a row, about, are chosen so that it gets full; more gain nothing and cost time."""
_CANDIDATES = 32
"""Of how many lengths they are chosen, about, where there are more."""


@dataclass(frozen=True)
class Form:
    """A modality's parts: `Modality.positions` (length T to `[3, T]`), and whether all parts are equally long."""

    positions: Callable[[int], IntArray]
    has_fixed_length: bool


Forms = Mapping[str, Form]
"""By modality name."""


def document_length(*parts: tuple[str, int]) -> int:
    """Tokens of a document in a row, marks included, from (modality, tokens) of its parts."""
    return DOCUMENT_MARKS + sum(length + (0 if name == "text" else MEDIA_MARKS) for name, length in parts)


def plan_rows(lengths: IntArray, row_length: int) -> list[list[int]]:
    """Which documents `[documents]` go into which row; each exactly once, in order within a row.

    UserError if a document is longer than a row.
    """
    if lengths.size and lengths.max() > row_length:
        what = f"document {int(lengths.argmax())} has {lengths.max()} tokens, a row {row_length}"
        raise UserError(what, remedy=f"set seq_length to at least {lengths.max()}")
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
    # By first document, so that rows of long documents do not all come first.
    return sorted(rows)


def _fill_row(distinct: list[int], waiting: Mapping[int, list[int]], space: int) -> list[int]:
    """Lengths to put into an empty row: the longest first; the last few are those that leave the least space."""
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
    """The lengths with the largest sum up to `space`: subset sum, the reachable sums being the bits of an integer."""
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
    """One row `[S = row_length]` of documents that fit into it. UserError if an id is outside its codec's range."""
    rendered = [_render(document, vocabulary, forms) for document in documents]
    used = sum(ids.size for ids, _, _ in rendered)
    assert used <= row_length, "plan_rows puts no more into a row than fits"
    row = Row(
        input_ids=np.full(row_length, vocabulary.padding, dtype=np.int64),
        labels=np.full(row_length, IGNORE_LABEL, dtype=np.int64),
        loss_weight=np.zeros(row_length, dtype=np.float32),
        segment=np.full(row_length, -1, dtype=np.int64),
        position=np.zeros((3, row_length), dtype=np.int64),
        modality=np.full(row_length, -1, dtype=np.int64),
    )
    start = 0
    for segment, (ids, position, modality) in enumerate(rendered):
        stop = start + ids.size
        row.input_ids[start:stop] = ids
        row.labels[start : stop - 1] = ids[1:]
        row.modality[start : stop - 1] = modality[1:]
        row.segment[start:stop] = segment
        row.position[:, start:stop] = position
        start = stop
    row.loss_weight[:] = row.modality >= 0
    return row


def _render(document: Document, vocabulary: Vocabulary, forms: Forms) -> tuple[IntArray, IntArray, IntArray]:
    """Ids `[T]`, positions `[3, T]` and each token's modality `[T]` (as a label; -1 for one that is certain)."""
    pieces = [(np.array([vocabulary.document_start]), np.zeros((3, 1), dtype=np.int64), 0)]
    at = 1

    def add(ids: IntArray, position: IntArray, modality: int) -> None:
        nonlocal at
        pieces.append((ids, at + position, modality))
        at += int(position.max(initial=-1)) + 1

    one = np.zeros((3, 1), dtype=np.int64)
    for part in document.parts:
        ids = _shifted(part, document.key, vocabulary)
        modality = vocabulary.modalities.index(part.modality)
        if part.modality != "text":
            add(np.array([vocabulary.begin(part.modality)]), one, 0)
        form = forms[part.modality]
        add(ids, form.positions(ids.size), modality)
        if part.modality != "text":
            # Where the length is known, the end mark is certain: nothing to learn.
            add(np.array([vocabulary.end(part.modality)]), one, -1 if form.has_fixed_length else modality)
    add(np.array([vocabulary.document_end]), one, 0)
    modalities = np.repeat([m for _, _, m in pieces], [ids.size for ids, _, _ in pieces])
    return np.concatenate([p[0] for p in pieces]), np.concatenate([p[1] for p in pieces], axis=1), modalities


def _shifted(part: Part, key: str, vocabulary: Vocabulary) -> IntArray:
    ids_range = vocabulary[part.modality]
    if part.ids.size and not 0 <= part.ids.min() <= part.ids.max() < ids_range.size:
        what = f"{part.modality} token id {part.ids.max()} in sample {key!r}, but its codec has {ids_range.size}"
        raise UserError(what, remedy="delete that token cache and run `megamm data tokenize` with this codec")
    return part.ids + ids_range.start


def padding_share(row: Row) -> float:
    """Share of the row's positions that hold no document."""
    return float(np.mean(row.segment < 0))
