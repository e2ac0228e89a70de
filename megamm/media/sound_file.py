"""Sound files (WAV, FLAC, Ogg Vorbis or Opus, MP3) to waveforms; refuses broken and hostile files with a reason.

In: the bytes of a file and its extension. Out: float32 `[samples]` mono at a given sample rate, or a digest. Decoded in
blocks, so that a file that declares years of sound uses little memory. Decoder: libsndfile. Resampling: polyphase,
band-limited (scipy.signal.resample_poly).
"""

import hashlib
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megamm.common.errors import UnreadableMedia

Waveform = npt.NDArray[np.float32]

CONTAINERS = {"flac": ("FLAC",), "wav": ("WAV", "WAVEX", "RF64"), "ogg": ("OGG",), "opus": ("OGG",), "mp3": ("MP3",)}
"""Extension -> libsndfile's names of the formats it may have."""
MAX_SECONDS = 2 * 3600
MIN_SECONDS = 0.05
MAX_PEAK = 8.0
"""Above this, a floating-point file holds integers or noise, not sound within [-1, 1]."""
SILENCE = 2.0**-15
"""A waveform that changes by less than one step of 16 bits is silent."""
RATES = (2_000, 384_000)
"""Hz; files that declare other rates are broken."""
BLOCK = 1 << 16
_UNKNOWN_SIZE = 0xFFFFFFFF
"""Size in the header of a WAV file that was written to a pipe."""
_END_OF_STREAM = 4
"""Flag in the header of an Ogg stream's last page (RFC 3533, section 6)."""


def check_sound(data: bytes, extension: str) -> str:
    """Decode everything; SHA-256 (hex) of rate and samples. Raises UnreadableMedia if unsuitable for training."""
    with _open(data, extension) as file:
        # Rate and channels are part of the content: the same samples at another rate are another sound.
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
        # Rounded up at the file's rate; the exact length is cut at the new rate.
        waveform = resample(np.concatenate(mono)[:wanted], file.samplerate, sample_rate)
    return waveform[: round(max_seconds * sample_rate)].clip(-1, 1)


def resample(waveform: Waveform, rate: int, new_rate: int) -> Waveform:
    """`[samples]` at one rate (Hz) to `[ceil(samples * new_rate / rate)]` at another, without aliasing.

    The waveform is unchanged if the rates are equal.
    """
    if rate == new_rate:
        return waveform
    from scipy.signal import resample_poly  # takes a second to import

    divisor = math.gcd(rate, new_rate)
    return resample_poly(waveform, new_rate // divisor, rate // divisor).astype(np.float32)


def _open(data: bytes, extension: str) -> Any:
    """A soundfile.SoundFile with a valid header. Raises UnreadableMedia if it is invalid."""
    import soundfile  # loads a shared library

    if not data:
        raise UnreadableMedia("zero bytes")
    if extension not in CONTAINERS:
        raise UnreadableMedia(f"extension {extension!r} is not one of {', '.join(CONTAINERS)}")
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        raise UnreadableMedia(f"not a sound file, or its header is broken: {error.error_string}") from error
    if file.format not in CONTAINERS[extension] or (extension == "opus" and file.subtype != "OPUS"):
        raise UnreadableMedia(f"a {file.format} ({file.subtype}) file with the extension .{extension}")
    if not RATES[0] <= file.samplerate <= RATES[1]:
        raise UnreadableMedia(f"unsupported sample rate of {file.samplerate} Hz")
    if file.frames > MAX_SECONDS * file.samplerate:
        raise UnreadableMedia(f"longer than {MAX_SECONDS // 60} minutes")
    if _is_cut_off(data, file.format):
        raise UnreadableMedia(f"truncated: the end of the {file.format} file is missing")
    return file


def _blocks(file: Any) -> Iterator[Waveform]:
    """All samples of an open file, float32 `[up to BLOCK, channels]`.

    Raises UnreadableMedia if broken, too short or too loud; a caller that stops early misses errors in the rest.
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
            raise UnreadableMedia("contains NaN or Inf samples")
        if np.abs(block).max() > MAX_PEAK:
            raise UnreadableMedia(f"samples above {MAX_PEAK}: floating-point sound is within [-1, 1]")
        decoded += len(block)
        yield block
    shortest = math.ceil(MIN_SECONDS * file.samplerate)
    # The declared number can be an estimate, so a difference shorter than MIN_SECONDS is accepted.
    if decoded + shortest < file.frames:
        raise UnreadableMedia(f"truncated: {decoded} of {file.frames} samples")
    if decoded < shortest:
        raise UnreadableMedia(f"shorter than {MIN_SECONDS} s")


def _is_cut_off(data: bytes, container: str) -> bool:
    """Whether a file ends before its header says, in cases where libsndfile would read it without an error."""
    if container in ("WAV", "WAVEX"):
        # RIFF: bytes 4 to 7 hold the file's size without the first 8 bytes.
        size = int.from_bytes(data[4:8], "little")
        return size != _UNKNOWN_SIZE and size + 8 > len(data)
    if container == "RF64":  # EBU Tech 3306: the 64-bit size is in the first chunk
        return int.from_bytes(data[20:28], "little") + 8 > len(data)
    if container == "OGG":
        # Ogg: byte 26 of a page's header is the number of segments, whose lengths follow; flags are byte 5.
        last = data.rfind(b"OggS")
        lengths = data[last + 27 : last + 27 + data[last + 26]] if last + 27 <= len(data) else b""
        complete = last + 27 + len(lengths) + sum(lengths) <= len(data) and bool(lengths)
        return not (complete and data[last + 5] & _END_OF_STREAM)
    return False
