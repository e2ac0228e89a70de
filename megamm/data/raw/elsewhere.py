"""Texts of a folder's media that are not beside them: in lists that are not read, or in a parallel folder.

In: the files of a folder by stem. Out: the reasons why media, lists and texts cannot be used as they are. Without them,
captions.txt would be one text, and all pictures that it describes would be trained on without one.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from megamm.data.raw.extensions import modality_of

Stems = Mapping[str, list[PurePosixPath]]

_LISTS = ("txt", "csv", "tsv", "json", "jsonl", "parquet", "xlsx")
_BINARY = ("parquet", "xlsx")
_HEAD = 65536
"""Bytes of a possible list that are searched for names of media."""


class Elsewhere:
    """What is known of the texts that are not beside their media."""

    def __init__(self, raw: Path, stems: Stems) -> None:
        bare = {stem: members for stem, members in stems.items() if len(members) == 1 and _is_medium(members[0])}
        lone = {stem: members[0] for stem, members in stems.items() if len(members) == 1 and not _is_medium(members[0])}
        self._bare = set(bare)
        self.lists: dict[str, PurePosixPath] = {}
        """The lists that name media without a text, by stem."""
        self._partner: dict[str, str] = {}
        if bare:
            names = {members[0].name for members in bare.values()}
            first_words = {PurePosixPath(stem).name for stem in bare}
            self.lists = {s: file for s, file in lone.items() if _names_media(raw / file, names, first_words)}
            texts = {stem for stem, file in lone.items() if file.suffix.lower() in (".txt", ".caption")}
            self._partner = _partners(set(bare), texts - set(self.lists))

    def reason_without_text(self, stem: str) -> str | None:
        """Why the medium of a stem, which has no text, is not whole; None if it is."""
        if stem not in self._bare:
            return None
        if stem in self._partner:
            other = self._partner[stem]
            return f"its text is in another folder ({other}): put both into one, or use --allow-missing text"
        if self.lists:
            fix = "write metadata.csv with the columns file_name and text, or use --allow-missing text"
            return f"no text, and the list {next(iter(self.lists.values()))} is not read: {fix}"
        return None

    def reason_without_medium(self, stem: str) -> str | None:
        """Why the text of a stem is not a sample; None if it is."""
        if stem in self._bare or stem not in self._partner:
            return None
        return f"its medium is in another folder ({self._partner[stem]}): put both into one"


def _is_medium(file: PurePosixPath) -> bool:
    return modality_of(file.suffix.lower().lstrip(".")) not in (None, "text")


def _names_media(path: Path, names: set[str], first_words: set[str]) -> bool:
    """Whether a file names media: anywhere with the extension, or at the beginning of a line without it."""
    extension = path.suffix.lower().lstrip(".")
    if extension not in _LISTS:
        return False
    if extension in _BINARY:
        return True
    try:
        with path.open("rb") as file:
            text = file.read(_HEAD).decode("utf-8", "replace")
    except OSError:
        return False
    lines = text.splitlines()
    words = {PurePosixPath(word).name for line in lines for word in _words(line)}
    starts = {start[1] for line in lines if (start := re.match(r'"?([^\s,;|"]+)["\s,;|]+\S', line))}
    # A stem such as "a" begins many sentences, so all lines but a heading must begin with one.
    return not words.isdisjoint(names) or len(starts & first_words) >= max(1, len(lines) - 1)


def _words(line: str) -> Iterator[str]:
    """What may be paths of a line of text, CSV or JSON, also with a number of the caption behind (`a.jpg#0`)."""
    yield line.strip()
    for word in re.split(r'[\t,;|"#]+|: ', line):
        yield word.strip()


def _partners(bare: set[str], texts: set[str]) -> dict[str, str]:
    """Stems of media and of texts with one name in two folders, each to its partner, if all texts have one."""
    by_name: dict[str, list[str]] = {}
    for stem in sorted(bare):
        by_name.setdefault(PurePosixPath(stem).name, []).append(stem)
    found = {text: by_name[PurePosixPath(text).name] for text in texts if PurePosixPath(text).name in by_name}
    if not texts or len(found) < len(texts):
        return {}
    return {text: media[0] for text, media in found.items()} | {stem: text for text in found for stem in found[text]}
