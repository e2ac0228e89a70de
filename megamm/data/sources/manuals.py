"""Pages of manuals, GNOME and GIMP, as interleaved text and pictures in reading order, English.

In: the unpacked Debian packages `gnome-user-docs`, Mallard XML (projectmallard.org/1.0) under usr/share/help/C, and
`gimp-help-en`, XHTML made from DocBook. Out: one interleaved sample per page, with its figures (PNG unchanged, SVG to
be rendered by the build). A `Markup` defines the meaning of elements in each of the two forms. Text between two
pictures is one part, with paragraphs separated by an empty line; an element without block elements inside is a
paragraph. The caption of a picture follows it as text.

GNOME: of the variants for different desktops and devices only those for an ordinary screen are kept. Inline icons are
replaced by their alternative text. GIMP: navigation, tables of contents and the numbers of sections and figures are
removed.
"""

import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from megamm.common.errors import UserError
from megamm.data.raw.samples import RawPart, RawSample, fit_key, normalise_noun

logger = logging.getLogger(__name__)

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".svg")


@dataclass(frozen=True)
class Markup:
    """Meaning of elements, by local name; picture returns a file's name or None; skip drops an element."""

    blocks: frozenset[str]
    paragraphs: frozenset[str]
    """Blocks whose whole content is one paragraph."""
    items: frozenset[str]
    verbatim: frozenset[str]
    joined: dict[str, str]
    """Elements whose children are joined by a text, such as the keys of a shortcut by "+"."""
    picture: Callable[[Element], str | None]
    skip: Callable[[Element], bool]
    clean: Callable[[str], str] = str
    """Cleans a paragraph, for example by removing section numbers."""


@dataclass
class Pictures:
    """Copies pictures from below `root` into target/images, each once, under names made from their paths."""

    root: Path
    target: Path
    copied: dict[Path, str] = field(default_factory=dict)

    def add(self, page: Path, name: str) -> str | None:
        """The path of the copy relative to the target; None if the page names no picture file under the root."""
        source = (page.parent / name).resolve()
        root = self.root.resolve()
        # A page must not copy files from outside the manual, such as /etc/passwd by `../..`.
        if not source.is_relative_to(root) or source.suffix.lower() not in PICTURES or not source.is_file():
            return None
        if source not in self.copied:
            copy = "images/" + "-".join(source.relative_to(root).parts)
            (self.target / "images").mkdir(exist_ok=True)
            shutil.copyfile(source, self.target / copy)
            self.copied[source] = copy
        return self.copied[source]


def parsed(files: Iterable[Path]) -> Iterator[tuple[Path, Element]]:
    """Every file with its root element; files that are not XML are logged and skipped."""
    for file in files:
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            logger.warning("%s skipped: %s", file, error)
            continue
        yield file, root


def page_parts(page: Path, body: Element, markup: Markup, pictures: Pictures) -> tuple[RawPart, ...]:
    """The parts of one page, texts and pictures in reading order; adjacent texts are one part."""
    parts: list[RawPart] = []
    for kind, content in _walk(body, markup):
        if kind == "image":
            copy = pictures.add(page, content)
            if copy is not None:
                parts.append(RawPart("image", copy))
        elif parts and parts[-1].modality == "text":
            parts[-1] = RawPart("text", f"{parts[-1].content}\n\n{content}")
        else:
            parts.append(RawPart("text", content))
    return tuple(parts)


def local_name(element: Element) -> str:
    """The name without its namespace; "" for comments and processing instructions."""
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def inline_text(element: Element, markup: Markup) -> str:
    """The words of an element and its descendants, with white space collapsed."""
    return " ".join(_inline(element, markup).split())


def _inline(element: Element, markup: Markup) -> str:
    """The text of an element with its white space, as the source has it."""
    if not local_name(element) or markup.skip(element):
        return ""
    # The white space between joined elements, such as keys, is layout of the source.
    joint = markup.joined.get(local_name(element))
    if joint is not None:
        return joint.join(_inline(child, markup).strip() for child in element)
    return (element.text or "") + "".join(_inline(child, markup) + (child.tail or "") for child in element)


def _walk(element: Element, markup: Markup) -> list[tuple[str, str]]:
    """("text" or "image", content) of an element in reading order."""
    if not local_name(element) or markup.skip(element):
        return []
    name = markup.picture(element)
    found = [("image", name)] if name is not None else []
    if local_name(element) in markup.verbatim:
        return [*found, *_paragraph("".join(element.itertext()).strip("\n"))]
    run = element.text or ""  # text and inline elements up to the next block
    for child in element:
        # Inline elements, and anything inside a paragraph, continue the current run of text.
        if local_name(element) in markup.paragraphs or not _is_block(child, markup):
            run += _inline(child, markup)
        else:
            found += _paragraph(markup.clean(" ".join(run.split()))) + _walk(child, markup)
            run = ""
        run += child.tail or ""
    found += _paragraph(markup.clean(" ".join(run.split())))
    if local_name(element) in markup.items:
        # A list item gets its dash before its first text, which may follow a picture.
        first = next((n for n, (kind, _) in enumerate(found) if kind == "text"), None)
        if first is not None:
            found[first] = ("text", f"- {found[first][1]}")
    return found


def _paragraph(text: str) -> list[tuple[str, str]]:
    return [("text", text)] if re.search(r"\w", text) else []


def _is_block(element: Element, markup: Markup) -> bool:
    """Whether the element is a block, or contains one."""
    blocks = markup.blocks | markup.paragraphs
    return any(local_name(inner) in blocks for inner in element.iter())


# GNOME: Mallard XML
_NAMESPACE = "{http://projectmallard.org/1.0/}"
_TEST = "{http://projectmallard.org/if/1.0/}test"
_GNOME_SKIPPED = {"info", "links", "comment", "desc", "else"}
_GNOME_BLOCKS = "section list steps item note media table tr td screen code terms example choose when"


def write_gnome(package: Path, target: Path) -> list[RawSample]:
    """Copy the figures under target/images and return the pages in order of paths."""
    root = package / "usr/share/help/C"
    files = sorted(root.rglob("*.page"))
    if not files:
        raise UserError("no pages in the package", where=root, remedy="use Debian 12")
    pictures, samples = Pictures(root, target), []
    for file, page in parsed(files):
        title = page.find(f"{_NAMESPACE}title")
        parts = page_parts(file, page, _GNOME, pictures)
        if title is not None and parts:
            key = fit_key("-".join(("gnome", *file.relative_to(root).with_suffix("").parts)))
            samples.append(RawSample(key, normalise_noun(inline_text(title, _GNOME)), parts, ordered=True))
    return samples


def is_shown(test: str) -> bool:
    """Whether a condition holds on an ordinary screen: every term (`,` means and) is a negation."""
    return all(term.strip().startswith("!") for term in test.split(","))


def _is_skipped_in_gnome(element: Element) -> bool:
    test = element.get("test" if local_name(element) == "when" else _TEST)
    return local_name(element) in _GNOME_SKIPPED or (test is not None and not is_shown(test))


def _gnome_picture(element: Element) -> str | None:
    return element.get("src") if local_name(element) == "media" and element.get("type", "image") == "image" else None


_GNOME = Markup(
    blocks=frozenset(_GNOME_BLOCKS.split()),
    paragraphs=frozenset({"p", "title", "subtitle"}),
    items=frozenset({"item"}),
    verbatim=frozenset({"screen"}),
    joined={"keyseq": "+", "guiseq": " > "},
    picture=_gnome_picture,
    skip=_is_skipped_in_gnome,
)


# GIMP: XHTML from DocBook
_NUMBER = re.compile(r"^(?:(?:Chapter|Figure|Table|Part|Appendix) [\dIVXA-Z]+(?:\.\d+)*\.\s+|\d+(?:\.\d+)*\.\s+)")
_NAVIGATION = {"navheader", "navfooter", "toc", "list-of-figures", "list-of-tables"}
_LEAST_TEXT = 200
"""Minimum characters; shorter pages only list other pages."""
_GIMP_BLOCKS = "pre li dt dd div ul ol dl table tr td th blockquote"


def write_gimp(package: Path, target: Path) -> list[RawSample]:
    """Copy the pictures under target/images and return the pages in order of names, without pages of little text."""
    root = package / "usr/share/gimp/2.0/help/en"
    files = sorted(root.glob("*.html"))
    if not files:
        raise UserError("no pages in the package", where=root, remedy="use Debian 12")
    pictures, samples = Pictures(root, target), []
    for file, page in parsed(files):
        body = next(element for element in page.iter() if local_name(element) == "body")
        parts = page_parts(file, body, _GIMP, pictures)
        title = next((part.content.partition("\n")[0] for part in parts if part.modality == "text"), "")
        if title and sum(len(part.content) for part in parts if part.modality == "text") >= _LEAST_TEXT:
            key = fit_key(f"gimp-{file.stem}")
            samples.append(RawSample(key, normalise_noun(title), parts, ordered=True))
    return samples


def _is_skipped_in_gimp(element: Element) -> bool:
    return bool(_NAVIGATION & set(element.get("class", "").split())) or local_name(element) in ("head", "script")


def _gimp_picture(element: Element) -> str | None:
    """The picture of a media object; inline icons of notes and buttons do not count."""
    if local_name(element) != "div" or "mediaobject" not in element.get("class", "").split():
        return None
    return next((inner.get("src") for inner in element.iter() if local_name(inner) == "img"), None)


_GIMP = Markup(
    blocks=frozenset(_GIMP_BLOCKS.split()),
    paragraphs=frozenset({"p", "h1", "h2", "h3", "h4", "h5", "h6"}),
    items=frozenset({"li"}),
    verbatim=frozenset({"pre"}),
    joined={},
    picture=_gimp_picture,
    skip=_is_skipped_in_gimp,
    clean=lambda text: _NUMBER.sub("", text),
)
