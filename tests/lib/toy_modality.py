"""A sixth modality in one file, as a user would add it: smells, as strings of the letters a to p."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from megamm.common.errors import UnreadableMedia
from megamm.common.sample import IntArray
from megamm.modalities.protocol import CPU, sequential_positions

LETTERS = "abcdefghijklmnop"


class SmellModality:
    """A letter is a token; a part has four letters per sniff, and any number of sniffs."""

    name: ClassVar[str] = "smell"
    tokenizer_name: ClassVar[str] = "smell"
    extensions: ClassVar[tuple[str, ...]] = ("smell",)
    stride = 4
    tokens_per_item: int | None = None

    def __init__(self, letters: int, codec_id: str) -> None:
        self.vocabulary_size, self.codec_id = letters, codec_id

    @classmethod
    def load(cls, codec: Path, device: torch.device = CPU) -> "SmellModality":
        config = (codec / "config.json").read_bytes()
        return cls(json.loads(config)["letters"], hashlib.sha256(config).hexdigest()[:12])

    @staticmethod
    def check_media(data: bytes, extension: str) -> str:
        if not data or len(data) % 4 or set(data.decode("latin-1")) - set(LETTERS):
            raise UnreadableMedia("no smell")
        return hashlib.sha256(data).hexdigest()

    def read_media(self, data: bytes, extension: str) -> str:
        self.check_media(data, extension)
        return data.decode()

    def write_media(self, media: str) -> bytes:
        return media.encode()

    def encode(self, media: Sequence[str]) -> list[IntArray]:
        return [np.array([LETTERS.index(c) for c in one], dtype=np.int64) for one in media]

    def decode(self, ids: IntArray) -> str:
        return "".join(LETTERS[i] for i in ids)

    def positions(self, length: int) -> IntArray:
        return sequential_positions(length)

    def valid_token_ids(self, index: int) -> range:
        return range(self.vocabulary_size)

    @staticmethod
    def example(number: int) -> tuple[bytes, str]:
        """Return (bytes, extension) of a medium for the tests."""
        letters = np.random.default_rng(number).integers(len(LETTERS), size=4 * (1 + number % 3))
        return "".join(LETTERS[i] for i in letters).encode(), "smell"

    @staticmethod
    def make_codec(folder: Path) -> None:
        """Write a codec folder for the tests."""
        (folder / "config.json").write_text(json.dumps({"letters": len(LETTERS)}))
