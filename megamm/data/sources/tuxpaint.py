"""Rubber stamps with a description, written and spoken, from the drawing program Tux Paint.

In: the unpacked Debian package `tuxpaint-stamps-default`: X.png or X.svg, X.txt (first line English, then lines
`LANGUAGE.utf8=TEXT`), X_desc.ogg (spoken English) and X_desc_LANGUAGE.ogg. Out: a sample per stamp with picture,
English description and speech; and one per further spoken language, with its own text and speech and the same picture.
Speech is stored unchanged (Vorbis), drawings as SVG. All languages share the English noun, so no stamp is in both
splits.
"""

import logging
import re
import shutil
from pathlib import Path

from megamm.common.errors import UserError
from megamm.data.raw.nouns import normalise_noun
from megamm.data.raw.samples import RawPart, RawSample, clean_caption, fit_key

logger = logging.getLogger(__name__)


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
