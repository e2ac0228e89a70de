"""Video files with PyAV (FFmpeg): bytes -> frames with their times, upright and in RGB; frames -> mp4 bytes.

Only the video stream that FFmpeg selects is read; sound belongs to another modality. Only the given bytes are opened:
the file's extension fixes the container format, so playlists and references are not followed.

A codec gets the frames shown at 0, 1 / rate, 2 / rate, ... seconds after the first one. A frame is shown from its
timestamp until the next one's, so any frame rate, constant or not, is sampled by time. Every decoder uses the sampling
functions of this module.

A file that was cut out of another one can begin with packets that refer to frames before the cut (open GOP). They
cannot be decoded and are not frames of the file; it begins with the first frame that can be decoded.
"""

import hashlib
import io
import math
import re
import struct
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from megamm.common.errors import UnreadableMedia
from megamm.media.image_file import PixelArray, pad_to_square

FrameArray = npt.NDArray[np.uint8]
MAX_PIXELS = 2**25
"""Maximum pixels of one frame: 8K (7680 x 4320) and a little more."""
MAX_SECONDS = 600.0
MAX_DECODED_PIXELS = 2**35
"""Maximum pixels of all frames, minutes of decoding: eleven minutes of 1920 x 1080 at 25 Hz."""
MISSING_FRAMES, MISSING_SHARE = 2, 0.05
"""How far before its declared duration a file may end; a file that ends earlier is truncated."""

_MP4, _MATROSKA = "mp4", "matroska"
_CONTAINER = {"mp4": _MP4, "mov": _MP4, "webm": _MATROSKA, "mkv": _MATROSKA}
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
"""The first box of an MP4 or QuickTime file is one of these."""
_EBML = b"\x1a\x45\xdf\xa3"
_TRANSPOSE = {
    (False, True, False): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, False, True): Image.Transpose.FLIP_TOP_BOTTOM,
    (False, True, True): Image.Transpose.ROTATE_180,
    (True, False, False): Image.Transpose.TRANSPOSE,
    (True, True, False): Image.Transpose.ROTATE_270,
    (True, False, True): Image.Transpose.ROTATE_90,
    (True, True, True): Image.Transpose.TRANSVERSE,
}
"""By the fields of `Orientation`, in their order."""
_LARGEST_TILT = math.tan(math.radians(1))
"""Display matrices are rounded; up to this, FFmpeg also treats a rotation as a quarter turn."""


class VideoSizes(Protocol):
    """Input sizes of a visual codec or its config; units as in tokenizers/visual/model.py."""

    @property
    def image_size(self) -> int: ...
    @property
    def frame_rate(self) -> float: ...
    @property
    def max_frames(self) -> int: ...
    @property
    def frames_per_step(self) -> int: ...


@dataclass(frozen=True)
class Orientation:
    """How a stored picture becomes upright: its axes are swapped, then columns (left-right) and rows are reversed."""

    swaps_axes: bool = False
    flips_columns: bool = False
    flips_rows: bool = False

    def image(self, stored: Image.Image) -> Image.Image:
        """The upright picture."""
        transpose = _TRANSPOSE.get((self.swaps_axes, self.flips_columns, self.flips_rows))
        return stored if transpose is None else stored.transpose(transpose)

    def frames(self, stored: FrameArray) -> FrameArray:
        """Upright frames of `[F, Y, X, 3]`."""
        upright = stored.swapaxes(1, 2) if self.swaps_axes else stored
        upright = upright[:, :, ::-1] if self.flips_columns else upright
        return np.ascontiguousarray(upright[:, ::-1] if self.flips_rows else upright)


def orientation_of(frame: Any) -> Orientation:
    """The orientation of an av.VideoFrame. Raises UnreadableMedia for a rotation that is not a quarter turn."""
    side_data = frame.side_data.get("DISPLAYMATRIX")
    # Fixed-point rows (a, b, u), (c, d, v), (x, y, w): the pixel (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = struct.unpack("=5i", bytes(side_data)[:20]) if side_data else (1, 0, 0, 0, 1)
    straight, turned = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, turned) > _LARGEST_TILT * max(straight, turned):
        degrees = math.degrees(math.atan2(b, a))
        raise UnreadableMedia(f"rotated by {degrees:.0f} degrees; only quarter turns are supported")
    if turned > straight:
        return Orientation(True, flips_columns=c < 0, flips_rows=b < 0)
    return Orientation(False, flips_columns=a < 0, flips_rows=d < 0)


@dataclass(frozen=True)
class ShownFrame:
    """A decoded frame (av.VideoFrame) and the time it is shown, in seconds from the first.

    pixel_aspect: width of a stored pixel over its height.
    """

    start: float
    end: float
    frame: Any
    pixel_aspect: float

    def image(self) -> Image.Image:
        """The frame in RGB and upright, in stored pixels."""
        return orientation_of(self.frame).image(self.frame.to_image())

    def square(self, size: int) -> PixelArray:
        """uint8 `[size, size, 3]`, aspect kept, padded like an image."""
        swaps = orientation_of(self.frame).swaps_axes
        return pad_to_square(self.image(), size, 1 / self.pixel_aspect if swaps else self.pixel_aspect)


def video_frames(data: bytes, extension: str, sizes: VideoSizes) -> FrameArray:
    """Video bytes to the codec's input, uint8 `[F, Y, X, 3]`. Raises UnreadableMedia if the part read is broken."""
    frames = sampled_squares(data, extension, sizes.frame_rate, sizes.max_frames, sizes.image_size)
    return frames[: usable_frames(len(frames), sizes.max_frames, sizes.frames_per_step)]


def sampled_squares(data: bytes, extension: str, frame_rate: float, limit: int, size: int) -> FrameArray:
    """The frames shown at 0, 1 / frame_rate, ... s, uint8 `[F, size, size, 3]`, F from 1 to `limit`.

    Later frames are not decoded. Raises UnreadableMedia if broken, truncated or of the wrong format.
    """
    # A frame counts as often as samples fall into the time it is shown: 0 times, once, or repeatedly.
    squares: list[PixelArray] = []
    first = None
    with closing(shown_frames(data, extension)) as frames:
        for shown in frames:
            first = first or shown
            repeats = min(samples_before(shown.end, frame_rate), limit) - len(squares)
            if repeats > 0:
                squares += [shown.square(size)] * repeats
            if len(squares) == limit:
                break
    assert first, "shown_frames yields a frame or raises"
    return np.stack(squares or [first.square(size)])


def digest_of_frames(data: bytes, extension: str) -> str:
    """Decode everything; SHA-256 (hex) of the frames. UnreadableMedia if broken, truncated, too long or too large."""
    digest, pixels = hashlib.sha256(), 0
    for shown in shown_frames(data, extension):
        image = shown.image()
        pixels += image.width * image.height
        if shown.end > MAX_SECONDS:
            raise UnreadableMedia(f"longer than {MAX_SECONDS:g} s; cut it into clips")
        if pixels > MAX_DECODED_PIXELS:
            raise UnreadableMedia(f"more than {MAX_DECODED_PIXELS} pixels in all its frames; cut it into clips")
        digest.update(f"{image.width} x {image.height}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


def shown_frames(data: bytes, extension: str) -> Generator[ShownFrame, None, None]:
    """Every frame in display order, at least one. Raises UnreadableMedia if broken or truncated, also after some."""
    with open_video(data, extension) as (container, stream):
        yield from _decode(container, stream)


@contextmanager
def open_video(data: bytes, extension: str) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and video stream, with a decoder that does not hide damage; closed on exit.

    Raises UnreadableMedia if the file is broken, of another format or too large, and for FFmpeg's exceptions inside.
    """
    import av  # FFmpeg's libraries are not needed to read text

    # Detect the container from the first bytes, and name it to FFmpeg, so that it does not probe other formats.
    _check_container(data, extension)
    try:
        # The text of tags is not needed, and often in another encoding than UTF-8.
        with av.open(io.BytesIO(data), format=_CONTAINER[extension], metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None:
                raise UnreadableMedia("contains no video")
            _check_size(stream.codec_context)
            # The limit is for sizes that are not in the header; it includes padding.
            # "explode": report damage as an error, instead of concealing it with pixels of other frames.
            stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(2 * MAX_PIXELS)}
            # Without "unaligned", FFmpeg keeps columns that a file crops on the left, for faster access to the rows.
            stream.codec_context.flags |= av.codec.context.Flags.unaligned
            yield container, stream
    except UnreadableMedia:
        raise
    except Exception as error:  # FFmpeg's errors have many classes; PyAV adds some for damaged headers
        raise UnreadableMedia(f"broken {extension} data: {type(error).__name__}") from error


def _check_container(data: bytes, extension: str) -> None:
    """Raise UnreadableMedia unless the first bytes are those of the extension's container."""
    if not data:
        raise UnreadableMedia("zero bytes")
    wanted = _CONTAINER.get(extension)
    found = _MP4 if data[4:8] in _MP4_BOXES else _MATROSKA if data.startswith(_EBML) else None
    if found is None:
        raise UnreadableMedia("neither MP4 (QuickTime) nor Matroska (WebM)")
    if found != wanted:
        raise UnreadableMedia(f"{'an MP4' if found == _MP4 else 'a Matroska'} file with the extension .{extension}")


def _decode(container: Any, stream: Any) -> Iterator[ShownFrame]:
    """Every frame with the times at which it is shown; the end of the file is checked after the last one."""
    aspect = float(stream.sample_aspect_ratio or 1)
    gap = 1 / stream.average_rate if stream.average_rate else Fraction(0)
    previous, start, origin = None, Fraction(0), None
    decoder = PacketDecoder()
    for frame in decoder.frames(container, stream):
        if frame.pts is None:
            raise UnreadableMedia("a frame has no timestamp")
        _check_size(frame)  # the size can change
        time = frame.pts * frame.time_base
        origin = time if origin is None else origin
        # A frame's end is the next one's start, so each is yielded one step late.
        if previous is not None:
            gap = time - origin - start
            yield ShownFrame(float(start), float(time - origin), previous, aspect)
        previous, start = frame, time - origin
    if previous is None or origin is None:
        raise UnreadableMedia("no readable frame")
    # A decoder that gives up early without an error leaves packets behind.
    if decoder.last > previous.pts:
        missing = float((decoder.last - previous.pts) * stream.time_base)
        raise UnreadableMedia(f"the decoder stops {missing:.2f} s before the last frame")
    # The last frame has no successor: use its own duration, else the gap before it.
    gap = previous.duration * previous.time_base or gap
    end = start + gap
    check_end(container, stream, end, origin, gap)
    yield ShownFrame(float(start), float(end), previous, aspect)


class PacketDecoder:
    """Decodes packets, without errors of those that refer to frames before the beginning of the file or of a seek.

    keyframe: presentation time (ticks) of the keyframe from which on all is decodable; None: that of the first one.
    last: presentation time of the last packet that holds a visible frame; before any packet, a low number.
    """

    def __init__(self, keyframe: int | None = None) -> None:
        self.keyframe, self.last = keyframe, -(1 << 63)
        self._is_cut, self._keyframes = keyframe is not None, 0
        self._doubtful: set[int] = set()
        """Times of packets with an error that is none if their frames are decoded."""

    def frames(self, container: Any, stream: Any) -> Iterator[Any]:
        """The frames of the rest of the file, in display order."""
        for packet in container.demux(stream):
            yield from self.decode(packet, stream)
        if self._doubtful:
            raise UnreadableMedia(f"{len(self._doubtful)} frames cannot be decoded")

    def decode(self, packet: Any, stream: Any) -> list[Any]:
        """The frames that the decoder returns for a packet."""
        import av

        time = packet.pts
        if packet.size and not packet.is_discard and not is_hidden(packet, stream) and time is not None:
            self.last = max(self.last, time)
        if packet.is_keyframe and packet.size:
            if time is None:
                raise UnreadableMedia("a frame has no timestamp")
            self.keyframe = time if self.keyframe is None else self.keyframe
            self._keyframes += time >= self.keyframe
        # Leading pictures: decoded before or after the keyframe, but shown before it.
        is_leading = packet.size > 0 and (self.keyframe is None or (time is not None and time < self.keyframe))
        self._is_cut = self._is_cut or is_leading
        try:
            frames = list(packet.decode())
        except av.FFmpegError:
            if is_leading:
                return []
            # H.264 may tell the decoder to forget frames before the cut. Such a frame itself is decoded whole.
            if not (self._is_cut and self._keyframes == 1 and packet.size and time is not None):
                raise
            self._doubtful.add(time)
            return []
        if any(frame.pts in self._doubtful and frame.is_corrupt for frame in frames):
            raise UnreadableMedia("a frame is damaged")
        self._doubtful.difference_update(frame.pts for frame in frames)
        return frames


def is_hidden(packet: Any, stream: Any) -> bool:
    """Whether its frame is never shown: VP8 has a flag in the first byte (RFC 6386, section 9.1: show_frame)."""
    return stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


def check_end(container: Any, stream: Any, end: Fraction, origin: Fraction, gap: Fraction) -> None:
    """Raise UnreadableMedia if the file ends too early. Seconds: end from the first frame, at origin."""
    declared = _declared_duration(container, stream)
    # Declared durations are imprecise, for example rounded to milliseconds or to whole frames.
    missing = max(MISSING_FRAMES * gap, Fraction(MISSING_SHARE) * declared)
    if max(end, end + origin) < declared - missing:
        raise UnreadableMedia(f"truncated: it ends after {float(end):.2f} s of {float(declared):.2f} s")


def _check_size(given: Any) -> None:
    if given.width * given.height > MAX_PIXELS:
        raise UnreadableMedia(f"{given.width} x {given.height} is more than {MAX_PIXELS} pixels")


def _declared_duration(container: Any, stream: Any) -> Fraction:
    """Duration of the video stream in seconds; 0 if the file does not declare one."""
    if stream.duration:
        return stream.duration * stream.time_base
    # Matroska has no duration per stream; muxers write it as a tag, "00:00:05.500000000".
    if tag := re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + Fraction(tag[3])
    return Fraction(container.duration or 0, 1_000_000) if len(container.streams) == 1 else Fraction(0)


def write_mp4(frames: npt.NDArray[np.uint8], frame_rate: float) -> bytes:
    """uint8 `[F, Y, X, 3]`, Y and X even, to VP9 in mp4, 4:2:0: browsers play it, and DALI decodes it on a CPU too.

    The same frames give the same bytes with one build of libvpx.
    """
    import av

    # Rates of broadcast video, such as 30000/1001, stay exact.
    rate = Fraction(frame_rate).limit_denominator(1001)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = {"crf": "10", "b": "0", "cpu-used": "4", "threads": "1", "flags": "+bitexact"}
        stream.time_base = 1 / rate
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


TOLERANCE = 1e-3
"""A frame that starts at most this late for a sample counts as on time: containers round times (Matroska: to ms)."""


def samples_before(time: float, frame_rate: float) -> int:
    """Number of samples taken before `time`; a frame shown from a to b has samples_before(a) to samples_before(b)."""
    return max(0, math.ceil((time - TOLERANCE) * frame_rate))


def sampled_frames(starts: Sequence[float], end: float, frame_rate: float, limit: int) -> list[int]:
    """The index of the frame for each sample, at most `limit` samples and at least one.

    starts: the time each frame is first shown, starting at 0; end: the time the last one is no longer shown.
    """
    chosen: list[int] = []
    for index, until in enumerate([*starts[1:], end]):
        if len(chosen) >= limit:
            break
        # Samples up to the end of this frame, less those of earlier frames.
        chosen += [index] * (samples_before(until, frame_rate) - len(chosen))
    return chosen[:limit] or [0]


def usable_frames(frames: int, max_frames: int, frames_per_step: int) -> int:
    """The largest 1 + n * frames_per_step up to `frames` (from 1) and `max_frames`: the lengths of a causal codec."""
    return 1 + (min(frames, max_frames) - 1) // frames_per_step * frames_per_step
