"""Decodes video clips with NVIDIA DALI: planned clips' bytes -> uint8 `[F, Y, X, 3]`; one pipeline for GPU and CPU.

    bytes, frame numbers -> decode -> scale (antialiased Lanczos) -> colour matrix -> pad with white

On a GPU the frames are decoded by its video engine and scaled there; only the squares, a small part of the decoded
data, are copied back. On a CPU the pipeline is the same with other operators, for tests and comparison. DALI ignores
rotation and the colour matrix (it assumes BT.601); both are corrected here. `obstacle` names clips that DALI cannot
decode, or would decode to other frames. Its pixels differ from PyAV's: see docs/video.md.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megamm.common.errors import UnreadableMedia
from megamm.media.video_clip import ClipPlan
from megamm.media.video_file import FrameArray

CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})
GPU_CODECS = CPU_CODECS | {"h264", "hevc", "av1", "mpeg4"}
GPU_FORMATS = frozenset({"yuv420p", "yuvj420p"})
CPU_FORMATS = GPU_FORMATS | {"yuv422p", "yuvj422p", "yuv444p", "yuvj444p"}
_KR_KB = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}
"""Weights of red and blue in luma, by matrix code (ISO/IEC 23091-2): BT.709, unknown, BT.601, BT.2020."""
_BT601 = 6


def obstacle(plan: ClipPlan, device: torch.device) -> str | None:
    """The reason why DALI should not decode this clip on that device; None if it can."""
    on_cpu = device.type == "cpu"
    if plan.codec not in (CPU_CODECS if on_cpu else GPU_CODECS):
        return f"DALI does not decode {plan.codec} on a {'CPU' if on_cpu else 'GPU'}"
    if plan.pixel_format not in (CPU_FORMATS if on_cpu else GPU_FORMATS):
        return f"pixel format {plan.pixel_format}"
    if plan.colour_matrix not in _KR_KB:
        return f"colour matrix {plan.colour_matrix}"
    # DALI decodes a file from its start; PyAV seeks to the keyframe before the clip.
    if plan.skipped:
        return "the clip starts late in its file, and DALI decodes everything before it"
    return "an edit list or a cut hides some frames" if plan.has_cuts else None


class DaliDecoder:
    """DALI's pipeline for squares of `size` pixels, at most `batch_size` clips per call; device: as in `Device`."""

    def __init__(self, size: int, device: torch.device, *, batch_size: int, threads: int) -> None:
        self.size = size
        self._build = partial(_pipeline, size, device, batch_size, threads)
        self._pipeline = self._build()

    def decode(self, clips: Sequence[tuple[bytes, ClipPlan]]) -> list[FrameArray]:
        """uint8 `[F, size, size, 3]` of each clip. Raises UnreadableMedia if one fails; DALI does not report which."""
        if not clips:
            return []
        plans = [plan for _, plan in clips]
        fed: dict[str, list[npt.NDArray[Any]]] = {
            "encoded": [np.frombuffer(data, np.uint8) for data, _ in clips],
            # DALI needs increasing frame numbers; `_upright` puts repeated frames back.
            "frames": [np.array(sorted(set(plan.frames)), np.int32) for plan in plans],
            # Height before width, as DALI's resize expects.
            "sides": [np.array(plan.stored_sides(self.size)[::-1], np.float32) for plan in plans],
            "matrix": [_from_bt601(plan.colour_matrix) for plan in plans],
            "corner": [_corner(plan, self.size) for plan in plans],
        }
        for name, values in fed.items():
            self._pipeline.feed_input(name, values)
        try:
            (squares,) = self._pipeline.run()
        except RuntimeError as error:
            self._pipeline = self._build()  # after an error the old one cannot be used
            raise UnreadableMedia(f"DALI: {_cause(error)}") from error
        return [_upright(np.array(squares.as_cpu().at(i)), plan) for i, plan in enumerate(plans)]


def _pipeline(size: int, device: torch.device, batch_size: int, threads: int) -> Any:
    """Build DALI's pipeline with the five inputs that `DaliDecoder.decode` feeds."""
    from nvidia import dali

    fn: Any = dali.fn
    types: Any = dali.types
    on_cpu = device.type == "cpu"
    number = None if on_cpu else device.index or 0
    # Batches are passed one by one, so that a failure belongs to the current batch.
    pipeline = dali.Pipeline(
        batch_size, threads, number, prefetch_queue_depth=1, exec_pipelined=False, exec_async=False
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        numbers = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        sides = fn.external_source(name="sides", dtype=types.FLOAT, ndim=1)
        matrix = fn.external_source(name="matrix", dtype=types.FLOAT, ndim=2)
        corner = fn.external_source(name="corner", dtype=types.INT32, ndim=1)
        # "mixed": bytes in host memory, decoding on the GPU.
        frames_FYX3 = fn.decoders.video(encoded, frames=numbers, device="cpu" if on_cpu else "mixed")
        scaled = fn.resize(frames_FYX3, size=sides, interp_type=types.INTERP_LANCZOS3, dtype=types.FLOAT)
        rgb = fn.coord_transform(scaled, M=matrix)
        # A slice that reaches out of the picture is padded; a negative corner centres the picture.
        whole = {"shape": [size, size], "axis_names": "HW", "out_of_bounds_policy": "pad", "fill_values": 255}
        squares = fn.slice(rgb, start=corner, **whole)
        pipeline.set_outputs(fn.cast(squares, dtype=types.UINT8))
    pipeline.build()
    return pipeline


def _corner(plan: ClipPlan, size: int) -> npt.NDArray[np.int32]:
    """Row and column of the square's corner in the scaled picture; upright pictures are padded as images are."""
    width, height = plan.stored_sides(size)
    rows, columns = size - height, size - width
    # Half of an odd padding is rounded down above and to the left of the upright picture.
    o = plan.orientation
    rows_flip, columns_flip = (o.flips_columns, o.flips_rows) if o.swaps_axes else (o.flips_rows, o.flips_columns)
    top = rows - rows // 2 if rows_flip else rows // 2
    left = columns - columns // 2 if columns_flip else columns // 2
    return np.array([-top, -left], np.int32)


def _upright(frames: FrameArray, plan: ClipPlan) -> FrameArray:
    """Convert the distinct stored frames to those of the plan, upright."""
    distinct = sorted(set(plan.frames))
    if len(frames) != len(distinct):
        raise UnreadableMedia(f"DALI: {len(frames)} of {len(distinct)} frames")
    chosen = frames[np.searchsorted(distinct, plan.frames)]
    return plan.orientation.frames(chosen)


def _to_rgb(matrix: int) -> npt.NDArray[np.float64]:
    """Matrix from Y' in [0, 1] and Cb, Cr in [-1/2, 1/2] to R'G'B', `[3, 3]` (ITU-R BT.601, BT.709: section 3)."""
    kr, kb = _KR_KB[matrix]
    # The three weights of luma sum to one.
    kg = 1 - kr - kb
    red, blue = 2 * (1 - kr), 2 * (1 - kb)
    return np.array([[1, 0, red], [1, -kb * blue / kg, -kr * red / kg], [1, blue, 0]])


def _from_bt601(matrix: int) -> npt.NDArray[np.float32]:
    """Matrix that replaces BT.601 conversion by the file's, `[3, 3]`; the identity for BT.601."""
    return (_to_rgb(matrix) @ np.linalg.inv(_to_rgb(_BT601))).astype(np.float32)


def _cause(error: RuntimeError) -> str:
    """The cause, extracted from DALI's many lines: the first line behind "encountered:"."""
    lines = str(error).partition("encountered:")[2].split("\n")
    return next((line.strip()[:200] for line in lines if line.strip()), "decoding failed")
