"""Sound files (WAV, FLAC, Ogg Vorbis or Opus, MP3) to waveforms; hostile and broken ones are refused in words.

In: the bytes of a file and its ending. Out: float32 `[samples]` mono at a wanted sample rate, or a digest. Decoded in
blocks, so that a file which claims years of sound costs no memory. Decoder: libsndfile. Resampling: polyphase,
band-limited (scipy.signal.resample_poly).
"""

import hashlib
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megamm.modalities.base import UnreadableMedia

Waveform = npt.NDArray[np.float32]

CONTAINERS = {"flac": ("FLAC",), "wav": ("WAV", "WAVEX", "RF64"), "ogg": ("OGG",), "opus": ("OGG",), "mp3": ("MP3",)}
"""Ending -> libsndfile's names of the formats it may hold."""
MAX_SECONDS = 2 * 3600
MIN_SECONDS = 0.05
MAX_PEAK = 8.0
"""Above, a file of floating-point samples holds integers or noise, not sound within [-1, 1]."""
SILENCE = 2.0**-15
"""A waveform that moves by less than one step of 16 bits."""
RATES = (2_000, 384_000)
"""Hz; files that claim others are broken."""
BLOCK = 1 << 16
_UNKNOWN_SIZE = 0xFFFFFFFF
"""What a WAV file says that was written to a pipe."""
_END_OF_STREAM = 4
"""Flag in the header of an Ogg stream's last page (RFC 3533, section 6)."""


def check_sound(data: bytes, extension: str) -> str:
    """Decode all of it; SHA-256 (hex) of rate and samples. UnreadableMedia if it cannot be used for training."""
    with _open(data, extension) as file:
        digest = hashlib.sha256(f"{file.samplerate} Hz {file.channels}".encode())
        lowest, highest = math.inf, -math.inf
        for block in _blocks(file):
            digest.update(block.tobytes())
            mono = block.mean(axis=1)
            lowest, highest = min(lowest, float(mono.min())), max(highest, float(mono.max()))
    if highest - lowest < SILENCE:
        raise UnreadableMedia("silence")
    return digest.hexdigest()


def read_waveform(data: bytes, extension: str, sample_rate: int, max_seconds: float) -> Waveform:
    """The first max_seconds as float32 `[samples]` in [-1, 1], mono (the mean of the channels), at sample_rate (Hz)."""
    with _open(data, extension) as file:
        wanted, mono, read = math.ceil(max_seconds * file.samplerate), [], 0
        for block in _blocks(file):
            mono.append(block.mean(axis=1))
            read += len(block)
            if read >= wanted:
                break
        waveform = resample(np.concatenate(mono)[:wanted], file.samplerate, sample_rate)
    return waveform[: round(max_seconds * sample_rate)].clip(-1, 1)


def resample(waveform: Waveform, rate: int, new_rate: int) -> Waveform:
    """`[samples]` at one rate (Hz) to `[ceil(samples * new_rate / rate)]` at another; nothing above half of it is left.

    As it is where the rates are equal.
    """
    if rate == new_rate:
        return waveform
    from scipy.signal import resample_poly  # a second to import

    divisor = math.gcd(rate, new_rate)
    return resample_poly(waveform, new_rate // divisor, rate // divisor).astype(np.float32)


def _open(data: bytes, extension: str) -> Any:
    """A soundfile.SoundFile whose header makes sense. UnreadableMedia if not."""
    import soundfile  # loads a shared library

    if not data:
        raise UnreadableMedia("zero bytes")
    if extension not in CONTAINERS:
        raise UnreadableMedia(f"ending {extension!r} is not one of {', '.join(CONTAINERS)}")
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        raise UnreadableMedia(f"not a sound file, or its header is broken: {error.error_string}") from error
    if file.format not in CONTAINERS[extension] or (extension == "opus" and file.subtype != "OPUS"):
        raise UnreadableMedia(f"a {file.format} ({file.subtype}) file with the ending .{extension}")
    if not RATES[0] <= file.samplerate <= RATES[1]:
        raise UnreadableMedia(f"a sample rate of {file.samplerate} Hz")
    if file.frames > MAX_SECONDS * file.samplerate:
        raise UnreadableMedia(f"longer than {MAX_SECONDS // 60} minutes")
    if _is_cut_off(data, file.format):
        raise UnreadableMedia(f"cut off: the end of the {file.format} file is missing")
    return file


def _blocks(file: Any) -> Iterator[Waveform]:
    """All samples of an open file, float32 `[up to BLOCK, channels]`. UnreadableMedia if broken, too short or too loud.

    A caller that stops early sees no fault in the rest.
    """
    import soundfile

    decoded = 0
    while True:
        try:
            block = file.read(BLOCK, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise UnreadableMedia(f"broken {file.format} data: {error.error_string}") from error
        if not len(block):
            break
        if not np.isfinite(block).all():
            raise UnreadableMedia("samples that are NaN or infinite")
        if np.abs(block).max() > MAX_PEAK:
            raise UnreadableMedia(f"samples above {MAX_PEAK}: floating-point sound is within [-1, 1]")
        decoded += len(block)
        yield block
    shortest = math.ceil(MIN_SECONDS * file.samplerate)
    if decoded + shortest < file.frames:
        raise UnreadableMedia(f"cut off: {decoded} samples of {file.frames}")
    if decoded < shortest:
        raise UnreadableMedia(f"shorter than {MIN_SECONDS} s")


def _is_cut_off(data: bytes, container: str) -> bool:
    """Whether a file ends before its header says, where libsndfile would read what is left without a word."""
    if container in ("WAV", "WAVEX"):
        size = int.from_bytes(data[4:8], "little")
        return size != _UNKNOWN_SIZE and size + 8 > len(data)
    if container == "RF64":  # EBU Tech 3306: the size in 64 bits comes in the first chunk
        return int.from_bytes(data[20:28], "little") + 8 > len(data)
    if container == "OGG":
        last = data.rfind(b"OggS")
        lengths = data[last + 27 : last + 27 + data[last + 26]] if last + 27 <= len(data) else b""
        complete = last + 27 + len(lengths) + sum(lengths) <= len(data) and bool(lengths)
        return not (complete and data[last + 5] & _END_OF_STREAM)
    return False
