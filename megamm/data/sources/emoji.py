"""Emoji pictures with their English names, from the Noto Color Emoji font.

In: the unpacked Debian package `fonts-noto-color-emoji`. Out: 136 x 128 PNGs as they lie in the font's CBDT table,
one a code point sequence that the font draws (directly or through a GSUB ligature), skin tones included, and
captions from the `emoji` package's CLDR names ("health worker: medium skin tone", "flag of samoa").
"""

import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import emoji
from fontTools.ttLib import TTFont
from PIL import Image

from megamm.data.nouns import normalise_noun
from megamm.data.samples import RawPart, RawSample
from megamm.errors import UserError

_VARIATION_SELECTOR = 0xFE0F
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)
_TONE = re.compile(r"\b(light|medium-light|medium|medium-dark|dark) skin tone")
_SKIN_TONE = re.compile(r"((?: (?:light|medium-light|medium|medium-dark|dark) skin tone)+)(?: (.+))?$")

PEOPLE = frozenset(
    (
        *("artist", "astronaut", "construction worker", "cook", "detective", "farmer", "firefighter", "guard", "mage"),
        *("health worker", "judge", "pilot", "police officer", "scientist", "singer", "student", "superhero"),
        *("teacher", "wearing turban", "raising hand"),
    )
)
"""Roles that the font draws of a man and a woman, in yellow and five skin tones."""
HANDS = frozenset((*("thumbs up", "thumbs down", "ok hand", "victory hand", "raised fist", "waving hand"),))


COPIES = 8
SIDE = 64
"""Pixels of a copy."""
SHRINK = (0.05, 0.18)
"""By how much copies after the first are smaller, at least and at most."""


def write_emoji(package: Path, target: Path) -> list[RawSample]:
    """Write the PNGs under target/images and return their samples, in order of code points."""
    samples = []
    (target / "images").mkdir()
    for codes, name, png in _drawn(package):
        caption = emoji_caption(name, is_flag=len(codes) == 2 and codes[0] in _FLAG_LETTERS)
        samples.append(_sample(target, codes, png, caption, normalise_noun(caption)))
    return samples


def write_emoji_variants(package: Path, target: Path) -> list[RawSample]:
    """The same of the people and hands in PEOPLE and HANDS alone, their attributes spelled out in a fixed order.

    Captions are "firefighter, woman, medium-dark skin" and "thumbs up, dark skin"; the noun is the first attribute.
    Each is there COPIES times, at another place and size: whole pictures cannot be learnt by heart.
    """
    samples = []
    (target / "images").mkdir()
    for codes, name, png in _drawn(package):
        if caption := variant_caption(name):
            noun = normalise_noun(caption.split(",")[0])
            for number in range(COPIES):
                samples.append(_sample(target, codes, copy_of(png, number), caption, noun, f"-{number}"))
    return samples


def copy_of(png: bytes, number: int) -> bytes:
    """A PNG of SIDE pixels a side, on white; number 0 fills it, others are smaller, moved by their bytes' hash."""
    digest = hashlib.sha256(png + str(number).encode()).digest()
    chance, right, down = (value / 255 for value in digest[:3])
    shrink = SHRINK[0] + (SHRINK[1] - SHRINK[0]) * chance
    if number == 0:
        shrink, right, down = 0, 0.5, 0.5
    with Image.open(io.BytesIO(png)) as picture:
        scale = SIDE * (1 - shrink) / max(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        small = picture.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIDE, SIDE), "white")
    square.alpha_composite(small, (round((SIDE - small.width) * right), round((SIDE - small.height) * down)))
    file = io.BytesIO()
    square.convert("RGB").save(file, format="PNG")
    return file.getvalue()


def variant_caption(name: str) -> str | None:
    """The emoji package's ":woman_firefighter_dark_skin_tone:" as "firefighter, woman, dark skin"; None: no variant."""
    words = name.strip(":").replace("_", " ").lower()
    tone = _TONE.search(words)
    skin = f"{tone[1]} skin" if tone else "yellow skin"
    subject = " ".join((words[: tone.start()] + words[tone.end() :] if tone else words).split())
    if subject in HANDS:
        return f"{subject}, {skin}"
    gender, _, role = subject.partition(" ")
    return f"{role}, {gender}, {skin}" if gender in ("man", "woman") and role in PEOPLE else None


def _sample(target: Path, codes: tuple[int, ...], png: bytes, caption: str, noun: str, ending: str = "") -> RawSample:
    """Write one picture and return its sample."""
    key = "emoji-" + "-".join(f"{code:x}" for code in codes) + ending
    (target / "images" / f"{key}.png").write_bytes(png)
    return RawSample(key, noun, (RawPart("image", f"images/{key}.png"), RawPart("text", caption)))


def _drawn(package: Path) -> Iterator[tuple[tuple[int, ...], str, bytes]]:
    """Code points, the emoji package's name and PNG of every emoji that the font draws, in order of code points."""
    fonts = sorted(package.rglob("NotoColorEmoji.ttf"))
    if not fonts:
        raise UserError("no NotoColorEmoji.ttf in the package", where=package, remedy="report your Debian release")
    with TTFont(fonts[0], lazy=True) as font:
        if "CBDT" not in font:
            remedy = "use a release whose font holds bitmaps (CBDT), such as Debian 12"
            raise UserError("the font has no bitmap table", where=fonts[0].name, remedy=remedy)
        glyphs = _glyphs(font)
        bitmaps, drawn = font["CBDT"].strikeData[0], set()
        for text in sorted(emoji.EMOJI_DATA):
            entry = emoji.EMOJI_DATA[text]
            codes = tuple(ord(c) for c in text if ord(c) != _VARIATION_SELECTOR)
            glyph = glyphs.get(codes)
            if entry["status"] != emoji.STATUS["fully_qualified"] or glyph not in bitmaps or glyph in drawn:
                continue
            drawn.add(glyph)
            yield codes, entry["en"], bitmaps[glyph].imageData


def emoji_caption(name: str, *, is_flag: bool) -> str:
    """The emoji package's ":woman_juggling_medium_skin_tone:" as "woman juggling: medium skin tone"."""
    words = name.strip(":").replace("_", " ").lower()
    if is_flag:
        return f"flag of {words}"
    return _SKIN_TONE.sub(lambda tone: f":{tone[1]}, {tone[2]}" if tone[2] else f":{tone[1]}", words)


def _glyphs(font: TTFont) -> dict[tuple[int, ...], str]:
    """Code point sequence -> glyph name, from the character map and the GSUB ligatures."""
    names = font.getBestCmap()
    code_of = {name: code for code, name in names.items()}
    glyphs: dict[tuple[int, ...], str] = {(code,): name for code, name in names.items()}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            for first, ligatures in getattr(table, "ligatures", {}).items():
                for ligature in ligatures:
                    parts = (first, *ligature.Component)
                    if all(part in code_of for part in parts):
                        glyphs[tuple(code_of[part] for part in parts)] = ligature.LigGlyph
    return glyphs
