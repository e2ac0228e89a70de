"""Selects the frames of a video for a codec: those shown at 0, 1 / rate, 2 / rate, ... seconds after the first frame.

A frame is shown from its timestamp until the next one's, so any frame rate, constant or not, is sampled by time.
Every decoder uses these functions. Times are in seconds from the first frame, rates in Hz.
"""

import math
from collections.abc import Sequence

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
        chosen += [index] * (samples_before(until, frame_rate) - len(chosen))
    return chosen[:limit] or [0]


def usable_frames(frames: int, max_frames: int, frames_per_step: int) -> int:
    """The largest 1 + n * frames_per_step up to `frames` (from 1) and `max_frames`: the lengths of a causal codec."""
    return 1 + (min(frames, max_frames) - 1) // frames_per_step * frames_per_step
