"""Types of the data path, and the shape legend of the whole project.

Shape letters, used as name suffixes (`hidden_SBH`, `labels_BS`):
    B  rows in a microbatch            S  tokens in a row (sequence length)
    H  hidden size                     V  vocabulary size
    N  attention heads                 D  size of one head
    T  tokens of one part              C  channels;  Y, X  pixel rows and columns
    3  the axes (t, h, w) of a position

A *sample* is one key of a shard: the token ids of a part for each of its modalities.
A *document* is a sample with an order of its parts; a *row* is documents packed to S tokens.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

IGNORE_LABEL = -100
"""Label of a position without a prediction (the last token of a document, padding)."""


@dataclass(frozen=True)
class Part:
    """One modality's part of a document: codec-local token ids `[T]`, each in [0, vocabulary_size)."""

    modality: str
    ids: IntArray


@dataclass(frozen=True)
class Document:
    """A sample with its parts in reading order; `key` is the key of the sample.

    The first `given` parts are context only: their tokens count towards no loss.
    """

    key: str
    parts: tuple[Part, ...]
    given: int = 0

    @property
    def sizes(self) -> list[tuple[str, int]]:
        """(modality, tokens) of each part, without marks."""
        return [(part.modality, part.ids.size) for part in self.parts]


@dataclass(frozen=True)
class Row:
    """One packed training row; every array has length S (position: `[3, S]`).

    labels[s] is the token after s in the same document, or IGNORE_LABEL.
    loss_weight[s] is 0 where labels[s] is IGNORE_LABEL.
    segment[s] numbers the documents of the row from 0; padding is -1. Attention stays inside a segment.
    position[:, s] is (t, h, w); the three are equal for text.
    modality[s] is the index (Vocabulary.modalities) of the modality whose loss includes labels[s]; -1 for none.
    span[s] is -1, or the number of the span of s, unique in the row: consecutive tokens of one document that attend to
    each other in both directions.
    """

    input_ids: IntArray
    labels: IntArray
    loss_weight: FloatArray
    segment: IntArray
    position: IntArray
    modality: IntArray
    span: IntArray


@dataclass(frozen=True)
class PackedLengths:
    """Number of documents in packed rows, and the longest; the padding of a row counts as a document."""

    number: int
    longest: int

    @classmethod
    def of(cls, segment_BS: IntArray) -> "PackedLengths":
        """Count them in the segments of rows."""
        is_start = np.ones(segment_BS.shape, dtype=bool)
        is_start[:, 1:] = segment_BS[:, 1:] != segment_BS[:, :-1]
        starts = np.flatnonzero(is_start)
        return cls(len(starts), int(np.diff(starts, append=segment_BS.size).max()))


@dataclass
class Batch:
    """A microbatch of rows as tensors: `[B, S]` each, position `[B, 3, S]`.

    lengths: those of its documents, as numbers of the host; None if they were not counted.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_weight: torch.Tensor
    segment: torch.Tensor
    position: torch.Tensor
    modality: torch.Tensor
    span: torch.Tensor
    lengths: PackedLengths | None = None

    @property
    def packed_seq_metadata(self) -> torch.Tensor:
        """The values that attention needs for whole rows, `[B, 5, S]`: segment, t, h, w and span of every token."""
        return torch.cat((self.segment[:, None], self.position, self.span[:, None]), dim=1)

    @classmethod
    def stack(cls, rows: list[Row]) -> "Batch":
        """Stack B rows; all must have the same S."""
        stacked = {name: np.stack([getattr(r, name) for r in rows]) for name in _FIELDS}
        tensors = {name: torch.from_numpy(array) for name, array in stacked.items()}
        return cls(**tensors, lengths=PackedLengths.of(stacked["segment"]))

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _FIELDS}
        return Batch(**moved, lengths=self.lengths)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; called by torch's DataLoader."""
        return Batch(**{name: getattr(self, name).pin_memory() for name in _FIELDS}, lengths=self.lengths)


_FIELDS = ("input_ids", "labels", "loss_weight", "segment", "position", "modality", "span")
