"""Drawings with their titles or descriptions: the Open Clip Art Library, and the rubber stamps of Tux Paint.

`write_clipart`: public-domain drawings. In: the unpacked Debian package `openclipart-svg`. Out: its unchanged SVG files
(links skipped) with a caption from the RDF title. If one title names a whole collection or the author, the caption is
from the file's name, else from its folder. Drawings without any name and gradient swatches (definitions that draw
nothing) are skipped; the 1,375 star polygons drawn by a program ("gramastar") are thinned, otherwise they would be a
fifth of the data.

`write_tuxpaint`: stamps with a description, written and spoken. In: the unpacked Debian package
`tuxpaint-stamps-default`: X.png or X.svg, X.txt (first line English, then lines `LANGUAGE.utf8=TEXT`), X_desc.ogg
(spoken English) and X_desc_LANGUAGE.ogg. Out: a sample per stamp with picture, English description and speech; and one
per further spoken language, with its own text and speech and the same picture. Speech is stored unchanged (Vorbis),
drawings as SVG. All languages share the English noun, so no stamp is in both splits.
"""

import hashlib
import re
import shutil
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from megamm.common.errors import UserError
from megamm.data.raw.samples import RawPart, RawSample, clean_caption, fit_key, normalise_noun

_DC = "{http://purl.org/dc/elements/1.1/}"
_COLLECTION = 6
"""A title on more files than this is the name of a collection, not of a drawing."""
_COLLECTION_TITLE = re.compile(r"clipart by|theme|icon ?set|collection|submission|sibmission|cliparts|AIGA", re.I)
_STAR_SHARE = 25
_UNTELLING_FOLDERS = ("icons", "unsorted")
_SUITS = {"c": "clubs", "d": "diamonds", "h": "hearts", "s": "spades"}
_RANKS = {"a": "ace", "j": "jack", "q": "queen", "k": "king"}
_CONTEXT = {"flags": "flag of {}", "icons": "{} icon", "roadsigns": "{} road sign", "semaphore": "semaphore flag {}"}


def write_clipart(package: Path, target: Path) -> list[RawSample]:
    """Copy the SVGs under target/images and return their samples, in order of paths."""
    root = package / "usr/share/openclipart/svg"
    files = sorted(path for path in root.rglob("*.svg") if not path.is_symlink() and path.parent.name != "gradients")
    if not files:
        raise UserError("no drawings in the package", where=root, remedy="report your Debian release as an issue")
    metadata = {path: _title_and_author(path) for path in files}
    count = Counter(title for title, _ in metadata.values())
    samples = []
    (target / "images").mkdir()
    for path, (title, author) in metadata.items():
        name = path.relative_to(root).with_suffix("").as_posix()
        digest = hashlib.sha256(name.encode()).hexdigest()
        # By hash, so that the kept share does not depend on the order of files.
        if title == "gramastar" and int(digest, 16) % _STAR_SHARE:
            continue
        # The name of a collection or of the author does not describe the drawing.
        is_untelling = count[title] > _COLLECTION or _COLLECTION_TITLE.search(title) or title == author
        caption = clipart_caption(name, "" if is_untelling else title, author)
        if not caption:
            continue
        key = f"clipart-{re.sub(r'[^a-z0-9]+', '-', path.stem.lower()).strip('-')[:50]}-{digest[:8]}"
        shutil.copyfile(path, target / "images" / f"{key}.svg")
        parts = (RawPart("image", f"images/{key}.svg"), RawPart("text", caption))
        samples.append(RawSample(key, normalise_noun(caption), parts))
    return samples


def clipart_caption(name: str, title: str, author: str) -> str:
    """Lower-case caption from the path without extension, title ("" if unusable) and author; "" if none is usable."""
    *folders, stem = name.split("/")
    if "cards" in folders and (card := re.fullmatch(r"[a-z]+_([cdhs])_(\d+|[ajqk])", stem)):
        return f"{_RANKS.get(card[2], card[2])} of {_SUITS[card[1]]} playing card"
    if star := re.fullmatch(r"star_(\d+)pt\d+step", stem):
        return f"star with {star[1]} points"
    stem_words = _words(re.sub(r"([a-z])([A-Z])", r"\1 \2", stem), without=author)
    folder_words = "" if folders[-1] in _UNTELLING_FOLDERS else folders[-1].replace("_", " ")
    caption = _words(title) or stem_words or folder_words
    # "france" in the folder of flags becomes "flag of france", unless the caption says so already.
    for folder, form in _CONTEXT.items():
        if caption and folder in folders and form.format("").split()[0] not in caption.split():
            return form.format(caption)
    return caption


def _words(text: str, without: str = "") -> str:
    """Lower-case words of a title or file name, without numbers, codes and (truncated) words of the author's name."""
    text = re.sub(r"\([^)]*\)|[_\-+.#]|\d+|\b(?:bw|aiga)\b", " ", text.lower().replace("_", " "))
    # File names often start with the author's name, cut off after some letters.
    names = re.findall(r"\w+", without.lower())
    words = [w for w in text.split() if not any(name.startswith(w) for name in names)]
    return " ".join(words).strip(" ,;:") if any(len(re.sub(r"\W", "", w)) >= 3 for w in words) else ""


def _title_and_author(path: Path) -> tuple[str, str]:
    """RDF dc:title of the work and dc:title of its creator; "" if missing or the file is not XML."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError):
        return "", ""
    titles = [(element.text or "").strip() for element in root.iter(f"{_DC}title")]
    creators = [(t.text or "").strip() for c in root.iter(f"{_DC}creator") for t in c.iter(f"{_DC}title")]
    return (titles or [""])[0], (creators or [""])[0]


def write_tuxpaint(package: Path, target: Path) -> list[RawSample]:
    """Copy pictures and speech under target, and return the samples in order of paths and languages."""
    stamps = package / "usr/share/tuxpaint/stamps"
    files = sorted(stamps.rglob("*.txt"))
    if not files:
        raise UserError("no stamps in the package", where=stamps, remedy="use Debian 12")
    for folder in ("images", "audio"):
        (target / folder).mkdir()
    samples = []
    for file in files:
        picture = next((p for p in (file.with_suffix(".png"), file.with_suffix(".svg")) if p.is_file()), None)
        texts = read_descriptions(file.read_text(encoding="utf-8", errors="replace"))
        if picture is None or "en" not in texts:
            continue
        key = fit_key("tuxpaint-" + "-".join(file.relative_to(stamps).with_suffix("").parts))
        image = f"images/{key}{picture.suffix}"
        shutil.copyfile(picture, target / image)
        for language, text in texts.items():
            suffix = "" if language == "en" else f"_{language}"
            speech = file.with_name(f"{file.stem}_desc{suffix}.ogg")
            # Without speech a translation has nothing new but its text: the picture is in the English sample.
            if language != "en" and not speech.is_file():
                continue
            parts = [RawPart("image", image), RawPart("text", text)]
            if speech.is_file():
                parts.insert(1, RawPart("audio", f"audio/{key}{suffix}.ogg"))
                shutil.copyfile(speech, target / parts[1].content)
            samples.append(RawSample(f"{key}{suffix}".replace("@", "-"), normalise_noun(texts["en"]), tuple(parts)))
    return samples


def read_descriptions(text: str) -> dict[str, str]:
    """Language -> description, English ("en") first; languages without text are skipped."""
    first, *lines = text.splitlines() or [""]
    texts = {"en": clean_caption(first)}
    for line in lines:
        if match := re.match(r"([A-Za-z_@]+)\.utf8=(.*)", line):
            texts.setdefault(match[1], clean_caption(match[2]))
    return {language: words for language, words in texts.items() if words}
