"""Pages of the GNOME desktop's manuals: interleaved text and pictures, English.

In: the unpacked Debian package `gnome-user-docs`, Mallard XML (projectmallard.org/1.0) under usr/share/help/C. Out:
one interleaved sample per page, with its figures (PNG unchanged, SVG to be rendered by the build). Of the variants for
different desktops and devices only those for an ordinary screen are kept. Inline icons are replaced by their
alternative text.
"""

from pathlib import Path
from xml.etree.ElementTree import Element

from megamm.common.errors import UserError
from megamm.data.raw.nouns import normalise_noun
from megamm.data.raw.samples import RawSample, fit_key
from megamm.data.sources.pages import Markup, Pictures, inline_text, local_name, page_parts, parsed

_NAMESPACE = "{http://projectmallard.org/1.0/}"
_TEST = "{http://projectmallard.org/if/1.0/}test"
_SKIPPED = {"info", "links", "comment", "desc", "else"}
_BLOCKS = "section list steps item note media table tr td screen code terms example choose when"


def write_gnome(package: Path, target: Path) -> list[RawSample]:
    """Copy the figures under target/images and return the pages in order of paths."""
    root = package / "usr/share/help/C"
    files = sorted(root.rglob("*.page"))
    if not files:
        raise UserError("no pages in the package", where=root, remedy="use Debian 12")
    pictures, samples = Pictures(root, target), []
    for file, page in parsed(files):
        title = page.find(f"{_NAMESPACE}title")
        parts = page_parts(file, page, MARKUP, pictures)
        if title is not None and parts:
            key = fit_key("-".join(("gnome", *file.relative_to(root).with_suffix("").parts)))
            samples.append(RawSample(key, normalise_noun(inline_text(title, MARKUP)), parts, ordered=True))
    return samples


def is_shown(test: str) -> bool:
    """Whether a condition holds on an ordinary screen: every term (`,` means and) is a negation."""
    return all(term.strip().startswith("!") for term in test.split(","))


def _skip(element: Element) -> bool:
    test = element.get("test" if local_name(element) == "when" else _TEST)
    return local_name(element) in _SKIPPED or (test is not None and not is_shown(test))


def _picture(element: Element) -> str | None:
    return element.get("src") if local_name(element) == "media" and element.get("type", "image") == "image" else None


MARKUP = Markup(
    blocks=frozenset(_BLOCKS.split()),
    paragraphs=frozenset({"p", "title", "subtitle"}),
    items=frozenset({"item"}),
    verbatim=frozenset({"screen"}),
    joined={"keyseq": "+", "guiseq": " > "},
    picture=_picture,
    skip=_skip,
)
