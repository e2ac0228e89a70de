"""Images: PNG, JPEG or WebP bytes <-> uint8 `[Y, X, 3]` (sRGB) <-> token ids `[T]`, row-major over the grid.

Every image becomes a square of the codec's size: EXIF rotation is applied, transparency is replaced by white, the
image is scaled with antialiasing (Lanczos) to fit, and padded with white, so nothing is cropped or stretched.
"""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from megamm.codecs.visual import VisualCodec, load_visual_codec
from megamm.data.sample import IntArray
from megamm.modalities.base import CPU, UnreadableMedia

PixelArray = npt.NDArray[np.uint8]

MAX_PIXELS = 64 * 2**20
"""Larger images are refused based on the header: a few kB of PNG can declare gigabytes (decompression bomb)."""
_FORMAT = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


class ImageModality:
    """The image modality; build it with `ImageModality.load(folder)`."""

    name: ClassVar[str] = "image"
    family: ClassVar[str] = "visual"
    extensions: ClassVar[tuple[str, ...]] = ("png", "jpg", "webp")

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
        image = _decode(data, extension)
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

    def choices(self, place: int) -> range:
        """All ids, at every place."""
        return range(self.vocabulary_size)


def square_pixels(data: bytes, extension: str, size: int) -> PixelArray:
    """Image bytes to uint8 `[size, size, 3]`: on white, aspect kept, padded. Raises UnreadableMedia if broken."""
    return pad_to_square(_on_white(_decode(data, extension)), size)


def pad_to_square(image: Image.Image, size: int, pixel_aspect: float = 1.0) -> PixelArray:
    """An RGB image to uint8 `[size, size, 3]`: aspect kept, padded with white.

    pixel_aspect: width of the image's pixels over their height.
    """
    width, height = fitted_sides(image.width * pixel_aspect, image.height, size)
    square = Image.new("RGB", (size, size), "white")
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    square.paste(resized, ((size - width) // 2, (size - height) // 2))
    return np.asarray(square)


def fitted_sides(width: float, height: float, size: int) -> tuple[int, int]:
    """Width and height (pixels) of a picture in a square of `size`: aspect kept, the longer side fills the square."""
    return max(1, round(width * size / max(width, height))), max(1, round(height * size / max(width, height)))


def _decode(data: bytes, extension: str) -> Image.Image:
    """The first frame, fully decoded and upright."""
    if not data:
        raise UnreadableMedia("zero bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=tuple(_FORMAT.values()))
    except Image.DecompressionBombError as error:
        raise UnreadableMedia(f"more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # Pillow raises many kinds for broken headers
        raise UnreadableMedia(f"not a PNG, JPEG or WebP image: {type(error).__name__}") from error
    if image.format != _FORMAT.get(extension):
        raise UnreadableMedia(f"a {image.format} image with the extension .{extension}")
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableMedia(f"{image.width} x {image.height} is more than {MAX_PIXELS} pixels")
    try:
        image.verify()  # PNG: checksums up to the end marker, which decoding alone does not read
        image = Image.open(io.BytesIO(data))  # an image cannot be used after verify
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:
        raise UnreadableMedia(f"broken {image.format} data: {error}") from error


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, with white instead of transparency."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip it at 255 instead of scaling
        image = Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")
