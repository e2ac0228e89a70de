"""Images: bytes of a file (media/image_file.py) <-> sRGB, uint8 `[Y, X, 3]` <-> token ids `[T]`, row by row.

Every image becomes a square of the codec's size: EXIF rotation is applied, transparency is replaced by white, the
image is scaled with antialiasing (Lanczos) to fit, and padded with white, so nothing is cropped or stretched.
"""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from megamm.common.sample import IntArray
from megamm.media.image_file import IMAGE_EXTENSIONS, PixelArray, decode_image, square_pixels
from megamm.modalities.protocol import CPU
from megamm.tokenizers.load import load_visual_codec
from megamm.tokenizers.visual.model import VisualCodec


class ImageModality:
    """The image modality; build it with `ImageModality.load(folder)`."""

    name: ClassVar[str] = "image"
    tokenizer_name: ClassVar[str] = "visual"
    extensions: ClassVar[tuple[str, ...]] = IMAGE_EXTENSIONS

    def __init__(self, codec: VisualCodec, codec_id: str, device: torch.device) -> None:
        self.codec = codec.to(device).eval()
        self.codec_id = codec_id
        self.device = device
        self.vocabulary_size = codec.codebook_size
        self.tokens_per_item: int | None = codec.grid_size**2
        self.stride = codec.grid_size**2

    @classmethod
    def load(cls, codec: Path, device: torch.device = CPU) -> "ImageModality":
        """Load a visual codec folder onto a device. Raises UserError if it is not one."""
        module, codec_id = load_visual_codec(codec)
        return cls(module, codec_id, device)

    @staticmethod
    def check_media(data: bytes, extension: str) -> str:
        """Digest of size and pixels. Raises UnreadableMedia if broken, of the wrong format, or too large."""
        image = decode_image(data, extension)
        return hashlib.sha256(repr(image.size).encode() + image.convert("RGBA").tobytes()).hexdigest()

    def read_media(self, data: bytes, extension: str) -> PixelArray:
        """Image bytes to uint8 `[Y, X, 3]`, Y = X = the codec's image_size."""
        return square_pixels(data, extension, self.codec.image_size)

    def write_media(self, media: PixelArray) -> bytes:
        """uint8 `[Y, X, 3]` to PNG bytes."""
        file = io.BytesIO()
        Image.fromarray(media).save(file, format="PNG")
        return file.getvalue()

    def encode(self, media: Sequence[PixelArray]) -> list[IntArray]:
        """Images `[Y, X, 3]` to ids `[T]` each, on the codec's device."""
        if not media:
            return []
        # F = 1: the visual codec takes videos, and an image is one frame.
        images_BFYX3 = torch.from_numpy(np.stack(media)[:, None]).to(self.device)
        return list(self.codec.encode(images_BFYX3).cpu().numpy())

    def decode(self, ids: IntArray) -> PixelArray:
        """Ids `[T]` to uint8 `[Y, X, 3]`. Raises ValueError if T is not the codec's or an id is out of range."""
        if len(ids) != self.stride:
            raise ValueError(f"{len(ids)} ids, but an image has {self.stride}")
        images_BFYX3 = self.codec.decode(torch.from_numpy(np.asarray(ids, dtype=np.int64))[None].to(self.device))
        return images_BFYX3[0, 0].cpu().numpy()

    def positions(self, length: int) -> IntArray:
        """`[3, length]`: t = 0, (h, w) row-major over the latent grid."""
        h, w = np.divmod(np.arange(length, dtype=np.int64), self.codec.grid_size)
        return np.stack([np.zeros_like(h), h, w])

    def valid_token_ids(self, index: int) -> range:
        """All ids, at every index."""
        return range(self.vocabulary_size)
