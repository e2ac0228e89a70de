"""Public starter data that needs no account: `megamm data fetch NAME...` writes each source as raw samples.

Out, in RAW/<source>/: `samples.jsonl` (data/raw/samples.py), its media, and `ATTRIBUTION.md` (origin, licence,
authors). The folder appears only when complete; the same packages give the same bytes. A source is a function
(unpacked packages, target folder) -> samples, plus an entry in SOURCES; STARTERS are sets of sources.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megamm.common.errors import UserError
from megamm.data.raw.samples import FILE, RawSample, write_samples
from megamm.data.sources.asterisk import write_asterisk, write_digits
from megamm.data.sources.bunny import write_bunny
from megamm.data.sources.drawings import write_clipart, write_tuxpaint
from megamm.data.sources.emoji import write_emoji, write_emoji_variants
from megamm.data.sources.furniture import write_furniture
from megamm.data.sources.games import write_pingus, write_wesnoth
from megamm.data.sources.manuals import write_gimp, write_gnome
from megamm.data.sources.media import write_attribution
from megamm.data.sources.packages import DebianPrefix, Sdist, fetch_package
from megamm.data.sources.text import write_fortunes, write_gcide, write_wordnet
from megamm.data.sources.things import write_things


@dataclass(frozen=True)
class PublicSource:
    """A public data set in one or more packages; write(unpacked packages, target folder) creates its samples."""

    packages: tuple[str | Sdist | DebianPrefix, ...]
    download_mb: float
    licence: str
    summary: str
    write: Callable[[Path, Path], list[RawSample]]


# One catalogue of a package of 120 MB, whose files are in the first 24.5 MB of the archive.
_BLENDSWAP = DebianPrefix(
    "sweethome3d-furniture",
    24_500_000,
    "39b6065a9d875ff1f75f381bbc34b2259124f6e421091020219d7105837e9290",
    (
        "usr/share/doc/sweethome3d-furniture/copyright",
        "usr/share/sweethome3d/furniture/BlendSwap-CC-0.sh3f",
    ),
)
_MOVIEPY_SHA256 = "c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1"

SOURCES = {
    "emoji": PublicSource(
        ("fonts-noto-color-emoji",), 9.9, "SIL OFL 1.1", "3,780 emoji pictures with their English names", write_emoji
    ),
    "emoji-variants": PublicSource(
        ("fonts-noto-color-emoji",),
        9.9,
        "SIL OFL 1.1",
        "some 500 pictures of people and hands, with profession or hair, gender and skin as caption",
        write_emoji_variants,
    ),
    "digits": PublicSource(
        (
            *("asterisk-core-sounds-en-g722", "asterisk-core-sounds-en"),
            *("asterisk-core-sounds-fr-g722", "asterisk-core-sounds-fr"),
            *("asterisk-core-sounds-es-g722", "asterisk-core-sounds-es"),
        ),
        34.5,
        "CC-BY-SA 3.0",
        "300 sequences of two spoken digits, three copies each, joined from English, French and Spanish recordings",
        write_digits,
    ),
    "things": PublicSource(
        ("sweethome3d",),
        17.0,
        "GPL-2+ or CC-BY 3.0",
        "24 models of furniture in two poses and eight headings, and turning: clouds, pictures, videos, attributes",
        write_things,
    ),
    "clipart": PublicSource(
        ("openclipart-svg",), 24.9, "public domain", "6,000 titled drawings of the Open Clip Art Library", write_clipart
    ),
    "asterisk": PublicSource(
        (
            "asterisk-core-sounds-en-g722",
            "asterisk-core-sounds-en",
            "asterisk-core-sounds-fr-g722",
            "asterisk-core-sounds-fr",
        ),
        21.4,
        "CC-BY-SA 3.0",
        "1,000 spoken telephone prompts with transcripts, English and French",
        write_asterisk,
    ),
    "sweethome": PublicSource(
        ("sweethome3d",),
        17.0,
        "GPL-2+ or CC-BY 3.0",
        "92 models of furniture: point clouds, names, pictures, turntable videos",
        write_furniture,
    ),
    "blendswap": PublicSource(
        (_BLENDSWAP,),
        24.5,
        "CC0",
        "175 models of furniture and things, a part of `furniture`: point clouds, names, pictures, turntable videos",
        write_furniture,
    ),
    "furniture": PublicSource(
        ("sweethome3d-furniture",),
        119.8,
        "CC-BY 3.0, CC0, GPL (by catalogue)",
        "820 models of furniture and things: point clouds, names, pictures, turntable videos",
        write_furniture,
    ),
    "pingus": PublicSource(
        ("pingus-data",), 11.7, "GPL-3+", "72 captioned sprite animations of a game about penguins", write_pingus
    ),
    "wesnoth": PublicSource(
        ("wesnoth-1.16-data",),
        146.2,
        "GPL-2+",
        "228 described figures of a fantasy game and 432 of their animations",
        write_wesnoth,
    ),
    "tuxpaint": PublicSource(
        ("tuxpaint-stamps-default",),
        160.9,
        "GPL-2",
        "950 stamps: picture, description and speech, in English and 10 more languages",
        write_tuxpaint,
    ),
    "gnome": PublicSource(
        ("gnome-user-docs",), 8.5, "CC-BY-SA 3.0", "348 pages of the GNOME manuals, text and pictures", write_gnome
    ),
    "gimp": PublicSource(
        ("gimp-help-en", "gimp-help-common"),
        49.8,
        "GFDL 1.2+",
        "662 pages of the GIMP manual, text and 1,990 pictures",
        write_gimp,
    ),
    "wordnet": PublicSource(("wordnet-base",), 6.5, "WordNet licence", "117,000 short definitions", write_wordnet),
    "gcide": PublicSource(("dict-gcide",), 14.8, "GPL-2+", "an English dictionary, 36 MB of text", write_gcide),
    "fortunes": PublicSource(("fortunes",), 0.8, "BSD", "13,600 sayings and quotations", write_fortunes),
    "bunny": PublicSource(
        (Sdist("moviepy", "2.2.1", _MOVIEPY_SHA256, (".zip",)),),
        58.4,
        "CC-BY 3.0",
        "shots of the film Big Buck Bunny: video and sound",
        write_bunny,
    ),
}

STARTERS = {
    "combinations": ("emoji-variants", "digits", "things"),
    "starter": ("emoji", "clipart", "asterisk", "furniture", "pingus", "gnome", "fortunes"),
    "starter-small": ("emoji", "clipart", "asterisk", "sweethome", "blendswap", "pingus", "gnome", "fortunes"),
}
"""Starter sets. combinations: few words in many combinations, 62 MB; the others: at most 200 MB, and 120."""


def expand(names: list[str]) -> list[str]:
    """Distinct source names, with sets replaced by their members. Raises UserError for an unknown name."""
    for name in names:
        if name not in SOURCES and name not in STARTERS:
            known = [f"{key}: {s.summary}, {s.download_mb:.0f} MB, {s.licence}" for key, s in SOURCES.items()]
            known += [f"{key}: {', '.join(sources)}" for key, sources in STARTERS.items()]
            raise UserError(f"no source {name!r}", remedy=f"choose from {'; '.join(known)}")
    return list(dict.fromkeys(source for name in names for source in STARTERS.get(name, (name,))))


def is_fetched(name: str, raw: Path) -> bool:
    """Whether raw/name exists and is complete. Raises UserError if the folder exists without samples."""
    target = raw / name
    if (target / FILE).exists():
        return True
    if target.exists():
        raise UserError(f"the folder exists but has no {FILE}", where=target, remedy="delete it or choose another --to")
    return False


def fetch(name: str, raw: Path) -> tuple[Path, int | None]:
    """Fetch one source to raw/name; returns that folder and the number of samples, None if it already existed."""
    (name,) = expand([name])
    raw = raw.resolve()  # apt-get and dpkg-deb run in another folder
    source, target = SOURCES[name], raw / name
    if is_fetched(name, raw):
        return target, None
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.partial-", dir=raw) as work:
        unpacked, partial = Path(work) / "package", Path(work) / name
        for folder in (unpacked, partial):
            folder.mkdir()
        for package in source.packages:
            fetch_package(package, Path(work), unpacked)
        # Source distributions have no Debian copyright file; their sources append the credits.
        debian = [p if isinstance(p, str) else p.name for p in source.packages if not isinstance(p, Sdist)]
        write_attribution(partial, f"{source.summary}. Licence: {source.licence}.", unpacked, debian)
        samples = source.write(unpacked, partial)
        write_samples(partial, samples)
        partial.rename(target)
    return target, len(samples)
