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


def as_mpeg4(samples: np.ndarray, extension: str, codec: str = "aac", rate: int = RATE, **options: str) -> bytes:
    """Return a file that FFmpeg writes; "m4a" with an edit list for the encoder's delay, "aac" (ADTS) without one."""
    import av

    file, channels = io.BytesIO(), np.atleast_2d(samples.T)
    layout = {1: "mono", 2: "stereo"}[len(channels)]
    with av.open(file, "w", format={"m4a": "mp4", "aac": "adts"}[extension], options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        for start in range(0, channels.shape[1], 1024):
            block = np.ascontiguousarray(channels[:, start : start + 1024], np.float32)
            if codec == "alac":
                block = (block * 2**15).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(block, format="s16p" if codec == "alac" else "fltp", layout=layout)
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def write_source(folder: Path, train: int, heldout: int) -> Path:
    """Write `folder/<split>/audio/` shards, without texts: a recogniser takes seconds per chirp."""
    for split, numbers in (("train", range(train)), ("heldout", range(10_000, 10_000 + heldout))):
        with ShardWriter(folder / split / "audio") as audio:
            for n in numbers:
                audio.add(f"s{n}", "flac", as_bytes(chirp(n)))
    return folder
