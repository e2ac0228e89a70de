"""Writes the media files of the sources: FLAC for sound, VP9 in MP4 for video. The same input gives the same bytes.

VP9 is the newest format that DALI decodes on a CPU; all players support it too.
"""

from fractions import Fraction
from pathlib import Path

import numpy as np

_QUALITY = "24"
"""VP9's constant quality (0 best, 63 worst)."""


def write_flac(path: Path, samples: np.ndarray, sample_rate: int) -> None:
    """Write int16 [samples] (mono) or [samples, channels], 16 bits per sample."""
    import soundfile

    soundfile.write(path, samples, sample_rate, format="FLAC", subtype="PCM_16")


def write_video(path: Path, frames: np.ndarray, frame_rate: Fraction | int) -> None:
    """Write uint8 [F, Y, X, 3], Y and X even, at frame_rate (Hz), every frame with the same duration."""
    import av

    options = {"crf": _QUALITY, "b": "0", "deadline": "realtime", "cpu-used": "6"}
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=Fraction(frame_rate), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 [Y, X, 3] as PNG."""
    from PIL import Image

    Image.fromarray(pixels).save(path, format="PNG")
