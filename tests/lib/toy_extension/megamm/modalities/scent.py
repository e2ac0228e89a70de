"""Scents: strings of the letters a to h <-> int64 `[T]` <-> token ids `[T]`, by a trained tokenizer.

A toy modality: tests/test_extension_points.py copies it into a copy of the package.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from megamm.common.errors import UnreadableMedia
from megamm.common.sample import IntArray
from megamm.modalities.protocol import CPU, sequential_positions
from megamm.tokenizers.load import load_codec
from megamm.tokenizers.scent.model import KIND, LETTERS, ScentCodec


class ScentModality:
    """A letter is a token; a scent has any number of letters."""

    name: ClassVar[str] = "scent"
    tokenizer_name: ClassVar[str] = "scent"
    extensions: ClassVar[tuple[str, ...]] = ("scent",)
    stride = 1
    tokens_per_item: int | None = None

    def __init__(self, codec: ScentCodec, codec_id: str) -> None:
        self.codec, self.codec_id, self.vocabulary_size = codec.eval(), codec_id, codec.config.codes

    @classmethod
    def load(cls, codec: Path, device: torch.device = CPU) -> "ScentModality":
        module, codec_id = load_codec(codec, {KIND: ScentCodec}, "scent")
        return cls(module.to(device), codec_id)

    @staticmethod
    def check_media(data: bytes, extension: str) -> str:
        if not data or set(data.decode("latin-1")) - set(LETTERS):
            raise UnreadableMedia("not a scent")
        return hashlib.sha256(data).hexdigest()

    def read_media(self, data: bytes, extension: str) -> IntArray:
        self.check_media(data, extension)
        return np.array([LETTERS.index(letter) for letter in data.decode()], dtype=np.int64)

    def write_media(self, media: IntArray) -> bytes:
        return "".join(LETTERS[letter] for letter in media).encode()

    def encode(self, media: Sequence[IntArray]) -> list[IntArray]:
        return [self.codec.encode(torch.from_numpy(letters)).numpy() for letters in media]

    def decode(self, ids: IntArray) -> IntArray:
        return self.codec.decode(torch.from_numpy(ids)).numpy()

    def positions(self, length: int) -> IntArray:
        return sequential_positions(length)

    def valid_token_ids(self, index: int) -> range:
        return range(self.vocabulary_size)
