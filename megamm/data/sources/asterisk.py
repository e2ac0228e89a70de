"""Spoken telephone prompts, from the Asterisk project: English, French and Spanish, each with its own voice.

In: the unpacked Debian packages `asterisk-core-sounds-LANGUAGE` (the transcripts) and
`asterisk-core-sounds-LANGUAGE-g722` (the recordings: studio quality, 16 kHz, coded as ITU-T G.722). Out: FLAC, mono,
16 bit, 16 kHz, with the words as caption.

`write_asterisk`: the prompts with their transcripts. Prompts without words (tones, silence), whose transcript is a
remark in brackets, are skipped. A prompt and its translation have the same noun, that of the English words.

`write_digits`: spoken digits in new orders ("three one"), SEQUENCES of LENGTH digits for each language, chosen by hash
among all, joined from single recordings. A recording's silence is trimmed; otherwise it is unchanged. Between two
recordings is a pause of up to BEATS, also chosen by hash, and each starts on a beat of BEAT seconds, as if read to a
metronome. All sequences of a language have the same noun, so that only combinations are held out.
"""

import gzip
import hashlib
import re
from itertools import product
from pathlib import Path

import numpy as np

from megamm.common.errors import UserError
from megamm.data.raw.samples import RawPart, RawSample, clean_caption, normalise_noun
from megamm.data.sources.media import write_flac

SAMPLE_RATE = 16_000
_REMARK = ("[", "(", "<")
LENGTH, SEQUENCES, COPIES = 2, 100, 3
"""Digits in a sequence, sequences in a language, and copies of a sequence with different pauses."""
BEAT, BEATS = 0.05, 2
"""Seconds of a beat, and the maximum length of a pause in beats; it can be zero."""
_EDGE = 0.02
"""Seconds kept before and after the loud part."""
_QUIET = 0.03
"""Share of a recording's peak below which it counts as silence."""


def _languages(package: Path) -> list[tuple[str, Path, dict[str, str]]]:
    """Each language with the folder of its recordings and its transcripts by prompt name; English comes first."""
    lists = sorted(package.rglob("core-sounds-*.txt.gz"))
    folders = [folder for folder in (package / "usr/share/asterisk/sounds").glob("*") if folder.is_dir()]
    if not lists or not folders:
        raise UserError("no transcripts or no recordings in the packages", where=package, remedy="use Debian 12")
    languages = []
    for file in lists:
        language = file.name.removeprefix("core-sounds-").removesuffix(".txt.gz")
        (folder,) = (folder for folder in folders if folder.name.startswith(f"{language}_"))
        languages.append((language, folder, read_transcripts(gzip.decompress(file.read_bytes()).decode())))
    return languages


def write_asterisk(package: Path, target: Path) -> list[RawSample]:
    """Write the recordings under target/audio and return them with their transcripts, by language and prompt name."""
    languages = _languages(package)
    (target / "audio").mkdir()
    samples: list[RawSample] = []
    nouns: dict[str, str] = {}
    # English comes first, so a translation finds the noun of the English words.
    for language, folder, transcripts in languages:
        for name, transcript in sorted(transcripts.items()):
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


def write_digits(package: Path, target: Path) -> list[RawSample]:
    """Write the sequences under target/audio and return them with their words, by language and digits."""
    languages = _languages(package)
    (target / "audio").mkdir()
    samples = []
    for language, folder, transcripts in languages:
        spoken = {str(d): trimmed(decode_recording(folder / f"digits/{d}.g722")) for d in range(10)}
        for digits, copy in product(chosen_sequences(language), range(COPIES)):
            key = f"digits-{language}-{digits}-{copy}"
            pauses = [_pause(f"{key}-{position}") for position in range(LENGTH - 1)]
            write_flac(target / f"audio/{key}.flac", joined([spoken[d] for d in digits], pauses), SAMPLE_RATE)
            words = " ".join(transcripts[f"digits/{d}"].lower() for d in digits)
            parts = (RawPart("audio", f"audio/{key}.flac"), RawPart("text", words))
            samples.append(RawSample(key, f"digits {language}", parts))
    return samples


def chosen_sequences(language: str) -> list[str]:
    """SEQUENCES strings of LENGTH digits, in order: those with the smallest hashes."""
    # The smallest hashes: a random choice, to which a larger SEQUENCES only adds.
    every = ("".join(digits) for digits in product("0123456789", repeat=LENGTH))
    return sorted(sorted(every, key=lambda digits: _digest(f"{language} {digits}"))[:SEQUENCES])


def trimmed(samples: np.ndarray) -> np.ndarray:
    """int16 `[samples]` without the silence before and after."""
    # int32, because the absolute value of -32768 does not fit int16.
    loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > _QUIET * np.abs(samples.astype(np.int32)).max())
    edge = round(_EDGE * SAMPLE_RATE)
    return samples[max(0, loud[0] - edge) : loud[-1] + 1 + edge]


def joined(recordings: list[np.ndarray], pauses: list[int]) -> np.ndarray:
    """Join int16 recordings, each starting on a beat; pauses[i] more beats of silence follow number i, except the last.

    The last one is filled up to the next beat.
    """
    beat = round(BEAT * SAMPLE_RATE)
    return np.concatenate(
        [np.pad(r, (0, -len(r) % beat + p * beat)) for r, p in zip(recordings, [*pauses, 0], strict=True)]
    )


def _pause(name: str) -> int:
    """Number of beats, chosen by the hash of a name."""
    return int.from_bytes(_digest(name)[:8], "big") % (BEATS + 1)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
