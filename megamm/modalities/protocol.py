"""The protocol of a modality: media bytes <-> arrays <-> token ids.

A modality is one file that implements `Modality` and one line in `megamm.modalities.REGISTRY`. Its ids are local to
the tokenizer, in [0, vocabulary_size); `model.vocabulary` shifts them to their range.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from megamm.common.sample import IntArray

CPU = torch.device("cpu")


class Modality(Protocol):
    """A kind of media with the tokenizer that converts it to tokens and back."""

    name: ClassVar[str]
    """Folder of the media in a shard set, and the modality's name everywhere: "text", "image"."""
    tokenizer_name: ClassVar[str]
    """Its tokenizer in a run's `tokenizers`: "text", "visual", "audio", "points". Image and video share one, and its
    ids."""
    extensions: ClassVar[tuple[str, ...]]
    """File extensions in its shards, without the dot; `write_media` uses the first."""

    vocabulary_size: int
    """Number of token ids of the loaded tokenizer."""
    codec_id: str
    """First 12 hex digits of the SHA-256 over the tokenizer's config and weights; names its token caches."""
    tokens_per_item: int | None
    """Tokens of every item of the loaded tokenizer; None if the length varies (text, audio, video)."""
    stride: int
    """Every part's length is a multiple of this: 1 for text, the tokens of a latent frame for video."""

    @classmethod
    def load(cls, codec: Path, device: torch.device = CPU) -> "Modality":
        """Load the tokenizer from its folder, to compute on `device`. Raises UserError if it is not such a one."""
        ...

    @staticmethod
    def check_media(data: bytes, extension: str) -> str:
        """Decode the media fully, without a tokenizer; returns the SHA-256 (hex) of the result, to find duplicates.

        Raises UnreadableMedia if it cannot be used for training.
        """
        ...

    def read_media(self, data: bytes, extension: str) -> Any:
        """Media bytes to input of `encode` (text: str; image: uint8 `[Y, X, 3]`). Raises UnreadableMedia if broken."""
        ...

    def write_media(self, media: Any) -> bytes:
        """The inverse of read_media, in the format `extensions[0]`."""
        ...

    def encode(self, media: Sequence[Any]) -> list[IntArray]:
        """A batch of tokenizer inputs to token ids, one `[T]` array each."""
        ...

    def decode(self, ids: IntArray) -> Any:
        """Token ids `[T]` back to media."""
        ...

    def positions(self, length: int) -> IntArray:
        """`[3, length]`: (t, h, w) of each token, from 0; for text all three count up together.

        The positions of a shorter part are a prefix of a longer part's: the length of a generated part is not known.
        """
        ...

    def valid_token_ids(self, index: int) -> range:
        """The ids that are valid at this index of a part (for a residual codec, those of its level)."""
        ...


def sequential_positions(length: int) -> IntArray:
    """Positions of a part without spatial axes: `[3, length]`, each row 0 .. length - 1."""
    return np.broadcast_to(np.arange(length, dtype=np.int64), (3, length)).copy()
