"""One clip of a video file: planned by reading the file's packets, then decoded with PyAV (FFmpeg) on the CPU.

In: the file's bytes, the start of the clip (seconds), and the sizes that a visual codec takes. Out: a `ClipPlan`, from
which any decoder gets the same frames: those shown at start, start + 1 / frame_rate, ... (media/video_file.py), and
from the plan uint8 `[F, Y, X, 3]`. Planning decodes only the file's first frame; decoding starts at the keyframe before
the clip and ends with its last frame. Times are in ticks of the file's video stream.
"""

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from megamm.common.errors import UnreadableMedia
from megamm.media.image_file import PixelArray, fitted_sides
from megamm.media.video_file import (
    FrameArray,
    Orientation,
    PacketDecoder,
    ShownFrame,
    VideoSizes,
    check_end,
    is_hidden,
    open_video,
    orientation_of,
    sampled_frames,
    usable_frames,
)


@dataclass(frozen=True)
class ClipPlan:
    """The frames of a clip, and file properties that decoders need. F frames, possibly with repetitions."""

    frames: tuple[int, ...]
    """`[F]` frame numbers in display order, counted from the file's first frame."""
    times: tuple[int, ...]
    """`[F]` presentation times of the same frames."""
    keyframe: int
    """Presentation time of the keyframe from which to decode."""
    skipped: int
    """Number of frames before that keyframe."""
    codec: str
    """FFmpeg's name: "h264", "vp9"."""
    pixel_format: str
    colour_matrix: int
    """Code of ISO/IEC 23091-2, MatrixCoefficients; 2 if the file does not specify one."""
    has_cuts: bool
    """Whether some packets have no visible frame: edit lists, and what a cut of the file has left."""
    width: int
    height: int
    """As stored, in pixels."""
    orientation: Orientation
    """How it becomes upright."""
    pixel_aspect: float
    """Width of a stored pixel over its height."""

    def stored_sides(self, size: int) -> tuple[int, int]:
        """Width and height of the picture in a square of `size` pixels, before rotation."""
        swaps = self.orientation.swaps_axes
        aspect = 1 / self.pixel_aspect if swaps else self.pixel_aspect
        width, height = (self.height, self.width) if swaps else (self.width, self.height)
        width, height = fitted_sides(width * aspect, height, size)
        return (height, width) if swaps else (width, height)


@dataclass(frozen=True)
class _Packet:
    """One coded frame of the file; times in ticks."""

    time: int
    duration: int
    is_key: bool
    is_cut: bool
    """Decoded, but hidden by the container."""


def plan_clip(data: bytes, extension: str, start_seconds: float, sizes: VideoSizes) -> ClipPlan:
    """Plan the clip that starts this many seconds after the file's first frame, F = 1 + n * frames_per_step.

    Raises UnreadableMedia if the file is broken, truncated, of another format, or ends before the clip starts.
    """
    with open_video(data, extension) as (container, stream):
        packets, first = _packets(container, stream)
        # Packets are in decoding order; frames that refer to later ones (B-frames) follow them.
        if first is None or first.pts is None:
            raise UnreadableMedia("no readable frame")
        # What is shown before the first decodable frame refers to frames before the file was cut.
        shown = sorted((p for p in packets if not p.is_cut and p.time >= first.pts), key=lambda p: p.time)
        if not shown:
            raise UnreadableMedia("no readable frame")
        tick: Fraction = stream.time_base
        # The same rules for the last frame's end as in video_file.py, so both find the same frames.
        gap = shown[-1].duration or (shown[-1].time - shown[-2].time if len(shown) > 1 else 0)
        if not gap and stream.average_rate:
            gap = 1 / (stream.average_rate * tick)
        origin = shown[0].time
        end = (shown[-1].time + gap - origin) * tick
        check_end(container, stream, end, origin * tick, gap * tick)
        chosen = _chosen([float((p.time - origin) * tick) for p in shown], float(end), start_seconds, sizes)
        # Decoding can only start at a keyframe: the last one not after the clip's first frame.
        keyframe = next((p for p in reversed(shown[: chosen[0] + 1]) if p.is_key), shown[0])
        return ClipPlan(
            frames=tuple(chosen),
            times=tuple(shown[number].time for number in chosen),
            keyframe=keyframe.time,
            skipped=shown.index(keyframe),
            codec=stream.codec_context.name,
            pixel_format=first.format.name,
            colour_matrix=int(first.colorspace),
            has_cuts=len(shown) < len(packets),
            width=first.width,
            height=first.height,
            orientation=orientation_of(first),
            pixel_aspect=float(stream.sample_aspect_ratio or 1),
        )


def _packets(container: Any, stream: Any) -> tuple[list[_Packet], Any]:
    """The packets that hold a frame, in the file's order, and the first frame that the decoder returns (or None)."""
    packets, first, decoder = [], None, PacketDecoder()
    for packet in container.demux(stream):
        # Only the first time, and the frame's format, size, colours and orientation need a decoded frame.
        if first is None:
            first = next(iter(decoder.decode(packet, stream)), None)
        if not packet.size or is_hidden(packet, stream):
            continue
        if packet.pts is None:
            raise UnreadableMedia("a frame has no timestamp")
        packets.append(_Packet(packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard))
    return packets, first


def _chosen(starts: list[float], end: float, start: float, sizes: VideoSizes) -> list[int]:
    """The clip's frame numbers; starts, end and start are in seconds from the file's first frame."""
    if start >= end:
        raise UnreadableMedia(f"the clip starts at {start:g} s, but the video ends at {end:.2f} s")
    chosen = sampled_frames([s - start for s in starts], end - start, sizes.frame_rate, sizes.max_frames)
    # [0] can also mean that no sample was taken: use the frame that is shown at the clip's start.
    if chosen == [0]:  # or the end is closer than the tolerance of a sample
        chosen = [bisect_right(starts, start) - 1]
    return chosen[: usable_frames(len(chosen), sizes.max_frames, sizes.frames_per_step)]


def decode_clip(data: bytes, extension: str, plan: ClipPlan, size: int) -> FrameArray:
    """The plan's frames as squares, uint8 `[F, size, size, 3]`. Raises UnreadableMedia if one cannot be decoded."""
    wanted, squares = set(plan.times), dict[int, PixelArray]()
    with open_video(data, extension) as (container, stream):
        # FFmpeg seeks to this keyframe or an earlier one; frames that are not wanted are decoded and dropped.
        container.seek(plan.keyframe, stream=stream)
        for frame in PacketDecoder(plan.keyframe).frames(container, stream):
            if frame.pts in wanted:
                squares[frame.pts] = ShownFrame(0.0, 0.0, frame, plan.pixel_aspect).square(size)
            if len(squares) == len(wanted):
                break
    if len(squares) < len(wanted):
        raise UnreadableMedia(f"{len(wanted) - len(squares)} of {len(wanted)} frames cannot be decoded")
    return np.stack([squares[time] for time in plan.times])
