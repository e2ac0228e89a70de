"""Writes sprite animations as short videos: square, on white instead of transparency, enlarged by whole factors.

Small pixel art is enlarged without smoothing so that VP9's halved colour resolution does not smear it.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megamm.data.sources.media import write_video

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 128
"""Approximate size in pixels to which a small sprite is enlarged."""
SECONDS = 2
"""Length of a looped animation, by repetition; one that does not loop shows its last frame for the rest."""


def write_animation(path: Path, frames: Sequence["Image"], frame_ms: int, *, loops: bool) -> None:
    """Write frames of one size, each shown frame_ms milliseconds, as a VP9 video."""
    pixels = np.stack([on_white(frame) for frame in frames])
    wanted = -(-1000 * SECONDS // frame_ms)
    numbers = np.arange(max(wanted, len(frames)))
    pixels = pixels[numbers % len(frames) if loops else numbers.clip(max=len(frames) - 1)]
    write_video(path, pixels, Fraction(1000, frame_ms))


def on_white(frame: "Image") -> npt.NDArray[np.uint8]:
    """uint8 [S, S, 3]: the picture centred on a white square of even side, enlarged to nearly SIDE if smaller."""
    from PIL import Image

    side = max(frame.size)
    factor = max(1, SIDE // side)
    side = -(-side * factor // 2) * 2
    enlarged = frame.convert("RGBA").resize((frame.width * factor, frame.height * factor), Image.Resampling.NEAREST)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(enlarged, ((side - enlarged.width) // 2, (side - enlarged.height) // 2))
    return np.asarray(square.convert("RGB"))
