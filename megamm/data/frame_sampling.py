"""Which frames of a video a codec sees: those shown at times 0, 1 / rate, 2 / rate, ... seconds after its first frame.

A frame is shown from its timestamp until the next one's, so that any frame rate, constant or not, is sampled by time.
Every decoder takes its frames by these functions. Times in seconds from the first frame, rates in Hz.
"""

import math
from collections.abc import Sequence

TOLERANCE = 1e-3
"""A frame that begins so much later than a sample is taken as on time: containers round timestamps (Matroska to ms)."""


def samples_before(time: float, frame_rate: float) -> int:
    """How many samples are taken before `time`; a frame shown from a to b is those from samples_before(a) on."""
    return max(0, math.ceil((time - TOLERANCE) * frame_rate))


def sampled_frames(starts: Sequence[float], end: float, frame_rate: float, limit: int) -> list[int]:
    """The index of the frame for each sample, at most `limit` and at least one.

    starts: when each frame is first shown, from 0 on; end: when the last one is no longer shown.
    """
    chosen: list[int] = []
    for index, until in enumerate([*starts[1:], end]):
        if len(chosen) >= limit:
            break
        chosen += [index] * (samples_before(until, frame_rate) - len(chosen))
    return chosen[:limit] or [0]


def usable_frames(frames: int, max_frames: int, frames_per_step: int) -> int:
    """The longest 1 + n * frames_per_step of at most `frames` (from 1) and `max_frames`: what a causal codec takes."""
    return 1 + (min(frames, max_frames) - 1) // frames_per_step * frames_per_step
