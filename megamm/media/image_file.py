"""Image files (PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, HEIC) -> upright sRGB picture -> square uint8 `[Y, X, 3]`.

Of a file with several pictures (animation, MPO, pages of a TIFF), the first is read. Colours are converted to 8-bit
sRGB (media/image_colours.py). Every image becomes a square of the wanted size: EXIF rotation is applied, transparency
is replaced by white, the image is scaled with antialiasing (Lanczos) to fit, and padded with white, so nothing is
cropped or stretched.
"""

import io

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from megamm.common.errors import UnreadableMedia, UserError
from megamm.media.image_colours import check_code_points, to_srgb

PixelArray = npt.NDArray[np.uint8]

MAX_PIXELS = 64 * 2**20
"""Larger images are refused based on the header: a few kB of PNG can declare gigabytes (decompression bomb)."""
_FORMATS = {
    "png": ("PNG",),
    "jpg": ("JPEG", "MPO"),  # MPO: a JPEG with further pictures behind it, written by phones and stereo cameras
    "webp": ("WEBP",),
    "gif": ("GIF",),
    "bmp": ("BMP", "DIB"),
    "tiff": ("TIFF",),
    "avif": ("AVIF",),
    "heic": ("HEIF",),
}
"""Extension -> Pillow's names of the formats it may have."""
_DECODERS = frozenset(name for names in _FORMATS.values() for name in names)
IMAGE_EXTENSIONS = tuple(_FORMATS)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright (Exif 2.32, section 4.6.4)."""
_OTHERS = "GIF, BMP, TIFF, AVIF or HEIC"


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
    """Decode the first picture fully, upright, as RGB or RGBA in sRGB. Raises UnreadableMedia if it is unusable."""
    if not data:
        raise UnreadableMedia("zero bytes")
    if extension == "heic":
        _register_heif()
    Image.init()  # loads Pillow's plugins once; with `formats`, open does not
    # Only these decoders run on untrusted bytes: Pillow has dozens, some of them rarely tested.
    formats = [name for name in Image.OPEN if name in _DECODERS]
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise UnreadableMedia(f"more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # Pillow raises many kinds for broken headers
        raise UnreadableMedia(f"not a PNG, JPEG or WebP image, nor {_OTHERS}: {type(error).__name__}") from error
    # The extension is stored in the shards, where other tools choose a decoder by it.
    if image.format not in _FORMATS.get(extension, ()):
        raise UnreadableMedia(f"a {image.format} image with the extension .{extension}")
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableMedia(f"{image.width} x {image.height} is more than {MAX_PIXELS} pixels")
    try:
        image.verify()  # PNG: checksums up to the end marker, which decoding alone does not read
        image = Image.open(io.BytesIO(data), formats=formats)  # an image cannot be used after verify
        image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if "icc_profile" not in image.info:
            check_code_points(data, extension)
        picture = to_srgb(image)
    except UnreadableMedia:
        raise
    except Exception as error:
        raise UnreadableMedia(f"broken {image.format} data: {error}") from error
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _register_heif() -> None:
    """Let Pillow read HEIC. Raises UserError if the package for it is not installed."""
    try:
        import pillow_heif
    except ImportError as error:
        remedy = "install it: pip install 'megamm[heic]', or convert the pictures"
        raise UserError("reading HEIC pictures needs pillow-heif", remedy=remedy) from error
    pillow_heif.register_heif_opener()


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, with white instead of transparency."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
