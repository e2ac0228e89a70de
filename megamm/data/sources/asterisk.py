"""Spoken telephone prompts with their transcripts, from the Asterisk project: English and French, a voice each.

In: the unpacked Debian packages `asterisk-core-sounds-LANGUAGE` (the transcripts) and
`asterisk-core-sounds-LANGUAGE-g722` (the recordings: studio quality, 16 kHz, coded as ITU-T G.722). Out: FLAC, mono,
16 bit, 16 kHz, with the transcript as caption. Prompts without words (tones, silence), whose transcript is a remark
in brackets, are skipped. A prompt and its translation have the same noun, that of the English words.
"""

import gzip
import re
from pathlib import Path

import numpy as np

from megamm.common.errors import UserError
from megamm.data.raw.nouns import normalise_noun
from megamm.data.raw.samples import RawPart, RawSample, clean_caption
from megamm.data.sources.media import write_flac

SAMPLE_RATE = 16_000
_REMARK = ("[", "(", "<")


def write_asterisk(package: Path, target: Path) -> list[RawSample]:
    """Write the recordings under target/audio and return them with their transcripts, by language and prompt name."""
    lists = sorted(package.rglob("core-sounds-*.txt.gz"))
    folders = [folder for folder in (package / "usr/share/asterisk/sounds").glob("*") if folder.is_dir()]
    if not lists or not folders:
        raise UserError("no transcripts or no recordings in the packages", where=package, remedy="use Debian 12")
    (target / "audio").mkdir()
    samples: list[RawSample] = []
    nouns: dict[str, str] = {}
    for file in lists:  # English comes first
        language = file.name.removeprefix("core-sounds-").removesuffix(".txt.gz")
        (folder,) = (folder for folder in folders if folder.name.startswith(f"{language}_"))
        for name, transcript in sorted(read_transcripts(gzip.decompress(file.read_bytes()).decode()).items()):
            recording = folder / f"{name}.g722"
            if not recording.is_file():
                continue
            key = f"asterisk-{language}-" + re.sub(r"[^A-Za-z0-9_]+", "-", name)
            write_flac(target / "audio" / f"{key}.flac", decode_recording(recording), SAMPLE_RATE)
            parts = (RawPart("audio", f"audio/{key}.flac"), RawPart("text", transcript))
            noun = nouns.setdefault(name, normalise_noun(transcript))
            samples.append(RawSample(key, noun, parts, ordered=False))
    return samples


def read_transcripts(text: str) -> dict[str, str]:
    """Prompt name ("digits/1") -> its words, from lines `name: words`; comments (;) and remarks are skipped."""
    entries = (line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith(";"))
    cleaned = {name.strip(): clean_caption(words) for name, words in entries}
    return {name: words for name, words in cleaned.items() if words and not words.startswith(_REMARK)}


def decode_recording(path: Path) -> np.ndarray:
    """int16 [samples] at 16 kHz; the coding has no header, so the format is passed explicitly."""
    import av

    with av.open(str(path), format="g722") as container:
        return np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])
