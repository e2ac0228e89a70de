"""Images: rejected files, pixel preparation, and the modality's contract with a real (untrained) codec."""

import struct
import zlib

import numpy as np
import pytest
import torch
from codec_data import as_bytes, shape_picture
from PIL import Image

from megamm.common.errors import UnreadableMedia, UserError
from megamm.media.image_file import MAX_PIXELS, square_pixels
from megamm.modalities.image import ImageModality
from megamm.tokenizers.io import save_codec
from megamm.tokenizers.visual.model import VisualCodec, VisualCodecConfig

PICTURE = shape_picture(3)[0]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
PNG, JPEG, WEBP = (as_bytes(NOISE, kind) for kind in ("PNG", "JPEG", "WEBP"))


def png_of_size(width, height):
    """Return a PNG of a few bytes that claims to have this size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


BAD = {
    "zero bytes": (b"", "png", "zero bytes"),
    "truncated png": (PNG[: len(PNG) // 2], "png", "broken PNG"),
    "png without its end": (PNG[:-12], "png", "broken PNG"),
    "damaged png": (flipped(PNG, len(PNG) // 2), "png", "broken PNG"),
    "truncated jpg": (JPEG[: len(JPEG) // 2], "jpg", "broken JPEG"),
    "truncated webp": (WEBP[: len(WEBP) // 2], "webp", "WebP"),
    "text named png": (b"not an image\n" * 50, "png", "not a PNG, JPEG or WebP"),
    "html named jpg": (b"<html>404 not found</html>", "jpg", "not a PNG, JPEG or WebP"),
    "jpg named png": (JPEG, "png", "a JPEG image with the extension .png"),
    "gif named png": (as_bytes(PICTURE, "GIF"), "png", "a GIF image with the extension .png"),
    "another format": (as_bytes(PICTURE, "PPM"), "png", "not a PNG, JPEG or WebP"),
    "large": (png_of_size(10_000, 10_000), "png", f"more than {MAX_PIXELS}"),
    "decompression bomb": (png_of_size(100_000, 100_000), "png", f"more than {MAX_PIXELS}"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused_with_the_reason(name):
    data, extension, reason = BAD[name]
    with pytest.raises(UnreadableMedia, match=reason):
        ImageModality.check_media(data, extension)
    with pytest.raises(UnreadableMedia, match=reason):
        square_pixels(data, extension, 16)


@pytest.mark.parametrize(("data", "extension"), [(PNG, "png"), (JPEG, "jpg"), (WEBP, "webp")])
def test_good_images_are_accepted(data, extension):
    ImageModality.check_media(data, extension)
    assert square_pixels(data, extension, 16).shape == (16, 16, 3)


def test_transparency_is_laid_on_white_in_every_kind_of_png():
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert square_pixels(as_bytes(half), "png", 8)[4, 4].tolist() == [255, 127, 127]
    grey = Image.new("LA", (8, 8), (0, 0))
    assert square_pixels(as_bytes(grey), "png", 8).min() == 255
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    assert square_pixels(as_bytes(palette, transparency=1), "png", 8).min() == 255
    assert square_pixels(as_bytes(palette), "png", 8)[0, 0].tolist() == [255, 0, 0]


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    ramp = Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16))
    assert np.unique(square_pixels(as_bytes(ramp), "png", 8)).tolist() == [0x80]


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (16, 8), "white")
    image.paste((255, 0, 0), (0, 0, 8, 8))  # left half red
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed rotated by 90 degrees clockwise: red is on top
    pixels = square_pixels(as_bytes(image, "PNG", exif=exif), "png", 16)
    assert pixels[2, 8].tolist() == [255, 0, 0] and pixels[14, 8].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (1, 30_000), (30_000, 1)])
def test_aspect_is_kept_and_the_rest_is_white(width, height):
    pixels = square_pixels(as_bytes(Image.new("RGB", (width, height), "black")), "png", 16)
    dark = np.argwhere(pixels.max(axis=2) < 128)
    extent = dark.max(axis=0) - dark.min(axis=0) + 1
    scale = 16 / max(width, height)
    assert extent.tolist() == [max(1, round(height * scale)), max(1, round(width * scale))]
    assert set(np.unique(pixels)) <= {0, 255}


def test_scaling_down_is_antialiased():
    stripes = np.zeros((128, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # any nearest-pixel scaling gives all black or all white
    inner = square_pixels(as_bytes(Image.fromarray(stripes)), "png", 16)[:, 2:-2]
    assert 110 < inner.min() <= inner.max() < 145


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec")
    torch.manual_seed(0)
    save_codec(VisualCodec(VisualCodecConfig(image_size=32, downsample=8, width=16, levels=(5, 4, 3))), folder)
    return folder


def test_media_to_ids_and_back_through_the_protocol(folder):
    image = ImageModality.load(folder)
    media = [image.read_media(as_bytes(shape_picture(n)[0]), "png") for n in range(5)]
    together, alone = image.encode(media), [image.encode([m])[0] for m in media]
    assert image.encode([]) == [] and image.vocabulary_size == 60
    for ids, other in zip(together, alone, strict=True):
        assert ids.dtype == np.int64 and ids.shape == (16,) and 0 <= ids.min() <= ids.max() < 60
        assert np.array_equal(ids, other)  # batching does not change the ids
    pixels = image.decode(together[0])
    assert pixels.dtype == np.uint8 and pixels.shape == (32, 32, 3)
    assert np.array_equal(image.read_media(image.write_media(pixels), "png"), pixels)


def test_positions_are_the_grid_row_by_row(folder):
    expected = [(0, h, w) for h in range(4) for w in range(4)]
    assert ImageModality.load(folder).positions(16).T.tolist() == [list(p) for p in expected]
    assert ImageModality.load(folder).positions(6).T.tolist() == [list(p) for p in expected[:6]]


@pytest.mark.parametrize("ids", [np.zeros(15, np.int64), np.full(16, 60), np.full(16, -1)])
def test_ids_that_are_no_image_are_refused(folder, ids):
    with pytest.raises(ValueError, match="ids"):
        ImageModality.load(folder).decode(ids)


def test_no_codec_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="not a tokenizer for visual"):
        ImageModality.load(tmp_path)
