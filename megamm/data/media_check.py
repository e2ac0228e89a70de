"""One raw image file to what is stored in a shard: checked by decoding every pixel; drawings (SVG) are rendered.

In: a path. Out: PNG, JPEG or WebP bytes as they were, or the PNG of a drawing, on white, its longer side `size`
pixels; and the SHA-256 of the pixels. Raw files may be hostile: a drawing is parsed and written anew without
anything that refers out of it (files, addresses, entities) before resvg, which limits its nodes, draws it; text
is drawn with the system's fonts.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import resvg_py
from PIL import Image

from megamm.modalities import REGISTRY
from megamm.modalities.base import UnreadableMedia

MAX_BYTES = 64 * 2**20
MAX_SVG_BYTES = 16 * 2**20
MAX_SVG_DEPTH = 100
"""Drawings nest some ten deep; the renderer recurses, and would overflow its stack at thousands."""
_EXTENSIONS = {"png": "png", "jpg": "jpg", "jpeg": "jpg", "webp": "webp"}
_EMBEDDED = ("#", "data:image/png", "data:image/jpeg", "data:image/jpg", "data:image/gif", "data:image/webp")


@dataclass(frozen=True)
class CheckedImage:
    """Bytes for the shard with their extension, and the digest of the decoded pixels."""

    data: bytes
    ext: str
    digest: str


def check_image(path: Path, size: int) -> CheckedImage | str:
    """The image to store, or in words why it cannot be used. size: pixels of a rendered drawing's longer side."""
    try:
        ext = path.suffix.lower().lstrip(".")
        data = _read(path, MAX_SVG_BYTES if ext == "svg" else MAX_BYTES)
        if ext == "svg":
            data, ext = render_svg(data, size), "png"
        if ext not in _EXTENSIONS:
            raise UnreadableMedia(f"ending {ext!r} is not one of svg, {', '.join(_EXTENSIONS)}")
        REGISTRY["image"].check_media(data, _EXTENSIONS[ext])
    except UnreadableMedia as error:
        return str(error)
    with Image.open(io.BytesIO(data)) as image:
        digest = hashlib.sha256(repr(image.size).encode() + image.convert("RGBA").tobytes()).hexdigest()
    return CheckedImage(data, _EXTENSIONS[ext], digest)


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UnreadableMedia(error.strerror or "cannot be read") from error
    if len(data) > limit:
        raise UnreadableMedia(f"larger than {limit >> 20} MiB")
    return data


def render_svg(data: bytes, size: int) -> bytes:
    """An SVG as an RGB PNG on white, fitted into size x size pixels. UnreadableMedia if it is broken or blank."""
    drawing = _self_contained(data)
    has_text = "text>" in drawing
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=drawing, width=size, height=size, dpi=96, background="white", skip_system_fonts=not has_text
        )
        image = Image.open(io.BytesIO(png)).convert("RGB")
    except (ValueError, OSError) as error:
        raise UnreadableMedia(f"cannot be drawn: {error}") from error
    if image.getextrema() == ((255, 255),) * 3:
        raise UnreadableMedia("draws nothing")
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


class _LimitedTree(ElementTree.TreeBuilder):
    """Builds the tree of a drawing; UnreadableMedia if it nests too deep."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0

    def start(self, tag: str, attributes: dict[str, str], /) -> ElementTree.Element:  # type: ignore[override]
        self.depth += 1
        if self.depth > MAX_SVG_DEPTH:
            raise UnreadableMedia(f"nests more than {MAX_SVG_DEPTH} deep")
        return super().start(tag, attributes)

    def end(self, tag: str, /) -> ElementTree.Element:
        self.depth -= 1
        return super().end(tag)


def _self_contained(data: bytes) -> str:
    """The drawing without document type, and without references to anything outside it."""
    parser = ElementTree.XMLParser(target=_LimitedTree())
    try:
        parser.feed(data)
        root = parser.close()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        if isinstance(error, UnreadableMedia):
            raise
        raise UnreadableMedia(f"not an SVG drawing: {error}") from error
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            if name.rpartition("}")[2] == "href" and not value.strip().startswith(_EMBEDDED):
                del element.attrib[name]
    return ElementTree.tostring(root, encoding="unicode")
