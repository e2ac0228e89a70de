"""`pairs.jsonl`: one image-caption pair a line, the form of all raw data, fetched or a user's own.

{"image": "images/cat.png", "caption": "a cat"} suffices; "key" and "noun" may be given. The image's path is
relative to the folder of the file and must stay inside it.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megamm.data.nouns import normalise_noun
from megamm.data.shards import KEY
from megamm.errors import UserError

FILE = "pairs.jsonl"


@dataclass(frozen=True)
class Pair:
    """One image (path relative to the raw folder) with its clean caption, and the noun that decides its split."""

    key: str
    image: str
    caption: str
    noun: str


@dataclass(frozen=True)
class Broken:
    """Something that cannot be used, for the report: which line or file, and why."""

    what: str
    reason: str


def clean_caption(text: str) -> str:
    """Unicode NFC, control characters gone, runs of white space as one space."""
    printable = (" " if unicodedata.category(c) == "Cc" else c for c in unicodedata.normalize("NFC", text))
    return re.sub(r"\s+", " ", "".join(printable)).strip()


def write_pairs(folder: Path, pairs: Iterable[Pair]) -> None:
    """Write FOLDER/pairs.jsonl."""
    lines = (json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs)
    (folder / FILE).write_text("".join(lines), encoding="utf-8")


def read_pairs(folder: Path) -> Iterator[Pair | Broken]:
    """The pairs of a raw folder in file order, unusable lines as Broken.

    UserError if there is no such file, a key occurs twice or an image's path leads out of the folder.
    """
    path = folder / FILE
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        remedy = 'write one line an image: {"image": "a.png", "caption": "a cat"}'
        raise UserError(f"no {FILE} in the raw folder", where=folder, remedy=remedy) from error
    keys: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        pair = _read_line(line, folder.name, number)
        if isinstance(pair, Pair):
            if pair.key in keys:
                raise UserError(f"key {pair.key!r} occurs twice", where=f"{path}:{number}", remedy="make keys unique")
            keys.add(pair.key)
            if not (folder / pair.image).resolve().is_relative_to(folder.resolve()):
                remedy = "put the images inside the raw folder and name them relative to it"
                raise UserError(f"{pair.image!r} leads out of the folder", where=f"{path}:{number}", remedy=remedy)
        yield pair


def _read_line(line: bytes, source: str, number: int) -> Pair | Broken:
    where = f"{FILE}:{number}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        return Broken(where, f"not JSON: {error}")
    if not isinstance(entry, dict):
        return Broken(where, "not a JSON object")
    for field in ("image", "caption"):
        if not isinstance(entry.get(field), str) or not clean_caption(entry[field]):
            return Broken(where, f'no "{field}"')
    caption = clean_caption(entry["caption"])
    key = entry.get("key", f"{re.sub(r'[^A-Za-z0-9_-]', '-', source)[:60]}-{number:08d}")
    if not isinstance(key, str) or not KEY.fullmatch(key):
        return Broken(where, f"unfit key {key!r}: 1 to 80 letters, digits, `_` or `-`")
    noun = entry.get("noun") or normalise_noun(caption)
    return Pair(key, entry["image"], caption, str(noun))
