"""Pictures as people have them: formats, bit depths and colour profiles, against values worked out by hand."""

import struct
import sys
import zlib

import icc_profiles as icc
import numpy as np
import pytest
from codec_data import as_bytes
from PIL import Image

from megamm.common.errors import UnreadableMedia, UserError
from megamm.data.build.curation import CurationOptions, check_image
from megamm.data.build.shards import BuildOptions, build
from megamm.media.image_file import decode_image
from megamm.modalities.image import ImageModality
from megamm.shards.folder import ShardFolder

QUARTERS = np.zeros((48, 64, 3), dtype=np.uint8)
QUARTERS[:, :32, 0], QUARTERS[:24, :, 1] = 255, 200
PICTURE, OTHER = Image.fromarray(QUARTERS), Image.new("RGB", (48, 64), "navy")


def pixels(data, extension):
    """Return the decoded picture, int [Y, X, channels]."""
    return np.asarray(decode_image(data, extension)).astype(int)


def has_colours(data, extension, expected, tolerance):
    """Compare the centres of the quarters: lossy formats blur their borders."""
    found = pixels(data, extension)[..., :3]
    assert found.shape == expected.shape
    y, x = expected.shape[0] // 4, expected.shape[1] // 4
    assert np.abs(found[y :: 2 * y, x :: 2 * x] - expected[y :: 2 * y, x :: 2 * x].astype(int)).max() <= tolerance


def mpo(first, second):
    return as_bytes(first, "MPO", save_all=True, append_images=[second], quality=95)


LOSSLESS = {"gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "png": "PNG"}


@pytest.mark.parametrize("extension", LOSSLESS)
def test_lossless_formats_keep_every_pixel(extension):
    data = as_bytes(PICTURE, LOSSLESS[extension])
    assert (pixels(data, extension)[..., :3] == QUARTERS).all()
    with pytest.raises(UnreadableMedia, match=r"broken|not a PNG"):
        decode_image(data[: len(data) * 9 // 10], extension)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiff(compression):
    assert (pixels(as_bytes(PICTURE, "TIFF", compression=compression), "tiff") == QUARTERS).all()


def heic(image, **options):
    pytest.importorskip("pillow_heif").register_heif_opener()
    return as_bytes(image, "HEIF", quality=100, **options)


@pytest.mark.parametrize("extension", ["heic", "avif"])
def test_formats_of_phones(extension):
    """A rotation stored in the file's boxes is applied once: 90 degrees clockwise is numpy's rot90 by -1."""
    exif = Image.Exif()
    exif[0x0112] = 6
    make = {"heic": heic, "avif": lambda image, **options: as_bytes(image, "AVIF", quality=100, **options)}[extension]
    has_colours(make(PICTURE), extension, QUARTERS, 3)
    has_colours(make(PICTURE, exif=exif.tobytes()), extension, np.rot90(QUARTERS, -1), 3)
    with pytest.raises(UnreadableMedia, match=r"broken|not a PNG"):
        decode_image(make(PICTURE)[:-40], extension)


def test_the_reason_for_a_broken_heic_is_one_line():
    """The text of libheif ends with a line end."""
    with pytest.raises(UnreadableMedia, match="references data outside of file bounds") as error:
        decode_image(heic(PICTURE)[:-40], "heic")
    assert "\n" not in str(error.value)


def test_heic_without_its_package_is_one_line(monkeypatch):
    data = heic(PICTURE)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UserError, match=r"needs pillow-heif.*pip install 'megamm\[heic\]'"):
        decode_image(data, "heic")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "tiff", "png", "webp"])
def test_orientation_is_applied_once_in_every_format(extension, orientation):
    """Truth: numpy, from the table of the EXIF standard (which side row 0 and column 0 are)."""
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    kind, options = {"jpg": ("JPEG", {"quality": 100, "subsampling": 0}), "webp": ("WEBP", {"lossless": True})}.get(
        extension, (extension.upper(), {})
    )
    has_colours(as_bytes(PICTURE, kind, exif=exif, **options), extension, upright(QUARTERS), 3)


def test_of_several_pictures_the_first_is_read(tmp_path):
    """MPO (phones, stereo cameras) named .jpg, animations, and pages of a TIFF."""
    has_colours(mpo(PICTURE, OTHER), "jpg", QUARTERS, 3)
    several = {"save_all": True, "append_images": [OTHER.resize(PICTURE.size)]}
    for extension, kind in {"gif": "GIF", "tiff": "TIFF", "webp": "WEBP", "png": "PNG"}.items():
        lossless = {"lossless": True} if extension == "webp" else {}
        has_colours(as_bytes(PICTURE, kind, **several, **lossless), extension, QUARTERS, 0)
    (tmp_path / "a.jpg").write_bytes(mpo(PICTURE, OTHER))
    (report,) = build([tmp_path], tmp_path / "shards", BuildOptions(form="folder", heldout=0))
    shards = ShardFolder(tmp_path / "shards" / tmp_path.name / "train" / "image")
    assert report.train == 1 and shards.read(0) == mpo(PICTURE, OTHER)


RAMP = np.linspace(3000, 60000, 20 * 20).reshape(20, 20).astype(np.uint16)


def tiff(pixels_YX, bits=16, photometric=1, order="<", sample_format=1):
    """Return an uncompressed TIFF of one strip (TIFF 6.0); 12-bit samples are packed."""
    height, width = pixels_YX.shape
    if bits == 12:
        pairs = pixels_YX.reshape(-1, 2).astype(int)
        packed = [(a >> 4, (a & 15) << 4 | b >> 8, b & 255) for a, b in pairs.tolist()]
        data = bytes(value for triple in packed for value in triple)
    else:
        data = pixels_YX.astype(f"{order}{'f4' if bits == 32 else 'u2'}").tobytes()
    entries = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    entries += [(277, 3, 1), (278, 3, height), (279, 4, len(data)), (339, 3, sample_format)]
    ifd = struct.pack(f"{order}H", len(entries))
    for tag, kind, value in entries:
        ifd += struct.pack(f"{order}HHI", tag, kind, 1) + struct.pack(f"{order}{'H2x' if kind == 3 else 'I'}", value)
    return (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data)) + data + ifd + bytes(4)


SIXTEEN = {
    "png": lambda: (as_bytes(Image.fromarray(RAMP)), "png", RAMP >> 8),
    "tiff": lambda: (tiff(RAMP), "tiff", RAMP >> 8),
    "big-endian tiff": lambda: (tiff(RAMP, order=">"), "tiff", RAMP >> 8),
    "tiff whose zero is white": lambda: (tiff(RAMP, photometric=0), "tiff", 255 - (RAMP >> 8)),
    "tiff of 12 bits": lambda: (tiff(RAMP >> 4, bits=12), "tiff", RAMP >> 8),
}


@pytest.mark.parametrize("kind", SIXTEEN)
def test_sixteen_bit_grey_is_scaled_everywhere(kind):
    """The upper 8 bits, in the picture, in the rule for blank pictures and in the digest that finds duplicates."""
    data, extension, expected = SIXTEEN[kind]()
    assert (pixels(data, extension)[..., 0] == expected).all()
    check_image(data, extension, CurationOptions())
    other = as_bytes(Image.fromarray(RAMP.T.copy()))
    assert ImageModality.check_media(data, extension) != ImageModality.check_media(other, "png")
    with pytest.raises(ValueError, match="blank"):
        check_image(as_bytes(Image.fromarray(np.full((9, 9), 40000, np.uint16))), "png", CurationOptions())


def test_pixels_without_a_range_are_refused():
    for data in (tiff(RAMP / 60000, bits=32, sample_format=3), tiff(RAMP, sample_format=2)):
        with pytest.raises(UnreadableMedia, match="no defined range"):
            decode_image(data, "tiff")


def with_chunk(data, kind, content):
    """Return the PNG with a chunk after its header."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:33] + chunk + data[33:]


def test_transparent_grey_of_sixteen_bits():
    ramp = np.array([[1000, 1001]], dtype=np.uint16)  # the same upper bits: only one of them is transparent
    data = with_chunk(as_bytes(Image.fromarray(ramp)), b"tRNS", struct.pack(">H", 1001))
    assert pixels(data, "png")[0, :, 3].tolist() == [255, 0]


def linear(values):
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encoded(light):
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
P3_AS_SRGB = encoded(linear(COLOURS / 255) @ (np.linalg.inv(icc.to_xyz(icc.SRGB)) @ icc.to_xyz(icc.DISPLAY_P3)).T)
"""By the matrices of both spaces' primaries, white D65 (IEC 61966-2-1; SMPTE EG 432-1)."""
PROFILED = {"png": ("PNG", {}), "tiff": ("TIFF", {}), "webp": ("WEBP", {"lossless": True})}


@pytest.mark.parametrize("extension", PROFILED)
def test_display_p3_becomes_srgb(extension):
    kind, options = PROFILED[extension]
    profile = icc.rgb(icc.DISPLAY_P3)
    data = as_bytes(Image.fromarray(COLOURS), kind, icc_profile=profile, **options)
    assert np.abs(P3_AS_SRGB - COLOURS).max() > 40
    assert np.abs(pixels(data, extension) - P3_AS_SRGB).max() <= 1.5
    same = as_bytes(Image.fromarray(COLOURS), kind, icc_profile=icc.rgb(icc.SRGB), **options)
    assert np.abs(pixels(same, extension) - COLOURS).max() <= 1


def test_profile_of_pictures_with_alpha_palette_and_grey():
    profile = icc.rgb(icc.DISPLAY_P3)
    alpha = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image = Image.fromarray(np.dstack([COLOURS, alpha]))
    found = pixels(as_bytes(image, "PNG", icc_profile=profile), "png")
    assert np.abs(found[..., :3] - P3_AS_SRGB).max() <= 1.5 and (found[..., 3] == alpha).all()
    palette = Image.fromarray(COLOURS).quantize(64)
    found = pixels(as_bytes(palette, "PNG", icc_profile=profile), "png")
    same = as_bytes(palette.convert("RGB"), "PNG", icc_profile=profile)
    assert (found == pixels(same, "png")).all() and (found != np.asarray(palette.convert("RGB"))).any()
    # Light 128/255 of full: 188 in sRGB. Sixteen bits have the same profile.
    light = Image.new("L", (8, 8), 128)
    assert np.abs(pixels(as_bytes(light, "PNG", icc_profile=icc.grey(1.0)), "png") - encoded(128 / 255)).max() <= 1
    deep = Image.fromarray(np.full((8, 8), 0x8080, dtype=np.uint16))
    assert np.abs(pixels(as_bytes(deep, "PNG", icc_profile=icc.grey(1.0)), "png") - encoded(128 / 255)).max() <= 1
    # Grey pixels may have the profile of a colour picture: equal amounts stay grey (same white).
    assert np.abs(pixels(as_bytes(light, "PNG", icc_profile=profile), "png") - 128).max() <= 1


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("TIFF", "tiff")])
def test_cmyk_profile(kind, extension):
    """A printer whose cyan is a mid grey: L* = 50 is 119 in sRGB (CIE 15: Y = 0.1842)."""
    profile = icc.cmyk(lambda c, m, y, k: (0 if k else 50 if c else 100, 0, 0))
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    for inks, grey in (((255, 0, 0, 0), 119), ((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0)):
        image = Image.new("CMYK", (16, 16), inks)
        found = pixels(as_bytes(image, kind, icc_profile=profile, **options), extension)
        assert np.abs(found - grey).max() <= 2
        assert np.abs(pixels(as_bytes(image, kind, **options), extension) - np.asarray(image.convert("RGB"))).max() <= 2


def test_lab_tiff():
    """L* = 50 without chroma (128 in Pillow) is 119 in sRGB."""
    assert np.abs(pixels(as_bytes(Image.new("LAB", (8, 8), (128, 128, 128)), "TIFF"), "tiff") - 119).max() <= 1


def test_gamma_chunk_of_png():
    """gAMA 1.0 stores light itself; without effect beside sRGB's own value, an sRGB chunk or a profile."""
    data = as_bytes(Image.new("RGB", (8, 8), (128, 128, 128)))
    assert np.abs(pixels(with_chunk(data, b"gAMA", struct.pack(">I", 100000)), "png") - encoded(128 / 255)).max() <= 1
    assert (pixels(with_chunk(data, b"gAMA", struct.pack(">I", 45455)), "png") == 128).all()
    both = with_chunk(with_chunk(data, b"gAMA", struct.pack(">I", 100000)), b"sRGB", b"\0")
    assert (pixels(both, "png") == 128).all()


def test_unusable_colours_are_refused_with_the_fix():
    rgb, cmyk = Image.fromarray(COLOURS), Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    with pytest.raises(UnreadableMedia, match="profile is for CMYK pixels, but it has RGB pixels: save the picture"):
        decode_image(as_bytes(rgb, "PNG", icc_profile=icc.cmyk(lambda *_: (50, 0, 0))), "png")
    with pytest.raises(UnreadableMedia, match="profile is for RGB pixels, but it has CMYK pixels"):
        decode_image(as_bytes(cmyk, "TIFF", icc_profile=icc.rgb(icc.SRGB)), "tiff")
    with pytest.raises(UnreadableMedia, match="ICC profile is broken"):
        decode_image(as_bytes(rgb, "PNG", icc_profile=icc.rgb(icc.SRGB)[:100]), "png")
    hdr = with_chunk(as_bytes(rgb), b"cICP", bytes([9, 16, 0, 1]))  # BT.2020, PQ
    with pytest.raises(UnreadableMedia, match="primaries 9, transfer 16"):
        decode_image(hdr, "png")
    for data, extension in ((heic(rgb), "heic"), (as_bytes(rgb, "AVIF"), "avif")):
        # The box of code points, with primaries of Display P3 instead.
        at = data.index(b"colrnclx") + 8
        with pytest.raises(UnreadableMedia, match="primaries 12"):
            decode_image(data[:at] + b"\0\x0c" + data[at + 2 :], extension)


def test_a_tiff_of_16_bits_in_separate_planes_is_not_read_as_8_bits():
    """Written by hand after TIFF 6.0: three strips, one for each colour. Pillow reads it as noise, without an error."""
    planes = b"".join((QUARTERS[..., c].astype("<u2") * 257).tobytes() for c in range(3))
    size, entries = len(planes) // 3, []
    extra = struct.pack("<3H", 16, 16, 16) + struct.pack("<6I", *(300 + c * size for c in range(3)), *[size] * 3)
    for tag, kind, count, value in (
        (256, 3, 1, 64),
        (257, 3, 1, 48),
        (258, 3, 3, 200),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 3, 206),
        (277, 3, 1, 3),
        (278, 3, 1, 48),
        (279, 4, 3, 218),
        (284, 3, 1, 2),
    ):
        entries.append(struct.pack("<HHII", tag, kind, count, value))
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    data = (head.ljust(200, b"\0") + extra).ljust(300, b"\0") + planes
    with pytest.raises(UnreadableMedia, match="16-bit colours in separate planes are not supported"):
        decode_image(data, "tiff")
