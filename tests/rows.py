"""Random packed rows with every awkward feature: several documents, padding, microbatches without an image."""

import numpy as np
import torch

from megamm.data.sample import IGNORE_LABEL, Batch, Row

TEXT_SIZE = 200  # ids below are text (modality 0), the rest image (modality 1)


def random_row(rng: np.random.Generator, length: int, vocabulary_size: int, images: bool) -> Row:
    """One row of random documents of odd lengths; without images no id reaches TEXT_SIZE."""
    ids = np.zeros(length, dtype=np.int64)
    labels = np.full(length, IGNORE_LABEL, dtype=np.int64)
    segment = np.full(length, -1, dtype=np.int64)
    at, document = 0, 0
    while at < length - 7:
        size = int(rng.integers(3, 14))
        size = min(size, length - 3 - at)
        if size < 2:
            break
        part = rng.integers(0, vocabulary_size if images else TEXT_SIZE, size)
        ids[at : at + size] = part
        labels[at : at + size - 1] = part[1:]
        segment[at : at + size] = document
        at, document = at + size, document + 1
    valid = labels != IGNORE_LABEL
    weight = np.where(valid, np.where(rng.random(length) < 0.1, 0.0, 1.0), 0.0).astype(np.float32)
    modality = np.where(valid, (labels >= TEXT_SIZE).astype(np.int64), -1)
    return Row(ids, labels, weight, segment, np.broadcast_to(np.arange(length), (3, length)).copy(), modality)


def global_batch(
    seed: int, rows: int, length: int, vocabulary_size: int, image_rows: frozenset[int] | None = None
) -> list[Row]:
    """`rows` rows of one step; image_rows says which may hold images (None: all)."""
    rng = np.random.default_rng(seed)
    return [random_row(rng, length, vocabulary_size, image_rows is None or i in image_rows) for i in range(rows)]


def rank_batches(rows: list[Row], micro_batch: int, data_rank: int, data_size: int) -> list[Batch]:
    """This data rank's microbatches: number j holds rows (j * data_size + data_rank) * micro_batch onwards."""
    step = micro_batch * data_size
    starts = range(data_rank * micro_batch, len(rows), step)
    return [Batch.stack(rows[start : start + micro_batch]) for start in starts]


def as_tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)
