"""Text: UTF-8 bytes <-> str <-> token ids `[T]` of a Hugging Face tokenizer.

The tokenizer folder is any of Hugging Face; `tokenizer.json` alone is enough. No special tokens are added,
and the text of a special token ("<|endoftext|>") in the data is read as plain characters, so no document can inject
one. Ids are [0, vocabulary_size).
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer

from megamm.common.sample import IntArray
from megamm.media.text_file import to_text
from megamm.modalities.protocol import CPU, sequential_positions
from megamm.tokenizers.text.model import load_tokenizer, vocabulary_size


class TextModality:
    """The text modality; build it with `TextModality.load(folder)`."""

    name: ClassVar[str] = "text"
    tokenizer_name: ClassVar[str] = "text"
    extensions: ClassVar[tuple[str, ...]] = ("txt",)

    def __init__(self, tokenizer: Tokenizer, codec_id: str) -> None:
        self.tokenizer = tokenizer
        self.codec_id = codec_id
        self.tokens_per_item: int | None = None
        self.stride = 1
        self.vocabulary_size = vocabulary_size(tokenizer)

    @classmethod
    def load(cls, codec: Path, device: torch.device = CPU) -> "TextModality":
        """Load a Hugging Face tokenizer folder, offline, without a device. Raises UserError if it is not one."""
        return cls(*load_tokenizer(codec))

    @staticmethod
    def check_media(data: bytes, extension: str) -> str:
        """The text's digest. Raises UnreadableMedia unless it is UTF-8 with a visible character and without NUL."""
        return hashlib.sha256(to_text(data).encode()).hexdigest()

    def read_media(self, data: bytes, extension: str) -> str:
        """UTF-8 bytes to str. Raises UnreadableMedia as check_media does."""
        return to_text(data)

    def write_media(self, media: str) -> bytes:
        """str to UTF-8 bytes."""
        return media.encode("utf-8")

    def encode(self, media: Sequence[str]) -> list[IntArray]:
        """Texts to ids, one `[T]` array each, without special tokens."""
        encodings = self.tokenizer.encode_batch_fast(list(media), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: IntArray) -> str:
        """Ids `[T]` to text; a truncated multi-byte character becomes U+FFFD."""
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def positions(self, length: int) -> IntArray:
        """`[3, length]`, t = h = w = 0 .. length - 1."""
        return sequential_positions(length)

    def valid_token_ids(self, index: int) -> range:
        """All ids, at every index."""
        return range(self.vocabulary_size)
