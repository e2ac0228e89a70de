"""Spoken digits in new orders: sequences joined from single recordings of the Asterisk project's prompts.

In: the unpacked packages of `asterisk` (data/sources/asterisk.py), of one or more languages, each with its own voice.
Out: FLAC, mono, 16 bit, 16 kHz, with the words as caption ("three one four"), SEQUENCES of LENGTH digits for each
language, chosen by hash among all. A recording's silence is trimmed; otherwise it is unchanged. Between two recordings
is a pause of BEATS, also chosen by hash, and each starts on a beat of BEAT seconds, as if read to a metronome.
All sequences of a language have the same noun, so that only combinations are held out.
"""

import gzip
import hashlib
from itertools import product
from pathlib import Path

import numpy as np

from megamm.common.errors import UserError
from megamm.data.raw.samples import RawPart, RawSample
from megamm.data.sources.asterisk import SAMPLE_RATE, decode_recording, read_transcripts
from megamm.data.sources.media import write_flac

LENGTH = 2
SEQUENCES = 100
COPIES = 3
BEAT = 0.05
BEATS = 2
"""Maximum length of a pause; it can be zero."""
_EDGE = 0.02
"""Seconds kept before and after the loud part."""
_QUIET = 0.03
"""Share of a recording's peak below which it counts as silence."""


def write_digits(package: Path, target: Path) -> list[RawSample]:
    """Write the sequences under target/audio and return them with their words, by language and digits."""
    lists = sorted(package.rglob("core-sounds-*.txt.gz"))
    folders = [folder for folder in (package / "usr/share/asterisk/sounds").glob("*") if folder.is_dir()]
    if not lists or not folders:
        raise UserError("no transcripts or no recordings in the packages", where=package, remedy="use Debian 12")
    (target / "audio").mkdir()
    samples = []
    for file in lists:
        language = file.name.removeprefix("core-sounds-").removesuffix(".txt.gz")
        (folder,) = (folder for folder in folders if folder.name.startswith(f"{language}_"))
        transcripts = read_transcripts(gzip.decompress(file.read_bytes()).decode())
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
    every = ("".join(digits) for digits in product("0123456789", repeat=LENGTH))
    return sorted(sorted(every, key=lambda digits: _digest(f"{language} {digits}"))[:SEQUENCES])


def trimmed(samples: np.ndarray) -> np.ndarray:
    """int16 `[samples]` without the silence before and after."""
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
