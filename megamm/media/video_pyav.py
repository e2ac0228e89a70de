"""Decodes video clips with PyAV (FFmpeg) on the CPU: bytes and plan -> uint8 `[F, Y, X, 3]`, the frames of read_media.

Decoding starts at the keyframe before the clip and ends with its last frame; the rest of the file is not decoded.
"""

import numpy as np

from megamm.common.errors import UnreadableMedia
from megamm.media.image_file import PixelArray
from megamm.media.video_file import FrameArray, ShownFrame, open_video
from megamm.media.video_plan import ClipPlan


def decode_clip(data: bytes, extension: str, plan: ClipPlan, size: int) -> FrameArray:
    """The plan's frames as squares, uint8 `[F, size, size, 3]`. Raises UnreadableMedia if one cannot be decoded."""
    wanted, squares = set(plan.times), dict[int, PixelArray]()
    with open_video(data, extension) as (container, stream):
        container.seek(plan.keyframe, stream=stream)
        for frame in container.decode(stream):
            if frame.pts in wanted:
                squares[frame.pts] = ShownFrame(0.0, 0.0, frame, plan.pixel_aspect).square(size)
            if len(squares) == len(wanted):
                break
    if len(squares) < len(wanted):
        raise UnreadableMedia(f"{len(wanted) - len(squares)} of {len(wanted)} frames cannot be decoded")
    return np.stack([squares[time] for time in plan.times])
