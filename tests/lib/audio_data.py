"""Tiny sources for the audio tests: chirps over a steady tone, as real shards."""

import io
from pathlib import Path

import numpy as np
import soundfile

from megamm.shards.folder import ShardWriter

RATE = 16_000
FORMATS = {
    "flac": ("FLAC", "PCM_16"),
    "wav": ("WAV", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}


def chirp(number: int, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    """Return float32 `[samples]`: a gliding tone over a steady one, as a function of the number."""
    rng = np.random.default_rng(number)
    time = np.arange(round(seconds * rate)) / rate
    low, high = rng.uniform(150, 800), rng.uniform(800, 3000)
    glide = np.sin(2 * np.pi * (low * time + (high - low) * time**2 / (2 * seconds)))
    tone = 0.5 * np.sin(2 * np.pi * rng.uniform(150, 3000) * time)
    return ((glide + tone) * rng.uniform(0.1, 0.4)).astype(np.float32)


def as_bytes(samples: np.ndarray, extension: str = "flac", rate: int = RATE, subtype: str | None = None) -> bytes:
    """Return the file a user would have."""
    file = io.BytesIO()
    container, usual = FORMATS[extension]
    soundfile.write(file, samples, rate, format=container, subtype=subtype or usual)
    return file.getvalue()


def write_source(folder: Path, train: int, heldout: int) -> Path:
    """Write `folder/<split>/audio/` shards, without texts: a recogniser takes seconds per chirp."""
    for split, numbers in (("train", range(train)), ("heldout", range(10_000, 10_000 + heldout))):
        with ShardWriter(folder / split / "audio") as audio:
            for n in numbers:
                audio.add(f"s{n}", "flac", as_bytes(chirp(n)))
    return folder
