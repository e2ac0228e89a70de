"""Video clips by PyAV (FFmpeg) on the CPU: a planned clip's bytes -> uint8 `[F, Y, X, 3]`, the frames of read_media.

Decoding begins at the keyframe before the clip and ends with its last frame; nothing else of the file is decoded.
"""

import numpy as np

from megamm.data.video_plan import ClipPlan
from megamm.modalities.base import UnreadableMedia
from megamm.modalities.image import PixelArray
from megamm.modalities.video import FrameArray
from megamm.modalities.video_file import ShownFrame, open_video


def decode_clip(data: bytes, extension: str, plan: ClipPlan, size: int) -> FrameArray:
    """The plan's frames as squares, uint8 `[F, size, size, 3]`. UnreadableMedia if one of them cannot be decoded."""
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
