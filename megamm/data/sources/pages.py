"""Converts pages of a manual, XHTML or Mallard XML, to interleaved text and pictures in reading order.

In: an XML tree and a `Markup` that defines the meaning of its elements. Out: parts for a `RawSample`. Text between two
pictures is one part, with paragraphs separated by an empty line; an element without block elements inside is a
paragraph. The caption of a picture follows it as text.
"""

import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from megamm.data.raw.samples import RawPart

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
    if not local_name(element) or markup.skip(element):
        return ""
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
        if local_name(element) in markup.paragraphs or not _is_block(child, markup):
            run += _inline(child, markup)
        else:
            found += _paragraph(markup.clean(" ".join(run.split()))) + _walk(child, markup)
            run = ""
        run += child.tail or ""
    found += _paragraph(markup.clean(" ".join(run.split())))
    if local_name(element) in markup.items:
        first = next((n for n, (kind, _) in enumerate(found) if kind == "text"), None)
        if first is not None:
            found[first] = ("text", f"- {found[first][1]}")
    return found


def _paragraph(text: str) -> list[tuple[str, str]]:
    return [("text", text)] if re.search(r"\w", text) else []


def _is_block(element: Element, markup: Markup) -> bool:
    blocks = markup.blocks | markup.paragraphs
    return any(local_name(inner) in blocks for inner in element.iter())
