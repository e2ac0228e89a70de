"""Random packed rows with all difficult features: many documents of odd lengths, padding, missing modalities.

A mix defines which rows of a step may contain text and which images; rows depend only on (seed, step, mix, length), not
on the layout. There are two modalities: ids below TEXT_SIZE are text (0), the others image (1). If images are spans
(`modalities.image.attention=span`), documents with images have some of any length, also over all context ranks.
`wrong_inputs` checks that attention received these rows: segments, positions, spans, and the tokens of a context rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megamm.common.sample import IGNORE_LABEL, Batch, IntArray, Row
from megamm.config import RunConfig

VOCABULARY, TEXT_SIZE = 301, 200
MODALITIES = ("text", "image")
MIXES = {
    "mixed": "every row has both",
    "rank_without_images": "the last data-parallel rank has no image",
    "microbatch_without_text": "every other microbatch is images only",
    "step_without_images": "the first step has no image",
    "images_from_step_3": "the first two steps have no image",
    "text_only": "no image ever",
    "padding_row": "the first of a step's rows is all padding",
}


@dataclass(frozen=True)
class RowKinds:
    """Row numbers of a step that may contain text, and those that may contain images."""

    text: frozenset[int]
    image: frozenset[int]


def kinds(mix: str, step: int, rows: int, micro_batch: int, data_size: int) -> RowKinds:
    """Return what each of the step's rows may contain (steps count from 1). KeyError for an unknown mix."""
    everything = frozenset(range(rows))
    microbatch = {i: i // micro_batch for i in everything}
    if mix == "rank_without_images":
        seen = frozenset(i for i in everything if data_size == 1 or microbatch[i] % data_size != data_size - 1)
        return RowKinds(everything, seen)
    if mix == "microbatch_without_text":
        return RowKinds(frozenset(i for i in everything if microbatch[i] % 2 == 0), everything)
    if mix == "padding_row":
        # If the step has only one row, the gradient would be nothing but rounding errors.
        held = everything - {0} if rows > 1 else everything
        return RowKinds(held, held)
    without = {"step_without_images": step == 1, "images_from_step_3": step < 3, "text_only": True, "mixed": False}
    return RowKinds(everything, frozenset() if without[mix] else everything)


def steps_of(mix: str) -> int:
    """Return the number of optimizer steps that the mix needs."""
    return 3 if mix == "images_from_step_3" else 2


def random_row(rng: np.random.Generator, length: int, text: bool = True, image: bool = True) -> Row:
    """Create a row of random documents of odd lengths and padding; without text and image it is all padding."""
    ids = np.zeros(length, dtype=np.int64)
    labels = np.full(length, IGNORE_LABEL, dtype=np.int64)
    segment = np.full(length, -1, dtype=np.int64)
    position = np.zeros((3, length), dtype=np.int64)
    longest = int(rng.choice([14, length]))  # some rows are one document, over all context ranks
    at, document = 0, 0
    while (text or image) and at < length - 7:
        size = min(int(rng.integers(3, longest + 1)), length - 3 - at)
        if size < 2:
            break
        part = rng.integers(0 if text else TEXT_SIZE, VOCABULARY if image else TEXT_SIZE, size)
        here = slice(at, at + size)
        ids[here], segment[here] = part, document
        labels[at : at + size - 1] = part[1:]
        position[:, here] = _positions(rng, part)
        at, document = at + size, document + 1
    valid = labels != IGNORE_LABEL
    weight = np.where(valid, np.where(rng.random(length) < 0.1, 0.0, 1.0), 0.0).astype(np.float32)
    modality = np.where(valid, (labels >= TEXT_SIZE).astype(np.int64), -1)
    return Row(ids, labels, weight, segment, position, modality, np.full(length, -1, dtype=np.int64))


def _with_spans(row: Row, rng: np.random.Generator) -> Row:
    """Return the row with one or two spans of image tokens in each document, which count in no loss."""
    ids, weight, modality, span = (
        getattr(row, name).copy() for name in ("input_ids", "loss_weight", "modality", "span")
    )
    for document in range(int(row.segment.max()) + 1):
        tokens = np.flatnonzero(row.segment == document)
        cuts = np.sort(rng.integers(tokens[0], tokens[-1] + 2, 2 * int(rng.integers(1, 3))))
        for first, stop in cuts.reshape(-1, 2):
            here = slice(first, stop)
            span[here], ids[here] = first, rng.integers(TEXT_SIZE, VOCABULARY, stop - first)
    predicts_span = np.append(span[1:] >= 0, False) & (row.labels != IGNORE_LABEL)
    labels = np.where(row.labels == IGNORE_LABEL, IGNORE_LABEL, np.append(ids[1:], 0))
    weight[predicts_span], modality[predicts_span] = 0.0, -1
    return Row(ids, labels, weight, row.segment, row.position, modality, span)


def _positions(rng: np.random.Generator, ids: IntArray) -> IntArray:
    """Return (t, h, w) `[3, T]` of a document: the index, and for image tokens different rows and columns."""
    index = np.broadcast_to(np.arange(len(ids)), (3, len(ids))).copy()
    away = rng.integers(0, 9, (3, len(ids))) * (ids >= TEXT_SIZE)
    away[0] = 0
    return index + away


def global_batch(seed: int, step: int, rows: list[tuple[bool, bool]], length: int, spans: bool = False) -> list[Row]:
    """Create the rows of one step. rows: for each, whether it may contain (text, image); spans: images are spans."""
    rng = np.random.default_rng((seed, step))
    made = [random_row(rng, length, text, image) for text, image in rows]
    return [_with_spans(row, rng) if spans and image else row for row, (_, image) in zip(made, rows, strict=True)]


def rank_batches(rows: list[Row], micro_batch: int, data_rank: int, data_size: int) -> list[Batch]:
    """Return this data rank's microbatches: number j starts at row (j * data_size + data_rank) * micro_batch."""
    step = micro_batch * data_size
    starts = range(data_rank * micro_batch, len(rows), step)
    return [Batch.stack(rows[start : start + micro_batch]) for start in starts]


def wrong_inputs(seen: Any, batches: Sequence[Batch], config: RunConfig, context_rank: int) -> list[str]:
    """Return one line for each kind of input of attention that does not match this rank's batches.

    The expected values are computed from the batches, independently of the code under test.
    """
    axes, size = config.model.rope_axes, config.parallel.context
    maps = [torch.cat((b.segment[:, None], b.position, b.span[:, None]), 1) for b in batches]
    positions = [expected_positions(b, axes)[..., local_tokens(b, context_rank, size)] for b in batches]
    kinds = {
        "segments or positions passed to attention": (seen.metadata, maps),
        "positions used for RoPE in attention": (seen.positions, positions),
        "spans that attention used": (seen.spans, [b.span[:, None] for b in batches]),
    }
    return [
        f"{kind} differ from the row's: {_first(found, expected)}"
        for kind, (observed, expected) in kinds.items()
        if (found := next((o for o in observed if not any(torch.equal(o, e) for e in expected)), None)) is not None
    ]


def local_tokens(batch: Batch, rank: int, size: int) -> list[int]:
    """Return the row indices of a context rank's tokens: its early and its late chunk of 2 * size chunks."""
    length = batch.input_ids.shape[1]
    if size == 1:
        return list(range(length))
    return [i for i in range(length) if i * 2 * size // length in (rank, 2 * size - 1 - rank)]


def expected_positions(batch: Batch, axes: int) -> torch.Tensor:
    """Return `[B, axes, S]`: (t, h, w), or with one axis the index in the document."""
    if axes == 3:
        return batch.position
    index = torch.zeros_like(batch.segment)
    for row, segments in enumerate(batch.segment.tolist()):
        for i in range(1, len(segments)):
            index[row, i] = index[row, i - 1] + 1 if segments[i] == segments[i - 1] else 0
    return index[:, None]


def _first(found: torch.Tensor, expected: list[torch.Tensor]) -> str:
    """Return the first position where it differs from the closest batch."""
    same_shape = [e for e in expected if e.shape == found.shape]
    if not same_shape:
        return f"shape {tuple(found.shape)} instead of {tuple(expected[0].shape)}"
    nearest = min(same_shape, key=lambda e: int((e != found).sum()))
    row, channel, token = (found != nearest).nonzero()[0].tolist()
    return f"row {row}, token {token}: {found[row, channel, token]} instead of {nearest[row, channel, token]}"
