"""Emoji pictures with their English names, from the Noto Color Emoji font.

In: the unpacked Debian package `fonts-noto-color-emoji`. Out: 136 x 128 PNGs unchanged from the font's CBDT table, one
for each code point sequence that the font draws (directly or through a GSUB ligature), including skin tones, and
captions from the `emoji` package's CLDR names ("health worker: medium skin tone", "flag of samoa").
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import emoji
from fontTools.ttLib import TTFont
from PIL import Image

from megamm.common.errors import UserError
from megamm.data.raw.samples import RawPart, RawSample, normalise_noun

_VARIATION_SELECTOR = 0xFE0F
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)
_TONE = re.compile(r"\b(light|medium-light|medium|medium-dark|dark) skin tone")
_SKIN_TONE = re.compile(r"((?: (?:light|medium-light|medium|medium-dark|dark) skin tone)+)(?: (.+))?$")

PEOPLE = frozenset(
    (
        *("artist", "bald", "construction worker", "cook", "curly hair", "factory worker", "farmer", "getting haircut"),
        *("health worker", "in tuxedo", "judge", "mage", "mechanic", "office worker", "pilot", "police officer"),
        *("raising hand", "red hair", "scientist", "singer", "student", "teacher", "vampire", "white hair"),
    )
)
"""Roles drawn as a man and as a woman in every skin tone, who differ visibly at 24 x 24 pixels."""
HANDS = frozenset(("ok hand", "raised fist", "thumbs down", "thumbs up", "victory hand", "waving hand"))
SKINS = frozenset(("yellow", "light", "medium", "dark"))
"""The skin tones that are easy to distinguish, of the six in the font."""
SIDE = 72
"""Pixels of a variant's picture."""
COPIES = ((0, 0, False), (3, 1, True))
"""Copies of each variant: its shift to the right and down in pixels, and whether it is mirrored."""


def write_emoji(package: Path, target: Path) -> list[RawSample]:
    """Write the PNGs under target/images and return their samples, in order of code points."""
    samples = []
    (target / "images").mkdir()
    for codes, name, png in _drawn(package):
        caption = emoji_caption(name, is_flag=len(codes) == 2 and codes[0] in _FLAG_LETTERS)
        samples.append(_sample(target, codes, png, caption, normalise_noun(caption)))
    return samples


def write_emoji_variants(package: Path, target: Path) -> list[RawSample]:
    """Write only the people and hands in PEOPLE and HANDS, with their attributes in a fixed order.

    Captions are "dark skin, woman, farmer" and "dark skin, thumbs up"; the noun is the last attribute. Attributes
    visible in few pixels come first, so that no earlier word predicts which of their values occur in training.
    """
    samples = []
    (target / "images").mkdir()
    for codes, name, png in _drawn(package):
        if caption := variant_caption(name):
            noun = normalise_noun(caption.rpartition(", ")[2])
            for number, copy in enumerate(COPIES):
                samples.append(_sample(target, codes, on_white(png, *copy), caption, noun, f"-{number}"))
    return samples


def on_white(png: bytes, right: int = 0, down: int = 0, is_mirrored: bool = False) -> bytes:
    """A PNG of SIDE x SIDE pixels: the picture on white, as large as fits, `right` and `down` pixels off the centre."""
    with Image.open(io.BytesIO(png)) as picture:
        scale = SIDE / max(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        small = picture.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
    if is_mirrored:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(small, ((SIDE - small.width) // 2 + right, (SIDE - small.height) // 2 + down), mask=small)
    file = io.BytesIO()
    square.save(file, format="PNG")
    return file.getvalue()


def variant_caption(name: str) -> str | None:
    """Caption of ":woman_farmer_dark_skin_tone:", "dark skin, woman, farmer"; None if it is not a variant."""
    words = name.strip(":").replace("_", " ").lower()
    tone = _TONE.search(words)
    colour = tone[1] if tone else "yellow"
    if colour not in SKINS:
        return None
    skin = f"{colour} skin"
    subject = " ".join((words[: tone.start()] + words[tone.end() :] if tone else words).split())
    if subject in HANDS:
        return f"{skin}, {subject}"
    gender, _, role = subject.partition(" ")
    return f"{skin}, {gender}, {role}" if gender in ("man", "woman") and role in PEOPLE else None


def _sample(target: Path, codes: tuple[int, ...], png: bytes, caption: str, noun: str, copy: str = "") -> RawSample:
    """Write one picture and return its sample."""
    key = "emoji-" + "-".join(f"{code:x}" for code in codes) + copy
    (target / "images" / f"{key}.png").write_bytes(png)
    return RawSample(key, noun, (RawPart("image", f"images/{key}.png"), RawPart("text", caption)))


def _drawn(package: Path) -> Iterator[tuple[tuple[int, ...], str, bytes]]:
    """Code points, the emoji package's name and PNG of every emoji that the font draws, in order of code points."""
    fonts = sorted(package.rglob("NotoColorEmoji.ttf"))
    if not fonts:
        remedy = "report your Debian release as an issue"
        raise UserError("no NotoColorEmoji.ttf in the package", where=package, remedy=remedy)
    with TTFont(fonts[0], lazy=True) as font:
        if "CBDT" not in font:
            remedy = "use a release whose font contains bitmaps (CBDT), such as Debian 12"
            raise UserError("the font has no bitmap table", where=fonts[0].name, remedy=remedy)
        glyphs = _glyphs(font)
        bitmaps, drawn = font["CBDT"].strikeData[0], set()
        for text in sorted(emoji.EMOJI_DATA):
            entry = emoji.EMOJI_DATA[text]
            # The font's tables lack variation selectors.
            codes = tuple(ord(c) for c in text if ord(c) != _VARIATION_SELECTOR)
            glyph = glyphs.get(codes)
            if entry["status"] != emoji.STATUS["fully_qualified"] or glyph not in bitmaps or glyph in drawn:
                continue
            # Several sequences can share a glyph; the first in the order of code points names it.
            drawn.add(glyph)
            yield codes, entry["en"], bitmaps[glyph].imageData


def emoji_caption(name: str, *, is_flag: bool) -> str:
    """ ":woman_juggling_medium_skin_tone:" (a name of the emoji package) as "woman juggling: medium skin tone"."""
    words = name.strip(":").replace("_", " ").lower()
    if is_flag:
        return f"flag of {words}"
    # CLDR form: the skin tone after a colon, further attributes after a comma.
    return _SKIN_TONE.sub(lambda tone: f":{tone[1]}, {tone[2]}" if tone[2] else f":{tone[1]}", words)


def _glyphs(font: TTFont) -> dict[tuple[int, ...], str]:
    """Code point sequence -> glyph name, from the character map and the GSUB ligatures."""
    names = font.getBestCmap()
    code_of = {name: code for code, name in names.items()}
    # Single characters first; sequences (skin tones, flags, professions) are ligatures of the font.
    glyphs: dict[tuple[int, ...], str] = {(code,): name for code, name in names.items()}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            for first, ligatures in getattr(table, "ligatures", {}).items():
                for ligature in ligatures:
                    parts = (first, *ligature.Component)
                    if all(part in code_of for part in parts):
                        glyphs[tuple(code_of[part] for part in parts)] = ligature.LigGlyph
    return glyphs
