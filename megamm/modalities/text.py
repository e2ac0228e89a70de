"""Text: UTF-8 bytes <-> str <-> token ids `[T]` of a Hugging Face tokenizer.

The codec folder is any Hugging Face tokenizer folder; `tokenizer.json` alone is enough. No special tokens are added,
and the text of a special token ("<|endoftext|>") in the data is read as plain characters, so no document can inject
one. Ids are [0, vocabulary_size).
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer

from megamm.data.sample import IntArray
from megamm.errors import UserError
from megamm.modalities.base import CPU, UnreadableMedia, sequential_positions

logger = logging.getLogger(__name__)


class TextModality:
    """The text modality; build it with `TextModality.load(folder)`."""

    name: ClassVar[str] = "text"
    family: ClassVar[str] = "text"
    extensions: ClassVar[tuple[str, ...]] = ("txt",)

    def __init__(self, tokenizer: Tokenizer, codec_id: str) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # in the data their text is plain text
        self.tokenizer = tokenizer
        self.codec_id = codec_id
        self.tokens_per_item: int | None = None
        self.stride = 1
        self.vocabulary_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, codec: Path, device: torch.device = CPU) -> "TextModality":
        """Load a Hugging Face tokenizer folder, offline, without a device. Raises UserError if it is not one."""
        file = codec / "tokenizer.json"
        if not file.is_file():
            return cls._load_converted(codec)
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises no other class
            raise UserError(f"unreadable tokenizer: {error}", where=file, remedy="restore or retrain it") from error
        return cls(tokenizer, hashlib.sha256(file.read_bytes()).hexdigest()[:12])

    @classmethod
    def _load_converted(cls, codec: Path) -> "TextModality":
        remedy = "give a Hugging Face tokenizer folder, or create one with `megamm tokenizer train text`"
        if not codec.is_dir():
            raise UserError("no such tokenizer folder", where=codec, remedy=remedy)
        from transformers import AutoTokenizer  # takes seconds to import, rarely needed

        try:
            converted = AutoTokenizer.from_pretrained(codec, local_files_only=True, trust_remote_code=False)
            tokenizer = converted.backend_tokenizer
        except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"not a tokenizer folder: {reason}", where=codec, remedy=remedy) from error
        logger.info("%s has no tokenizer.json: converting from %s", codec, type(converted).__name__)
        return cls(tokenizer, hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:12])

    @staticmethod
    def check_media(data: bytes, extension: str) -> str:
        """The text's digest. Raises UnreadableMedia unless it is UTF-8 with a visible character and without NUL."""
        return hashlib.sha256(TextModality.to_text(data).encode()).hexdigest()

    def read_media(self, data: bytes, extension: str) -> str:
        """UTF-8 bytes to str. Raises UnreadableMedia as check_media does."""
        return self.to_text(data)

    @staticmethod
    def to_text(data: bytes) -> str:
        """UTF-8 bytes to str, without a codec. Raises UnreadableMedia as check_media does."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UnreadableMedia(f"not UTF-8: {error.reason} at byte {error.start}") from error
        if "\0" in text:
            raise UnreadableMedia("contains NUL characters: binary data, not text")
        if not text.strip():
            raise UnreadableMedia("contains no text")
        return text

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

    def choices(self, place: int) -> range:
        """All ids, at every place."""
        return range(self.vocabulary_size)
