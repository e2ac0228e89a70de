"""Emoji pictures with their English names, from the Noto Color Emoji font.

In: the unpacked Debian package `fonts-noto-color-emoji`. Out: 136 x 128 PNGs as they lie in the font's CBDT table,
one a code point sequence that the font draws (directly or through a GSUB ligature), skin tones included, and
captions from the `emoji` package's CLDR names ("health worker: medium skin tone", "flag of samoa").
"""

import re
from pathlib import Path

import emoji
from fontTools.ttLib import TTFont

from megamm.data.nouns import normalise_noun
from megamm.data.samples import RawPart, RawSample
from megamm.errors import UserError

_VARIATION_SELECTOR = 0xFE0F
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)
_SKIN_TONE = re.compile(r"((?: (?:light|medium-light|medium|medium-dark|dark) skin tone)+)(?: (.+))?$")


def write_emoji(package: Path, target: Path) -> list[RawSample]:
    """Write the PNGs under target/images and return their samples, in order of code points."""
    fonts = sorted(package.rglob("NotoColorEmoji.ttf"))
    if not fonts:
        raise UserError("no NotoColorEmoji.ttf in the package", where=package, remedy="report your Debian release")
    with TTFont(fonts[0], lazy=True) as font:
        if "CBDT" not in font:
            remedy = "use a release whose font holds bitmaps (CBDT), such as Debian 12"
            raise UserError("the font has no bitmap table", where=fonts[0].name, remedy=remedy)
        glyphs = _glyphs(font)
        bitmaps = font["CBDT"].strikeData[0]
        (target / "images").mkdir()
        samples, drawn = [], set()
        for text in sorted(emoji.EMOJI_DATA):
            entry = emoji.EMOJI_DATA[text]
            codes = tuple(ord(c) for c in text if ord(c) != _VARIATION_SELECTOR)
            glyph = glyphs.get(codes)
            if entry["status"] != emoji.STATUS["fully_qualified"] or glyph not in bitmaps or glyph in drawn:
                continue
            drawn.add(glyph)
            key = "emoji-" + "-".join(f"{code:x}" for code in codes)
            (target / "images" / f"{key}.png").write_bytes(bitmaps[glyph].imageData)
            caption = emoji_caption(entry["en"], is_flag=len(codes) == 2 and codes[0] in _FLAG_LETTERS)
            parts = (RawPart("image", f"images/{key}.png"), RawPart("text", caption))
            samples.append(RawSample(key, normalise_noun(caption), parts))
    return samples


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
