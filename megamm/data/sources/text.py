"""Plain English text: the glosses of WordNet, the GNU Collaborative International Dictionary, and sayings.

In: the unpacked Debian packages `wordnet-base`, `dict-gcide`, `fortunes`. Out: text samples. Dictionary entries have a
few lines each, so consecutive entries are combined into documents of some thousand characters; the noun of the first
entry decides the split. Each saying is a separate document.
"""

import gzip
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from megamm.common.errors import UserError
from megamm.data.raw.samples import RawPart, RawSample, clean_text, normalise_noun

DOCUMENT = 4000
"""Number of characters at which a document of dictionary entries is full."""
_PARTS_OF_SPEECH = {"adj": "adjective", "adv": "adverb", "noun": "noun", "verb": "verb"}
_UNFIT_SAYINGS = {"ascii-art", "ethnic", "men-women", "translate-me"}
"""Pictures made of letters; jokes at the cost of groups of people; other languages."""


def write_wordnet(package: Path, target: Path) -> list[RawSample]:
    """Synsets as `dog, domestic dog (noun): a member of the genus Canis ...`, in order of the files."""
    del target  # there are no media
    folder = _folder(package / "usr/share/wordnet")
    samples: list[RawSample] = []
    for suffix, name in _PARTS_OF_SPEECH.items():
        lines = (folder / f"data.{suffix}").read_text(encoding="utf-8", errors="replace").splitlines()
        entries = (synset for line in lines if (synset := read_synset(line, name)))
        samples += _documents(f"wordnet-{suffix}", entries)
    return samples


def read_synset(line: str, part_of_speech: str) -> tuple[str, str] | None:
    """First word and entry of a line of a WordNet data file (wndb(5)); None for the licence at its top."""
    if line.startswith(" ") or " | " not in line:
        return None
    data, gloss = line.split(" | ", 1)
    fields = data.split()
    # wndb(5): field 3 is the number of words (hexadecimal), then word and sense number alternate. Adjectives can end in
    # a marker, such as "(a)".
    words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
    return words[0], f"{', '.join(words)} ({part_of_speech}): {gloss.strip()}"


def write_gcide(package: Path, target: Path) -> list[RawSample]:
    """Unchanged entries of the dictionary, in its order, from the first headword on."""
    del target
    file = _folder(package / "usr/share/dictd") / "gcide.dict.dz"
    text = gzip.decompress(file.read_bytes()).decode("utf-8", errors="replace")
    return _documents("gcide", read_gcide(text))


def read_gcide(text: str) -> Iterator[tuple[str, str]]:
    r"""Headword and entry; an entry starts at the left margin with `Headword \pronunciation\`."""
    starts = [match.start() for match in re.finditer(r"^\S[^\n\\]*\\[^\n]*\\", text, re.MULTILINE)]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        # Names of the sources in brackets follow the definitions.
        entry = re.sub(r"^\s*\[(?:1913 Webster|WordNet|PJC)[^\]]*\]\n?", "", text[start:end], flags=re.MULTILINE)
        yield entry.partition("\\")[0].strip(), entry


def write_fortunes(package: Path, target: Path) -> list[RawSample]:
    """Sayings, quotations and jokes, separated by lines of `%`, in order of the files."""
    del target
    folder = _folder(package / "usr/share/games/fortunes")
    samples = []
    for file in sorted(p for p in folder.iterdir() if p.is_file() and not p.is_symlink() and not p.suffix):
        if file.name in _UNFIT_SAYINGS:
            continue
        sayings = re.split(r"^%\n", file.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)
        for number, saying in enumerate(map(clean_text, sayings), start=1):
            if saying:
                key = f"fortunes-{file.name}-{number:04d}"
                # A saying has no subject: its first words identify it, so copies are in one split.
                noun = normalise_noun(" ".join(saying.split()[:20]))
                samples.append(RawSample(key, noun, (RawPart("text", saying),)))
    return samples


def _documents(prefix: str, entries: Iterable[tuple[str, str]]) -> list[RawSample]:
    """Combine (word, entry) pairs into documents of at least DOCUMENT characters, in order."""
    samples: list[RawSample] = []
    lines: list[str] = []
    first = ""
    # The empty entry at the end completes the last document.
    for word, entry in [*entries, ("", "")]:
        if lines and (not word or sum(map(len, lines)) >= DOCUMENT):
            part = RawPart("text", clean_text("\n".join(lines)))
            samples.append(RawSample(f"{prefix}-{len(samples):05d}", normalise_noun(first), (part,)))
            lines = []
        first = first if lines else word
        lines += [entry] if entry else []
    return samples


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError("no such folder in the package", where=path, remedy="use Debian 12")
    return path
