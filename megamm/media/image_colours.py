"""Colours of decoded pictures: any Pillow mode, bit depth and ICC profile -> 8-bit sRGB, with alpha if transparent.

The embedded profile is applied by LittleCMS (Pillow's ImageCms), with perceptual intent. A PNG without a profile whose
gAMA chunk says another gamma than sRGB's is converted by that. CMYK without a profile is converted by Pillow's formula.
16-bit grey keeps its upper 8 bits, as 16-bit colours do in Pillow. What has no defined range or does not match its
profile is refused.
"""

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from megamm.common.errors import UnreadableMedia

_MODE_OF_PROFILE = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
"""Colour space of an ICC profile -> Pillow's mode of such pixels."""
_SRGB_GAMMA = 0.45455
"""gAMA of an sRGB picture (PNG specification, section 11.3.2)."""
_SRGB_LIKE, _HDR = (1, 2, 5, 6), (16, 18)
"""Code points of ITU-T H.273: primaries of BT.709, unspecified or BT.601; transfer functions PQ and HLG."""
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO, _PLANES, _SEPARATE = 258, 262, 0, 284, 2
"""Tags of TIFF, with a value of the second and of the third."""


def check_code_points(data: bytes, extension: str) -> None:
    """Refuse wide-gamut and HDR colours that a file declares by code points instead of an ICC profile.

    Pillow and its plugins do not convert these. HEIC and AVIF have them in a box, PNG in a chunk.
    """
    marker, width = (b"cICP", 1) if extension == "png" else (b"colrnclx", 2)
    start = data[: data.find(b"IDAT")].find(marker) if extension == "png" else data.find(marker)
    if extension not in ("png", "heic", "avif") or start < 0:
        return
    codes = data[start + len(marker) :]
    primaries, transfer = (int.from_bytes(codes[i * width : (i + 1) * width], "big") for i in range(2))
    if primaries not in _SRGB_LIKE or transfer in _HDR:
        what = f"colours of another kind than sRGB (H.273 primaries {primaries}, transfer {transfer})"
        raise UnreadableMedia(f"{what}: save the picture again as sRGB, or with an ICC profile")


def to_srgb(image: Image.Image) -> Image.Image:
    """A loaded picture in mode RGB, or RGBA if it has transparency. Raises UnreadableMedia if its colours are unknown.

    image: as opened by Pillow, so that the tags of its format are still there.
    """
    profile, gamma = image.info.get("icc_profile"), image.info.get("gamma")
    is_srgb = "srgb" in image.info  # PNG's sRGB chunk, which replaces gAMA
    image = eight_bits(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    image = _without_alpha(image)
    if profile:
        image = _apply_profile(image, profile)
    elif image.mode == "LAB":
        image = _transformed(image, _Transforms.of_lab())
    elif gamma and not is_srgb and abs(gamma / _SRGB_GAMMA - 1) > 0.05:
        image = image.point(_srgb_of_gamma(gamma) * len(image.getbands()))
    image = image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
    return image


def eight_bits(image: Image.Image) -> Image.Image:
    """The picture with 8 bits per channel; 16-bit grey is scaled, which Pillow would clip at 255."""
    if image.mode in ("I", "F"):
        raise UnreadableMedia("32-bit, signed or floating-point pixels have no defined range: convert it to 8 bits")
    tags: Any = getattr(image, "tag_v2", {})
    # Pillow decodes such planes as if they had 8 bits, without an error.
    if tags.get(_PLANES) == _SEPARATE and max(tags.get(_BITS_PER_SAMPLE, (8,))) > 8:
        raise UnreadableMedia("16-bit colours in separate planes are not supported: save it with 8 bits or interleaved")
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.uint16)
    bits = max(tags.get(_BITS_PER_SAMPLE, (16,)))
    grey = (values >> (bits - 8)).astype(np.uint8)
    # Pillow inverts pictures whose zero is white only up to 8 bits.
    grey = 255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey
    small = Image.fromarray(grey)
    if (transparent := image.info.get("transparency")) is not None:  # all 16 bits are compared
        small.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return small


def _without_alpha(image: Image.Image) -> Image.Image:
    """The colours alone, in mode L, RGB, CMYK or LAB."""
    if image.mode in ("L", "CMYK", "LAB"):
        return image
    if image.mode in ("1", "LA", "La"):
        return image.convert("LA" if image.mode == "La" else image.mode).convert("L")
    # Through RGBA: it resolves palettes with transparent entries, and premultiplied colours.
    return image.convert("RGBA").convert("RGB") if image.mode != "RGB" else image


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """The picture in sRGB, by its ICC profile."""
    try:
        space = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise UnreadableMedia("its ICC profile is broken: save the picture again as sRGB, without a profile") from error
    if image.mode == "L" and space == "RGB":  # grey pixels of a colour picture: allowed, and common
        image = image.convert("RGB")
    if _MODE_OF_PROFILE.get(space) != image.mode:
        what = f"its ICC profile is for {space} pixels, but it has {image.mode} pixels"
        raise UnreadableMedia(f"{what}: save the picture again as sRGB, without a profile")
    try:
        return _transformed(image, _Transforms.of_profile(profile, image.mode))
    except (ImageCms.PyCMSError, ValueError) as error:
        raise UnreadableMedia(f"its ICC profile cannot be applied: {error}".rstrip(": ")) from error


def _transformed(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    changed = ImageCms.applyTransform(image, transform)
    assert changed is not None, "not in place"
    return changed


class _Transforms:
    """Transforms to sRGB; those of the last profiles are kept, as most pictures of a source share a few."""

    @staticmethod
    @lru_cache(maxsize=16)
    def of_profile(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
        """Return the transform of pixels of this mode with this profile."""
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")

    @staticmethod
    @lru_cache(maxsize=1)
    def of_lab() -> ImageCms.ImageCmsTransform:
        """Return the transform of CIE L*a*b* (D50)."""
        return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def _srgb_of_gamma(gamma: float) -> list[int]:
    """The sRGB value of each 8-bit sample that stores light ** gamma (PNG specification, section 13.13)."""
    light = (np.arange(256) / 255) ** (1 / gamma)
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    return np.rint(255 * srgb).astype(int).tolist()
