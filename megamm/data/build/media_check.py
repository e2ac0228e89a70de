"""Checks one raw sample for the shards: masks texts, decodes every medium and applies the curation rules.

In: a `RawSample`. Out: for each part its unchanged bytes, and the SHA-256 of the decoded content. Drawings (SVG) are
rendered as PNG, on white, with a longer side of `image_size` pixels. Runs in worker processes. Raw files may be
hostile: a drawing is parsed and rewritten without external references (files, addresses, entities) before it is drawn
by resvg, which limits its nodes; text is drawn with the system's fonts.
"""

import io
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import resvg_py
from PIL import Image

from megamm.common.errors import UnreadableMedia
from megamm.data.build.curation import (
    MEDIA_CHECKS,
    CurationOptions,
    FilteredOut,
    Signature,
    check_text,
    mask,
    signature,
)
from megamm.data.raw.extensions import ALIASES
from megamm.data.raw.samples import Missing, RawPart, RawSample
from megamm.modalities.protocol import Modality

MAX_BYTES = {"image": 64 * 2**20, "video": 2**30}
MAX_OTHER_BYTES = 256 * 2**20
MAX_SVG_BYTES = 16 * 2**20
MAX_SVG_DEPTH = 100
"""Maximum nesting: drawings nest some ten deep; the recursive renderer would overflow its stack at thousands."""
_EMBEDDED = ("#", "data:image/png", "data:image/jpeg", "data:image/jpg", "data:image/gif", "data:image/webp")


@dataclass(frozen=True)
class MediaChecks:
    """Settings for a worker: folder of the media, pixels of a drawing's longer side, the rules, and the registry."""

    root: Path
    image_size: int
    curation: CurationOptions
    may_miss: frozenset[str]
    """Modalities without which a sample is still used."""
    modalities: Mapping[str, type[Modality]]


@dataclass(frozen=True)
class CheckedPart:
    """Bytes for the shard with their extension, and the digest of the decoded content."""

    modality: str
    ext: str
    data: bytes
    digest: str


@dataclass(frozen=True)
class CheckedSample:
    """The parts in the sample's order; the signature of its text for comparison; masked personal data by kind."""

    parts: tuple[CheckedPart, ...]
    sketch: Signature | None = None
    masked: Counter[str] = field(default_factory=Counter)
    missing: tuple[Missing, ...] = ()


@dataclass(frozen=True)
class SkippedSample:
    """A skipped sample: the rule ("broken": unreadable), the part or sample, and the reason."""

    rule: str
    what: str
    reason: str


def check_sample(sample: RawSample, checks: MediaChecks) -> CheckedSample | SkippedSample:
    """Check a sample; returns what to store of it, or why it is skipped.

    It is kept as a whole or not at all, except for parts of modalities that may be missing.
    """
    parts: list[CheckedPart] = []
    texts, masked, what = [], Counter[str](), sample.key
    missing = list(sample.missing)
    try:
        for number, part in enumerate(sample.parts):
            what = sample.key if part.modality == "text" else part.content
            try:
                checked, found = _checked_part(part, checks)
            except UnreadableMedia as error:
                # The last part cannot be missing.
                if part.modality not in checks.may_miss or len(parts) + len(sample.parts) - number == 1:
                    raise
                missing.append(Missing(part.modality, str(error)))
                continue
            masked += found
            parts.append(checked)
            if part.modality == "text":
                texts.append(checked.data.decode())
        # The rules for texts apply to all texts of a document together.
        what, whole = sample.key, "\n".join(texts)
        if texts:
            check_text(whole, checks.curation)
    except UnreadableMedia as error:
        return SkippedSample("broken", what, str(error))
    except FilteredOut as error:
        return SkippedSample(error.rule, what, str(error))
    # Only documents are compared: a long caption may belong to many media.
    compared = checks.curation.near_duplicates > 0 and (sample.ordered or len(texts) == len(parts))
    return CheckedSample(tuple(parts), signature(whole) if compared else None, masked, tuple(missing))


def _checked_part(part: RawPart, checks: MediaChecks) -> tuple[CheckedPart, Counter[str]]:
    """A part for the shards, and the personal data masked in it. Raises UnreadableMedia or FilteredOut."""
    found = Counter[str]()
    if part.modality == "text":
        text, found = mask(part.content) if checks.curation.mask_pii else (part.content, found)
        data, ext = text.encode(), checks.modalities["text"].extensions[0]
    else:
        data, ext = _medium(part, checks)
    # The digest is of the decoded content, so it identifies a picture whatever its file format or metadata.
    digest = checks.modalities[part.modality].check_media(data, ext)
    if part.modality in MEDIA_CHECKS:
        MEDIA_CHECKS[part.modality](data, ext, checks.curation)
    return CheckedPart(part.modality, ext, data, digest), found


def _medium(part: RawPart, checks: MediaChecks) -> tuple[bytes, str]:
    """The bytes of a media part in a format of its modality, and the extension."""
    # The name decides the format; `check_media` refuses content of another one.
    suffix = Path(part.content).suffix.lower().lstrip(".")
    ext, known = ALIASES.get(suffix, suffix), checks.modalities[part.modality].extensions
    is_drawing = part.modality == "image" and ext == "svg"
    if ext not in known and not is_drawing:
        others = ("svg", *known) if part.modality == "image" else known
        raise UnreadableMedia(f"extension {suffix!r} is not one of {', '.join(others)}")
    limit = MAX_SVG_BYTES if is_drawing else MAX_BYTES.get(part.modality, MAX_OTHER_BYTES)
    data = _read(part, checks.root, limit)
    return (render_svg(data, checks.image_size), "png") if is_drawing else (data, ext)


def _read(part: RawPart, root: Path, limit: int) -> bytes:
    """Read the medium. Raises UnreadableMedia if it is too large, truncated or not a regular file, such as a pipe."""
    path, offset = (part.byte_range.file, part.byte_range.offset) if part.byte_range else (root / part.content, 0)
    try:
        # O_NONBLOCK: opening a pipe must not wait for a writer. The type is checked on the open file, not on its path,
        # which could be replaced in between.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UnreadableMedia("not a regular file")
            file.seek(offset)
            # One byte more than the limit shows that the file is larger, whatever its size.
            data = file.read(min(limit + 1, part.byte_range.size if part.byte_range else limit + 1))
    except OSError as error:
        raise UnreadableMedia(error.strerror or "cannot be read") from error
    if len(data) > limit:
        raise UnreadableMedia(f"larger than {limit >> 20} MiB")
    if part.byte_range and len(data) < part.byte_range.size:
        raise UnreadableMedia("truncated")
    return data


def render_svg(data: bytes, size: int) -> bytes:
    """Render an SVG as an RGB PNG on white, fitted into size x size pixels. Raises UnreadableMedia if it fails."""
    drawing = _self_contained(data)
    # Loading the system's fonts is slow; drawings without text do not need them.
    has_text = "text>" in drawing
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=drawing, width=size, height=size, dpi=96, background="white", skip_system_fonts=not has_text
        )
        image = Image.open(io.BytesIO(png)).convert("RGB")
    except (ValueError, OSError) as error:
        raise UnreadableMedia(f"cannot be drawn: {error}") from error
    # White only: nothing was drawn, or everything outside the picture.
    if image.getextrema() == ((255, 255),) * 3:
        raise UnreadableMedia("the drawing is blank")
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


class _LimitedTree(ElementTree.TreeBuilder):
    """Builds the tree of a drawing; raises UnreadableMedia if it is nested too deep."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0

    def start(self, tag: str, attributes: dict[str, str], /) -> ElementTree.Element:  # type: ignore[override]
        self.depth += 1
        if self.depth > MAX_SVG_DEPTH:
            raise UnreadableMedia(f"nested more than {MAX_SVG_DEPTH} levels deep")
        return super().start(tag, attributes)

    def end(self, tag: str, /) -> ElementTree.Element:
        self.depth -= 1
        return super().end(tag)


def _self_contained(data: bytes) -> str:
    """The drawing without its document type, and without references to anything outside it."""
    # The tree is written again without a document type, so entities defined in it do not reach the renderer.
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
            # xlink:href and href: local references and embedded pictures stay, files and addresses go.
            if name.rpartition("}")[2] == "href" and not value.strip().startswith(_EMBEDDED):
                del element.attrib[name]
    return ElementTree.tostring(root, encoding="unicode")
