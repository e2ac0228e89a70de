"""Metrics of one generated medium, against the real one of its sample or alone. All raise Unmeasurable with a reason.

Images uint8 `[Y, X, 3]` and videos `[F, Y, X, 3]`: psnr (dB, at most 148) and ssim (Wang et al. 2004), for videos over
all frames; videos are cut to the shorter one. Videos alone, each in [0, 1], 1 is best: flicker, 1 - mean absolute
change of a pixel between frames; motion, 1 - mean absolute distance of a frame from the middle of its neighbours;
consistency, mean cosine of each frame's features with those of the first and the previous one. These follow the
dimensions of VBench (Huang et al. 2024) without its networks, so they are not comparable with its numbers.

Sounds float32 `[samples]`, cut to the shorter one: pesq (wide band, ITU-T P.862.2), stoi (Taal et al. 2011), both by
the packages of these names at 16 kHz and 10 kHz; si_sdr (dB, Le Roux et al. 2019).

Clouds `[N, 9]`, whose longest side is 2: chamfer, the mean squared distance to the nearest point of the other cloud,
both ways added; f_score, the harmonic mean of the shares of points within tau of the other cloud; normal_consistency,
the mean absolute cosine of a point's normal and that of the nearest point, both ways averaged; voxel_iou of the
occupied voxels of [-1, 1] in each axis.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megamm.evaluation.packages import require
from megamm.evaluation.statistics import Unmeasurable
from megamm.media.sound_file import resample
from megamm.tokenizers.visual.train import psnr_db
from megamm.tokenizers.visual.train import ssim as ssim_of

SSIM_WINDOW = 11
PESQ_RATE, STOI_RATE = 16_000, 10_000
_QUIET = 1e-6
"""Root mean square below which a sound is silent: less than one step of 16 bits."""


@dataclass(frozen=True)
class Measure:
    """Settings of the metrics: the sample rate of sounds in Hz, and tau and voxels of clouds."""

    sample_rate: int = 16_000
    tau: float = 0.05
    voxels: int = 32


def psnr(made: Any, real: Any, measure: Measure) -> float:
    """Return the peak signal-to-noise ratio of 8-bit values."""
    made, real = _same_frames(made, real)
    return psnr_db(float(((made.astype(np.float64) - real.astype(np.float64)) ** 2).mean()))


def ssim(made: Any, real: Any, measure: Measure) -> float:
    """Return the structural similarity of luma, averaged over frames."""
    made, real = _same_frames(made, real)
    if min(made.shape[1:3]) < SSIM_WINDOW:
        raise Unmeasurable(f"smaller than SSIM's window of {SSIM_WINDOW} pixels")
    return float(ssim_of(torch.from_numpy(made.copy()), torch.from_numpy(real.copy())).mean())


def _same_frames(made: Any, real: Any) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return both as frames `[F, Y, X, 3]` of the shorter one's number. Unmeasurable if their sizes differ."""
    made, real = np.asarray(made), np.asarray(real)
    made, real = (x[None] if x.ndim == 3 else x for x in (made, real))
    if made.shape[1:] != real.shape[1:]:
        raise Unmeasurable("pictures of different sizes")
    frames = min(len(made), len(real))
    if not frames:
        raise Unmeasurable("no frame")
    return made[:frames], real[:frames]


def flicker(made: Any, real: Any, measure: Measure) -> float:
    """Return 1 - the mean absolute difference of successive frames, as a share of the range."""
    frames = _frames(made, 2)
    return 1 - float(np.abs(np.diff(frames, axis=0)).mean())


def motion(made: Any, real: Any, measure: Measure) -> float:
    """Return 1 - the mean absolute difference of each frame from the mean of its two neighbours."""
    frames = _frames(made, 3)
    return 1 - float(np.abs(frames[1:-1] - (frames[:-2] + frames[2:]) / 2).mean())


def _frames(made: Any, least: int) -> npt.NDArray[np.float64]:
    if len(made) < least:
        raise Unmeasurable(f"a video of fewer than {least} frames")
    return np.asarray(made, dtype=np.float64) / 255


def consistency(features: npt.NDArray[np.float64]) -> float:
    """Return the mean cosine of each frame's features `[F, features]` with those of the first and the previous one."""
    if len(features) < 2:
        raise Unmeasurable("a video of fewer than 2 frames")
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    if not (norms > 0).all():
        raise Unmeasurable("a frame without features")
    unit = features / norms
    return float(((unit[1:] @ unit[0]) + (unit[1:] * unit[:-1]).sum(1)).mean() / 2)


def _sounds(made: Any, real: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return both, cut to the shorter one. Unmeasurable if one is silent or not finite."""
    length = min(len(made), len(real))
    cut = [np.asarray(sound[:length], dtype=np.float64) for sound in (made, real)]
    for name, sound in zip(("the generated sound", "the real sound"), cut, strict=True):
        if not length:
            raise Unmeasurable("a sound without samples")
        if not np.isfinite(sound).all():
            raise Unmeasurable(f"{name} is not finite")
        if np.sqrt((sound**2).mean()) < _QUIET:
            raise Unmeasurable(f"{name} is silent")
    return cut[0], cut[1]


def _at_rate(sounds: tuple[npt.NDArray[np.float64], ...], measure: Measure, rate: int) -> list[npt.NDArray[np.float32]]:
    return [resample(sound.astype(np.float32), measure.sample_rate, rate) for sound in sounds]


def pesq(made: Any, real: Any, measure: Measure) -> float:
    """Return the perceptual quality of speech, from 1.04 to 4.64."""
    degraded, reference = _at_rate(_sounds(made, real), measure, PESQ_RATE)
    if len(reference) < PESQ_RATE // 4:
        raise Unmeasurable("PESQ needs a quarter of a second")
    package = require("pesq")
    try:
        return float(package.pesq(PESQ_RATE, reference, degraded, "wb"))
    except package.PesqError as error:
        reason = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise Unmeasurable(f"PESQ: {reason}") from None


def stoi(made: Any, real: Any, measure: Measure) -> float:
    """Return the intelligibility of speech, up to 1."""
    degraded, reference = _at_rate(_sounds(made, real), measure, STOI_RATE)
    package = require("pystoi")
    with warnings.catch_warnings():
        # It warns and returns 1e-5 if fewer than 30 frames are not silent: that does not measure anything.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(package.stoi(reference, degraded, STOI_RATE))
        except RuntimeWarning as reason:
            raise Unmeasurable(f"STOI: {' '.join(str(reason).split())}") from None


def si_sdr(made: Any, real: Any, measure: Measure) -> float:
    """Return the scale-invariant signal-to-distortion ratio in dB, without removal of the means."""
    estimate, target = _sounds(made, real)
    projected = (estimate @ target) / (target @ target) * target
    noise = float(((estimate - projected) ** 2).sum())
    signal = float((projected**2).sum())
    if not signal > 0 or not noise > 0:
        raise Unmeasurable("the ratio is infinite")
    return float(10 * np.log10(signal / noise))


@dataclass(frozen=True)
class _Neighbours:
    """Distance from each point of one cloud to the nearest of the other, and that point's number."""

    distance: npt.NDArray[np.float64]
    index: npt.NDArray[np.int64]


def _neighbours(made: Any, real: Any) -> tuple[_Neighbours, _Neighbours]:
    from scipy.spatial import cKDTree

    for cloud in (made, real):
        if not len(cloud):
            raise Unmeasurable("a cloud without points")
        if not np.isfinite(cloud).all():
            raise Unmeasurable("a cloud that is not finite")
    a, b = np.asarray(made, dtype=np.float64)[:, :3], np.asarray(real, dtype=np.float64)[:, :3]
    return _Neighbours(*cKDTree(b).query(a)), _Neighbours(*cKDTree(a).query(b))


def chamfer(made: Any, real: Any, measure: Measure) -> float:
    """Return the sum of both mean squared distances."""
    there, back = _neighbours(made, real)
    return float((there.distance**2).mean() + (back.distance**2).mean())


def f_score(made: Any, real: Any, measure: Measure) -> float:
    """Return the harmonic mean of precision and recall at distance tau."""
    there, back = _neighbours(made, real)
    precision, recall = float((there.distance <= measure.tau).mean()), float((back.distance <= measure.tau).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def normal_consistency(made: Any, real: Any, measure: Measure) -> float:
    """Return the mean absolute cosine of normals at nearest points."""
    there, back = _neighbours(made, real)
    a, b = (_unit(np.asarray(cloud, dtype=np.float64)[:, 3:6]) for cloud in (made, real))
    from_made, from_real = np.abs((a * b[there.index]).sum(1)), np.abs((b * a[back.index]).sum(1))
    return float((from_made.mean() + from_real.mean()) / 2)


def _unit(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def voxel_iou(made: Any, real: Any, measure: Measure) -> float:
    """Return the intersection over union of the voxels with a point; points outside [-1, 1] count at the border."""
    occupied = []
    for cloud in (made, real):
        if not len(cloud) or not np.isfinite(cloud).all():
            raise Unmeasurable("a cloud without points, or not finite")
        cells = np.floor((np.asarray(cloud, dtype=np.float64)[:, :3] + 1) / 2 * measure.voxels)
        occupied.append({tuple(cell) for cell in cells.clip(0, measure.voxels - 1).astype(int)})
    return len(occupied[0] & occupied[1]) / len(occupied[0] | occupied[1])


PairMetric = Callable[[Any, Any, Measure], float]
MEDIA_METRICS: dict[str, dict[str, PairMetric]] = {
    "image": {"psnr": psnr, "ssim": ssim},
    "audio": {"pesq": pesq, "stoi": stoi, "si_sdr": si_sdr},
    "points": {
        "chamfer": chamfer,
        "f_score": f_score,
        "normal_consistency": normal_consistency,
        "voxel_iou": voxel_iou,
    },
    "video": {"psnr": psnr, "ssim": ssim, "flicker": flicker, "motion": motion},
}
"""The metrics of each generated modality."""
PACKAGES_OF = {"pesq": "pesq", "stoi": "pystoi", "ssim": "torch", "chamfer": "scipy", "f_score": "scipy"}
PACKAGES_OF |= {"normal_consistency": "scipy"}
