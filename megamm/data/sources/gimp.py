"""Pages of the manual of GIMP, the image editor: interleaved text and pictures, English.

In: the unpacked Debian package `gimp-help-en`, XHTML made from DocBook. Out: one interleaved sample per page with its
screenshots and example pictures; without navigation, tables of contents, and section and figure numbers.
"""

import re
from pathlib import Path
from xml.etree.ElementTree import Element

from megamm.common.errors import UserError
from megamm.data.raw.nouns import normalise_noun
from megamm.data.raw.samples import RawSample, fit_key
from megamm.data.sources.pages import Markup, Pictures, local_name, page_parts, parsed

_NUMBER = re.compile(r"^(?:(?:Chapter|Figure|Table|Part|Appendix) [\dIVXA-Z]+(?:\.\d+)*\.\s+|\d+(?:\.\d+)*\.\s+)")
_NAVIGATION = {"navheader", "navfooter", "toc", "list-of-figures", "list-of-tables"}
_LEAST_TEXT = 200
"""Minimum characters; shorter pages only list other pages."""
_BLOCKS = "pre li dt dd div ul ol dl table tr td th blockquote"


def write_gimp(package: Path, target: Path) -> list[RawSample]:
    """Copy the pictures under target/images and return the pages in order of names, without pages of little text."""
    root = package / "usr/share/gimp/2.0/help/en"
    files = sorted(root.glob("*.html"))
    if not files:
        raise UserError("no pages in the package", where=root, remedy="use Debian 12")
    pictures, samples = Pictures(root, target), []
    for file, page in parsed(files):
        body = next(element for element in page.iter() if local_name(element) == "body")
        parts = page_parts(file, body, MARKUP, pictures)
        title = next((part.content.partition("\n")[0] for part in parts if part.modality == "text"), "")
        if title and sum(len(part.content) for part in parts if part.modality == "text") >= _LEAST_TEXT:
            key = fit_key(f"gimp-{file.stem}")
            samples.append(RawSample(key, normalise_noun(title), parts, ordered=True))
    return samples


def _skip(element: Element) -> bool:
    return bool(_NAVIGATION & set(element.get("class", "").split())) or local_name(element) in ("head", "script")


def _picture(element: Element) -> str | None:
    """The picture of a media object; inline icons of notes and buttons do not count."""
    if local_name(element) != "div" or "mediaobject" not in element.get("class", "").split():
        return None
    return next((inner.get("src") for inner in element.iter() if local_name(inner) == "img"), None)


MARKUP = Markup(
    blocks=frozenset(_BLOCKS.split()),
    paragraphs=frozenset({"p", "h1", "h2", "h3", "h4", "h5", "h6"}),
    items=frozenset({"li"}),
    verbatim=frozenset({"pre"}),
    joined={},
    picture=_picture,
    skip=_skip,
    clean=lambda text: _NUMBER.sub("", text),
)
