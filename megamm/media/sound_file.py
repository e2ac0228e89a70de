"""Sound files (WAV, FLAC, Ogg Vorbis or Opus, MP3, AAC, M4A) to waveforms; refuses broken files with a reason.

In: the bytes of a file and its extension. Out: float32 `[samples]` mono at a given sample rate, or a digest. Decoded in
blocks, so that a file that declares years of sound uses little memory. Decoders: libsndfile; FFmpeg for AAC and ALAC,
and for MP3, because libsndfile stops at an estimated length if there is no Xing header. scipy's
resample_poly changes the sample rate.

The length of a sound is that of its data (media/sound_length.py): headers of files from a pipe have none, and a decoder
that stops before the packets of the file end is noticed.
"""

import hashlib
import io
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megamm.common.errors import UnreadableMedia
from megamm.media.mp3_frames import after_id3, mp3_frames
from megamm.media.sound_length import (
    adts_frames,
    flac_links,
    flac_with_length,
    mp3_declared_samples,
    ogg_links,
    packet_seconds,
    wav_with_length,
)

Waveform = npt.NDArray[np.float32]

CONTAINERS = {"flac": ("FLAC",), "wav": ("WAV", "WAVEX", "RF64"), "ogg": ("OGG",), "opus": ("OGG",), "mp3": ("MP3",)}
"""Extension -> libsndfile's names of the formats it may have."""
_MPEG4 = {"m4a": "M4A", "aac": "AAC"}
"""Extension -> name of a format that only FFmpeg reads: AAC or ALAC in MP4; AAC in ADTS frames."""
_MPEG4_CODECS = ("aac", "alac")
_OTHER_OGG = {b"FLAC": "FLAC", b"Speex": "Speex", b"theora": "Theora video", b"fishead": "several streams"}
_MAX_PLANES = 8
"""Channels of a frame that PyAV can read: of more, it reads behind FFmpeg's list of planes, and the process crashes."""
SOUND_EXTENSIONS = (*CONTAINERS, *_MPEG4)
_SCALES = {"fltp": 1.0, "s16p": 2.0**-15, "s32p": 2.0**-31}
"""FFmpeg's name of a format of samples -> the factor to [-1, 1]; ALAC has integers."""
MAX_SECONDS = 2 * 3600
MIN_SECONDS = 0.05
MAX_PEAK = 8.0
"""Above this, a floating-point file holds integers or noise, not sound within [-1, 1]."""
SILENCE = 2.0**-15
"""A waveform that changes by less than one step of 16 bits is silent."""
RATES = (2_000, 384_000)
"""Hz; files that declare other rates are broken."""
BLOCK = 1 << 16


@dataclass(frozen=True)
class Sound:
    """An open file: its rate (Hz), channels, and samples as blocks float32 `[up to BLOCK, channels]`."""

    samplerate: int
    channels: int
    blocks: Iterator[Waveform]


def check_sound(data: bytes, extension: str) -> str:
    """Decode everything; SHA-256 (hex) of rate and samples. Raises UnreadableMedia if unsuitable for training."""
    with open_sound(data, extension) as file:
        # Rate and channels are part of the content: the same samples at another rate are another sound.
        digest = hashlib.sha256(f"{file.samplerate} Hz {file.channels}".encode())
        lowest, highest = math.inf, -math.inf
        for block in file.blocks:
            digest.update(block.tobytes())
            mono = block.mean(axis=1)
            lowest, highest = min(lowest, float(mono.min())), max(highest, float(mono.max()))
    if highest - lowest < SILENCE:
        raise UnreadableMedia("silence")
    return digest.hexdigest()


def read_waveform(data: bytes, extension: str, sample_rate: int, max_seconds: float) -> Waveform:
    """The first max_seconds as float32 `[samples]` in [-1, 1], mono (the mean of the channels), at sample_rate (Hz)."""
    with open_sound(data, extension) as file:
        wanted, mono, read = math.ceil(max_seconds * file.samplerate), [], 0
        for block in file.blocks:
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


@contextmanager
def open_sound(data: bytes, extension: str) -> Iterator[Sound]:
    """The sound of a file with a valid header. Raises UnreadableMedia if it is invalid, also while it is read."""
    if not data:
        raise UnreadableMedia("zero bytes")
    if extension not in SOUND_EXTENSIONS:
        raise UnreadableMedia(f"extension {extension!r} is not one of {', '.join(SOUND_EXTENSIONS)}")
    if extension in _MPEG4:
        with _open_mpeg4(data, extension) as sound:
            yield sound
        return
    if extension == "flac":
        data = data[after_id3(data) :]  # some taggers put ID3v2 before it
    elif extension == "mp3":
        data = mp3_frames(data)
    # libsndfile reads the header of every format, also of MP3, whose data FFmpeg decodes.
    with _sound_file(_with_length(data)) as file:
        if file.format not in CONTAINERS[extension] or (extension == "opus" and file.subtype != "OPUS"):
            raise UnreadableMedia(f"a {file.format} ({file.subtype}) file with the extension .{extension}")
        _check_rate(file.samplerate)
        # The declared length of MP3 can be an estimate: `_checked` counts what is decoded.
        if file.format != "MP3" and file.frames > MAX_SECONDS * file.samplerate:
            raise UnreadableMedia(f"longer than {MAX_SECONDS // 60} minutes")
        if file.format == "MP3":
            blocks, declared = _mp3_blocks(data, file.samplerate), mp3_declared_samples(data)
        elif file.format == "OGG":
            blocks, declared = _link_blocks(ogg_links(data), file.samplerate), 0
        elif file.format == "FLAC":
            blocks, declared = _link_blocks(flac_links(data), file.samplerate), 0
        else:
            blocks, declared = _blocks(file), file.frames
        yield Sound(file.samplerate, file.channels, _checked(blocks, file.format, file.samplerate, declared, data))


@contextmanager
def _open_mpeg4(data: bytes, extension: str) -> Iterator[Sound]:
    """The sound of an MP4 or ADTS file. Edit lists are applied: they cut the encoder's delay, and what users cut."""
    name, seconds = _MPEG4[extension], 0.0
    is_mp4 = data[4:8] == b"ftyp"
    if is_mp4 != (extension == "m4a"):
        raise UnreadableMedia(f"{'an MP4' if is_mp4 else 'not an MP4'} file with the extension .{extension}")
    if not is_mp4:
        data, seconds = adts_frames(data)
    with _av_file(data, "mp4" if is_mp4 else "aac", name) as container:
        streams = container.streams.audio
        if len(streams) != 1:
            raise UnreadableMedia(f"has {len(streams)} sound tracks, not one")
        stream = streams[0]
        codec = stream.codec_context.name if stream.codec_context else "unknown"
        if codec not in _MPEG4_CODECS:
            raise UnreadableMedia(f"its sound is neither AAC nor ALAC, but {codec}")
        frames = _av_frames(container, stream, name)
        # The header has half the rate and channels of HE-AAC, so the first frame is asked.
        first = next(frames, None)
        if first is None:
            raise UnreadableMedia(f"shorter than {MIN_SECONDS} s")
        _check_rate(first.sample_rate)
        declared = round((seconds or float((stream.duration or 0) * stream.time_base)) * first.sample_rate)
        if declared > MAX_SECONDS * first.sample_rate:
            raise UnreadableMedia(f"longer than {MAX_SECONDS // 60} minutes")
        blocks = (_av_block(frame, first.sample_rate, name) for frame in itertools.chain([first], frames))
        checked = _checked(blocks, name, first.sample_rate, declared, data)
        yield Sound(first.sample_rate, first.layout.nb_channels, checked)


def _check_rate(rate: int) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise UnreadableMedia(f"unsupported sample rate of {rate} Hz")


def _sound_file(data: bytes) -> Any:
    """A soundfile.SoundFile. Raises UnreadableMedia if libsndfile cannot open it."""
    import soundfile  # loads a shared library

    try:
        return soundfile.SoundFile(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        # The first packet of an Ogg stream, behind a page header with one length, begins with the name of its codec.
        codec = next(
            (name for mark, name in _OTHER_OGG.items() if data.startswith(b"OggS") and mark in data[27:37]), ""
        )
        if codec:
            raise UnreadableMedia(f"an Ogg file of {codec}, only Vorbis and Opus are read: convert it") from error
        raise UnreadableMedia(f"not a sound file, or its header is broken: {error.error_string}") from error


def _with_length(data: bytes) -> bytes:
    """The file with its true length in the header, where the format has one."""
    if data.startswith((b"RIFF", b"RIFX", b"RF64")):
        return wav_with_length(data)
    return flac_with_length(data) if data.startswith(b"fLaC") else data


def _checked(blocks: Iterator[Waveform], container: str, rate: int, declared: int, data: bytes) -> Iterator[Waveform]:
    """The blocks, each checked; after the last one, compare their length with the header's and the packets'.

    Raises UnreadableMedia if broken, too short or too loud; a caller that stops early misses errors in the rest.
    """
    decoded = 0
    for block in blocks:
        if not np.isfinite(block).all():
            raise UnreadableMedia("contains NaN or Inf samples")
        if np.abs(block).max() > MAX_PEAK:
            raise UnreadableMedia(f"samples above {MAX_PEAK}: floating-point sound is within [-1, 1]")
        decoded += len(block)
        if decoded > MAX_SECONDS * rate:
            raise UnreadableMedia(f"longer than {MAX_SECONDS // 60} minutes")
        yield block
    shortest = math.ceil(MIN_SECONDS * rate)
    # The declared number can be an estimate, so a difference shorter than MIN_SECONDS is accepted.
    if decoded + shortest < declared:
        raise UnreadableMedia(f"truncated: {decoded} of {declared} samples")
    if decoded < shortest:
        raise UnreadableMedia(f"shorter than {MIN_SECONDS} s")
    seconds = packet_seconds(data, container)
    if decoded / rate < seconds:
        raise UnreadableMedia(f"the decoder of {container} stops after {decoded / rate:.2f} of {seconds:.2f} s")


def _blocks(file: Any) -> Iterator[Waveform]:
    """All samples that libsndfile reads from an open file."""
    import soundfile

    while True:
        try:
            block = file.read(BLOCK, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise UnreadableMedia(f"broken {file.format} data: {error.error_string}") from error
        if not len(block):
            return
        yield block


def _link_blocks(links: list[bytes], rate: int) -> Iterator[Waveform]:
    """The samples of Ogg or FLAC files behind each other: libsndfile reads only the first."""
    for link in links:
        with _sound_file(link) as file:
            if file.samplerate != rate:
                raise UnreadableMedia(f"its sample rate changes from {rate} to {file.samplerate} Hz")
            read = 0
            for block in _blocks(file):
                read += len(block)
                yield block
            if file.format == "FLAC" and read < file.frames:
                raise UnreadableMedia(f"truncated: {read} of {file.frames} samples")


def _mp3_blocks(data: bytes, rate: int) -> Iterator[Waveform]:
    """The samples that FFmpeg decodes from MP3 data."""
    with _av_file(data, "mp3", "MP3") as container:
        for frame in _av_frames(container, container.streams.audio[0], "MP3"):
            yield _av_block(frame, rate, "MP3")


def _av_file(data: bytes, demuxer: str, name: str) -> Any:
    """An av.InputContainer. Raises UnreadableMedia if FFmpeg cannot open it."""
    import av

    try:
        # The text of tags is not needed, and often in another encoding than UTF-8.
        return av.open(io.BytesIO(data), mode="r", format=demuxer, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        raise UnreadableMedia(f"not an {name} file, or its header is broken: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """FFmpeg's reason alone: PyAV adds a log line to its text."""
    return str(getattr(error, "strerror", None) or error)


def _av_frames(container: Any, stream: Any, name: str) -> Iterator[Any]:
    """The av.AudioFrames of a stream. Raises UnreadableMedia at the first error, which FFmpeg would conceal."""
    import av

    stream.codec_context.options = {"err_detect": "explode"}
    try:
        yield from container.decode(stream)
    except (av.FFmpegError, ValueError) as error:
        raise UnreadableMedia(f"broken {name} data: {_reason(error)}") from error


def _av_block(frame: Any, rate: int, name: str) -> Waveform:
    """The samples `[samples, channels]` of an av.AudioFrame. Raises UnreadableMedia if it has another rate."""
    if frame.sample_rate != rate:
        raise UnreadableMedia(f"its sample rate changes from {rate} to {frame.sample_rate} Hz")
    if frame.format.name not in _SCALES:
        raise UnreadableMedia(f"broken {name} data: samples of the format {frame.format.name}")
    if frame.layout.nb_channels > _MAX_PLANES:
        raise UnreadableMedia(f"has {frame.layout.nb_channels} channels, more than {_MAX_PLANES}")
    samples: Waveform = frame.to_ndarray().T * np.float32(_SCALES[frame.format.name])
    return samples.astype(np.float32, copy=False)
