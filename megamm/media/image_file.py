"""Image files: PNG, JPEG or WebP bytes -> an upright picture -> uint8 `[Y, X, 3]` (sRGB), a square on white.

Every image becomes a square of the wanted size: EXIF rotation is applied, transparency is replaced by white, the image
is scaled with antialiasing (Lanczos) to fit, and padded with white, so nothing is cropped or stretched.
"""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from megamm.common.errors import UnreadableMedia

PixelArray = npt.NDArray[np.uint8]

MAX_PIXELS = 64 * 2**20
"""Larger images are refused based on the header: a few kB of PNG can declare gigabytes (decompression bomb)."""
_FORMAT = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


def square_pixels(data: bytes, extension: str, size: int) -> PixelArray:
    """Image bytes to uint8 `[size, size, 3]`: on white, aspect kept, padded. Raises UnreadableMedia if broken."""
    return pad_to_square(_on_white(decode_image(data, extension)), size)


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


def decode_image(data: bytes, extension: str) -> Image.Image:
    """Decode the first frame fully and turn it upright. Raises UnreadableMedia if it is broken or too large."""
    if not data:
        raise UnreadableMedia("zero bytes")
    try:
        # Only these decoders run on untrusted bytes: Pillow has dozens, some of them rarely tested.
        image = Image.open(io.BytesIO(data), formats=tuple(_FORMAT.values()))
    except Image.DecompressionBombError as error:
        raise UnreadableMedia(f"more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # Pillow raises many kinds for broken headers
        raise UnreadableMedia(f"not a PNG, JPEG or WebP image: {type(error).__name__}") from error
    # The extension is stored in the shards, where other tools choose a decoder by it.
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
    # Transparency can be an alpha channel, a palette entry or one colour; RGBA covers all three.
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")
