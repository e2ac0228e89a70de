"""`samples.jsonl`: one sample per line, the standard form of raw data, fetched or your own.

Unordered, at most one part per modality:
    {"image": "images/cat.png", "caption": "a cat", "audio": "cat.flac", "key": "cat-1", "noun": "cat"}
Interleaved, parts in reading order:
    {"parts": [{"text": "This is a cat:"}, {"image": "images/cat.png"}, {"text": "It sleeps."}]}
"caption" or "text" is the text; other modalities name a file, relative to the folder of this file and inside it.
"key" and "noun" are optional. The parts of an unordered sample are kept in the order of `REGISTRY`.

The noun is the subject of a sample, by which the build holds samples out (data/build/heldout.py). By default it is the
caption's, normalised: "man health worker: medium skin tone" -> "health worker". All variants of a noun (skin tone,
gender, colour, direction, number, plural), from every source, are in the same split.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.common.errors import UserError
from megamm.data.raw.lost_fields import lost_fields
from megamm.modalities import REGISTRY
from megamm.shards.folder import KEY

FILE = "samples.jsonl"


@dataclass(frozen=True)
class ByteRange:
    """The bytes of a medium inside another file, such as a tar: offset and size in bytes."""

    file: Path
    offset: int
    size: int


@dataclass(frozen=True)
class RawPart:
    """One part: the clean text itself for modality "text", otherwise a path relative to the raw folder.

    With a byte range the medium is those bytes; the path is then only its name in reports, with its extension.
    """

    modality: str
    content: str
    byte_range: ByteRange | None = None


@dataclass(frozen=True)
class Missing:
    """A part that a sample should have and has not, because it cannot be read; the reason."""

    modality: str
    reason: str


@dataclass(frozen=True)
class RawSample:
    """A key, the noun that decides the split, and the parts; ordered: interleaved parts in reading order."""

    key: str
    noun: str
    parts: tuple[RawPart, ...]
    ordered: bool = False
    ignored: tuple[str, ...] = ()
    """Unknown fields of its line; the build reports them, because one may be misspelt."""
    missing: tuple[Missing, ...] = ()
    """Parts without which it is used (--allow-missing); the build reports them."""

    def __post_init__(self) -> None:
        modalities = [part.modality for part in self.parts]
        assert self.parts, f"no parts of {self.key}"
        assert self.ordered or len(set(modalities)) == len(modalities), f"two parts of a modality in {self.key}"
        assert KEY.fullmatch(self.key), f"invalid key {self.key!r}"


@dataclass(frozen=True)
class Broken:
    """An unusable line or file for the report, with the reason."""

    what: str
    reason: str


@dataclass(frozen=True)
class NoData:
    """A file that does not belong to the data, such as `._cat.jpg` of macOS, and the kind of file for the report."""

    what: str
    kind: str


Entry = RawSample | Broken | NoData
"""What a reader yields."""


class UnusableSample(ValueError):
    """A sample that cannot be read; the message gives the reason. Readers turn it into `Broken`."""


def clean_caption(text: str) -> str:
    """One line: Unicode NFC, no control characters, white space collapsed. NUL is kept: see clean_text."""
    return re.sub(r"\s+", " ", _printable(text, keep="\0")).strip()


def clean_text(text: str) -> str:
    """Unicode NFC with line breaks and indentation kept; at most one empty line, none at the start and end.

    Control characters become spaces, except NUL: a text with NUL is binary data, which the build refuses and reports.
    """
    text = re.sub(r"\r\n?|\u2028|\u2029", "\n", text)
    lines = [line.rstrip() for line in _printable(text, keep="\0\n\t").split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _printable(text: str, keep: str) -> str:
    """Unicode NFC, with a space for each control character that is not in `keep`."""
    # NFC: the same text has the same bytes, so duplicates and held-out texts are found.
    normal = unicodedata.normalize("NFC", text)
    return "".join(" " if unicodedata.category(c) == "Cc" and c not in keep else c for c in normal)


def fit_key(name: str) -> str:
    """A key from any name: invalid characters become `-`; a changed or shortened key ends in 8 digits of a hash."""
    key = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")
    # Names that differ only in replaced characters get different hashes.
    if key == name and KEY.fullmatch(key):
        return key
    return f"{key[:60]}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}".lstrip("-")


def write_samples(folder: Path, samples: Iterable[RawSample]) -> None:
    """Write FOLDER/samples.jsonl; the media are already in the folder."""
    with (folder / FILE).open("w", encoding="utf-8") as file:
        for sample in samples:
            # A byte range points into a temporary file or a tar outside this folder.
            assert not any(part.byte_range for part in sample.parts), f"{sample.key} has parts inside other files"
            parts: Any = [{part.modality: part.content} for part in sample.parts]
            entry = {"key": sample.key, "noun": sample.noun}
            entry |= (
                {"parts": parts} if sample.ordered else {name: text for part in parts for name, text in part.items()}
            )
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def read_samples(folder: Path, may_miss: frozenset[str] = frozenset()) -> Iterator[RawSample | Broken]:
    """The samples of a raw folder in file order, unusable lines as Broken. Raises UserError if the file is missing."""
    yield from read_lines(folder / FILE, may_miss)


def read_lines(path: Path, may_miss: frozenset[str] = frozenset()) -> Iterator[RawSample | Broken]:
    """The samples of any file of such lines; paths are relative to its folder, and must stay inside it."""
    try:
        lines = path.open("rb")
    except OSError as error:
        remedy = 'write one line per sample: {"image": "a.png", "caption": "a cat"}'
        raise UserError(f"no {path.name} in the raw folder", where=path.parent, remedy=remedy) from error
    folder = path.parent.resolve()
    source = re.sub(r"[^A-Za-z0-9_-]", "-", folder.name)[:60]
    with lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                sample = sample_of(json.loads(line), f"{source}-{number:08d}", may_miss)
                for part in sample.parts:
                    _check_inside(part, folder)
                yield sample
            except UnusableSample as error:
                yield Broken(f"{path.name}:{number}", str(error))
            except (ValueError, RecursionError) as error:
                yield Broken(f"{path.name}:{number}", f"not JSON: {error}")


def sample_of(entry: Any, default_key: str, may_miss: frozenset[str] = frozenset()) -> RawSample:
    """Convert one line's JSON to a sample, with cleaned texts. Raises UnusableSample if that is impossible.

    may_miss: modalities without which a sample is still used.
    """
    if not isinstance(entry, dict):
        raise UnusableSample("not a JSON object")
    key = entry.get("key", default_key)
    if not isinstance(key, str) or not KEY.fullmatch(key):
        raise UnusableSample(f"invalid key {key!r}: use 1 to 80 letters, digits, `_` or `-`")
    # Unknown fields are reported, not refused: data sets have many of their own.
    known = {"key", "noun", "parts"} if "parts" in entry else {"key", "noun", "caption", *REGISTRY}
    missing: list[Missing] = []
    if "parts" in entry:
        parts = _interleaved(entry["parts"])
        missing = _lost(entry, known, {part.modality for part in parts}, may_miss)
    else:
        # An empty field of a modality that may be missing counts as missing.
        empty = [name for name in ("caption", *REGISTRY) if name in entry and not str(entry[name] or "").strip()]
        missing = [Missing("text" if name == "caption" else name, f'no "{name}"') for name in empty]
        missing = [lost for lost in missing if lost.modality in may_miss]
        dropped = {name for name in empty if ("text" if name == "caption" else name) in may_miss}
        parts = _parts_of({name: value for name, value in entry.items() if name not in dropped})
        missing += _lost(entry, known, {part.modality for part in parts}, may_miss)
        if not parts:
            raise UnusableSample(f"no parts: needs at least one of caption, {', '.join(REGISTRY)}")
    noun = str(entry.get("noun") or noun_of(parts, key))
    # JSON can contain half of a surrogate pair ("\ud800"), which cannot be encoded as UTF-8 later.
    if not all(_is_unicode(text) for text in (noun, *entry, *(part.content for part in parts))):
        raise UnusableSample("contains half of a surrogate pair, which is not valid text")
    return RawSample(key, noun, tuple(parts), "parts" in entry, tuple(sorted(set(entry) - known)), tuple(missing))


def _lost(entry: dict[str, Any], known: set[str], there: set[str], may_miss: frozenset[str]) -> list[Missing]:
    """The media and texts that unknown fields hold, of modalities that the sample has no part of.

    Raises UnusableSample for one that must not be missing: {"img": "a.png", "text": "a cat"} is not a text alone.
    """
    found = []
    unknown = {name: value for name, value in entry.items() if name not in known}
    for modality, reason in lost_fields(unknown, there, is_captioned="caption" in entry):
        if modality not in may_miss:
            raise UnusableSample(reason)
        found.append(Missing(modality, reason))
    return found


def noun_of(parts: Iterable[RawPart], key: str) -> str:
    """The noun of the first text's first line; for a sample without text, its key."""
    text = next((part.content for part in parts if part.modality == "text"), "")
    return normalise_noun(text.lstrip().partition("\n")[0]) if text.strip() else key


def _interleaved(entries: Any) -> list[RawPart]:
    """The parts of an interleaved sample, each from an object with one field."""
    if not isinstance(entries, list) or not entries:
        raise UnusableSample('"parts" is not a list of parts')
    parts = []
    for number, entry in enumerate(entries):
        found = _parts_of(entry) if isinstance(entry, dict) and len(entry) == 1 else []
        if len(found) != 1:
            raise UnusableSample(f'part {number} is not one of {{"text": …}}, {{"image": PATH}}, …')
        parts += found
    return parts


def _parts_of(entry: dict[str, Any]) -> list[RawPart]:
    """The parts that the fields of one object name, in the order of REGISTRY."""
    if "caption" in entry and "text" in entry:
        raise UnusableSample('has both "caption" and "text"')
    parts = []
    for modality in REGISTRY:
        field = "caption" if modality == "text" and "caption" in entry else modality
        if field not in entry:
            continue
        content = entry[field]
        if modality == "text" and isinstance(content, str):
            content = clean_caption(content) if field == "caption" else clean_text(content)
        if isinstance(content, list) and content:
            raise UnusableSample(f'"{field}" is a list of {len(content)}: give one, or write a line for each')
        if not isinstance(content, str) or not content.strip():
            raise UnusableSample(f'no "{field}"')
        parts.append(RawPart(modality, content))
    return parts


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _check_inside(part: RawPart, folder: Path) -> None:
    """Raise UnusableSample if a part's path leads out of the folder."""
    if part.modality != "text":
        try:
            # resolve() follows links and removes `..`, so a link to the outside is found too.
            inside = (folder / part.content).resolve().is_relative_to(folder)
        except (OSError, RuntimeError, ValueError):  # path too long, symlink loop, NUL
            inside = False
        if not inside:
            raise UnusableSample(f"{part.content!r} leads outside the folder")


_VARIANT_WORDS = """
a an the of in on with and or by to for from at s
skin tone light medium dark pale bright
man men woman women boy boys girl girls person people male female adult gentleman lady
red orange yellow green blue purple violet pink brown black white grey gray gold golden silver cyan magenta
left right up upward upwards down downward downwards north south east west northeast northwest southeast
southwest front back top bottom forward backward clockwise counterclockwise anticlockwise
one two three four five six seven eight nine ten eleven twelve
small big large little simple outline outlined shadow filled coloring b w bw
icon sign symbol button clipart emoji
"""
_VARIANTS = frozenset(_VARIANT_WORDS.split())
_WORD = re.compile(r"[^\W\d_]+")


def normalise_noun(caption: str) -> str:
    """The caption's words: lower-case, singular, sorted, without variant words unless there are no others."""
    words = _WORD.findall(caption.casefold())
    # A caption of variant words only ("red") keeps them; one without letters ("42") is its own noun.
    kept = [word for word in words if word not in _VARIANTS] or words or [caption.strip()]
    return " ".join(sorted({_singular(word) for word in kept}))


def _singular(word: str) -> str:
    """A word without its plural ending: rules of English spelling, without a dictionary."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses", "zes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
