"""Trains the visual codec on images and videos together; the loss is the mean squared error.

Reads the train split of both, decoded once and kept in memory. Reports on the held-out split, separately for images
and videos (`image_...`, `video_...`): `loss` (MSE of pixels in [-1, 1]), `psnr_db` (over all 8-bit values) and `ssim`
(mean over frames); for both together `codes_used` (share of the codebook that occurs) and `perplexity` (exp of the
entropy of the codes' frequencies).
"""

import json
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megamm.common.device import Device
from megamm.common.errors import UnreadableMedia, UserError
from megamm.media.image_file import PixelArray, square_pixels
from megamm.media.video_file import usable_frames, video_frames
from megamm.tokenizers.io import Split, new_folder, open_media, save_codec
from megamm.tokenizers.training_loop import Figures, Training, codebook_use, train_codec, warn_of_collapse
from megamm.tokenizers.visual.model import VisualCodec, VisualCodecConfig, batches_of_one_length, to_frames, to_pixels

logger = logging.getLogger(__name__)

MAX_SAMPLES = {("image", "train"): 100_000, ("image", "heldout"): 1_000}
MAX_SAMPLES |= {("video", "train"): 4_000, ("video", "heldout"): 100}
"""Larger splits are thinned evenly: they are kept in memory, 12 kB per frame at 64 pixels; more do not help a codec."""
LUMA = (0.299, 0.587, 0.114)
"""Luma weights of R'G'B' (ITU-R BT.601), used for SSIM: the paper defines it for grey images only."""
WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


@dataclass(frozen=True)
class ClipMix:
    """How videos and images share a batch: about `share` of its samples are clips of at most `frames` frames."""

    share: float = 0.125
    frames: int = 9

    def __post_init__(self) -> None:
        if not (0 < self.share < 1 and self.frames > 0):
            what = f"invalid mix: clips of {self.frames} frames, a share of {self.share:g}"
            raise UserError(what, remedy="use at least one frame and a share between 0 and 1")


class VisualData:
    """Images uint8 `[N, Y, X, 3]` and videos `[F, Y, X, 3]` as training samples (tokenizers/training_loop.py:
    CodecData).

    An epoch contains every image once and the number of clips given by their share; clips continue through the videos
    from epoch to epoch. Without images it contains every video once. The part of a video depends on its number and the
    epoch.
    """

    def __init__(
        self, images: list[PixelArray], videos: list[PixelArray], config: VisualCodecConfig, mix: ClipMix
    ) -> None:
        self.images, self.videos = images, videos
        self.frames_per_step = config.frames_per_step
        self.clip_frames = usable_frames(mix.frames, config.max_frames, config.frames_per_step)
        self.clips = len(videos)
        if images and videos:
            # share = clips / (images + clips), solved for clips.
            self.clips = max(1, round(len(images) * mix.share / (1 - mix.share)))

    def __len__(self) -> int:
        return len(self.images) + self.clips

    def batch(self, numbers: list[int], epoch: int) -> tuple[Tensor, ...]:
        """uint8 `[B, F, Y, X, 3]` for each length F that occurs, shortest first."""
        samples = [self._sample(number, epoch) for number in numbers]
        lengths = sorted({len(frames) for frames in samples})
        return tuple(torch.from_numpy(np.stack([s for s in samples if len(s) == length])) for length in lengths)

    def _sample(self, number: int, epoch: int) -> PixelArray:
        if number < len(self.images):
            return self.images[number][None]
        video = self.videos[(number - len(self.images) + epoch * self.clips) % len(self.videos)]
        length = min(len(video), self.clip_frames)
        # Seeded by number and epoch: a clip does not depend on the rank or the batch it is in.
        begin = int(np.random.default_rng((number, epoch)).integers(len(video) - length + 1))
        return video[begin : begin + length]


def train_visual_codec(
    sources: list[Path],
    target: Path,
    config: VisualCodecConfig,
    training: Training,
    device: Device,
    dtype: torch.dtype = torch.float32,
    mix: ClipMix | None = None,
) -> Figures:
    """Train on `sources` and write the codec folder `target`, with training.json; returns the last report.

    Raises UserError if there is neither an image nor a video, or the target exists.
    """
    mix = mix or ClipMix()
    with new_folder(target) as folder:
        train = VisualData(*read_samples(sources, "train", config), config, mix)
        images, videos = read_samples(sources, "heldout", config)
        logger.info("%d images and %d videos to train on", len(train.images), len(train.videos))
        logger.info("%d images and %d videos held out", len(images), len(videos))
        torch.manual_seed(training.seed)
        codec = VisualCodec(config)

        def report(_: torch.nn.Module, step: int) -> Figures:
            return evaluate(codec, images, videos, device.torch_device)

        reports = train_codec(codec, train, training, device, report, dtype)
        save_codec(codec, folder)
        record = asdict(training) | {"clip_share": mix.share, "clip_frames": train.clip_frames}
        record |= {"train_images": len(train.images), "train_videos": len(train.videos)}
        record |= {"heldout_images": len(images), "heldout_videos": len(videos), "heldout": reports}
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    if not reports:  # only the first rank has reports
        return {}
    latent_frames = len(images) + sum(1 + (len(video) - 1) // config.frames_per_step for video in videos)
    warn_of_collapse(reports[-1]["codes_used"], config.codebook_size, latent_frames * config.grid_size**2)
    return reports[-1]


def read_samples(
    sources: list[Path], split: Split, config: VisualCodecConfig
) -> tuple[list[PixelArray], list[PixelArray]]:
    """Images uint8 `[Y, X, 3]` and videos `[F, Y, X, 3]` of a split, at most MAX_SAMPLES of each.

    Raises UserError for an unreadable one, or if there are none at all.
    """

    def read_video(data: bytes, extension: str) -> PixelArray:
        return video_frames(data, extension, config)

    def read_image(data: bytes, extension: str) -> PixelArray:
        return square_pixels(data, extension, config.image_size)

    has_video = any((source / split / "video").is_dir() for source in sources)
    has_image = any((source / split / "image").is_dir() for source in sources)
    videos = _read(sources, split, "video", read_video) if has_video else []
    images = _read(sources, split, "image", read_image) if has_image or not has_video else []
    return images, videos


def _read(
    sources: list[Path], split: Split, modality: str, read: Callable[[bytes, str], PixelArray]
) -> list[PixelArray]:
    members = [(shards, i) for shards in open_media(sources, split, modality) for i in range(len(shards))]
    count = min(len(members), MAX_SAMPLES[modality, split])
    chosen = [members[i * len(members) // count] for i in range(count)]
    data = ((shards, i, shards.read(i)) for shards, i in chosen)

    def decoded(shards_i_data: tuple) -> PixelArray:
        shards, i, media = shards_i_data
        try:
            return read(media, shards.extensions[i])
        except UnreadableMedia as error:
            remedy = "rebuild these shards with `megamm data build`, which skips such samples"
            raise UserError(f"sample {shards.keys[i]}: {error}", where=shards.folder, remedy=remedy) from error

    with ThreadPoolExecutor() as threads:  # Pillow and FFmpeg decode without the interpreter lock
        return list(threads.map(decoded, data))


@torch.inference_mode()
def evaluate(codec: VisualCodec, images: list[PixelArray], videos: list[PixelArray], device: torch.device) -> Figures:
    """Quality on images `[Y, X, 3]` and videos `[F, Y, X, 3]`, computed in float32."""
    figures: Figures = {}
    counts = torch.zeros(codec.codebook_size, dtype=torch.int64)
    for name, samples in (("image", [image[None] for image in images]), ("video", videos)):
        if not samples:
            continue
        sums = torch.zeros(3, dtype=torch.float64)
        for numbers in batches_of_one_length([len(sample) for sample in samples]):
            frames = torch.from_numpy(np.stack([samples[i] for i in numbers])).to(device)
            pixels, ids = codec.reconstruct(frames)
            sums += _errors(frames, pixels).cpu()
            counts += torch.bincount(ids.flatten().cpu(), minlength=len(counts))
        values = sum(sample.size for sample in samples)
        squared, squared_8bit, likeness = sums.tolist()
        figures[f"{name}_loss"] = squared / values
        figures[f"{name}_psnr_db"] = psnr_db(squared_8bit / values)
        figures[f"{name}_ssim"] = likeness / sum(len(sample) for sample in samples)
    return figures | codebook_use(counts)


def _errors(frames: Tensor, pixels: Tensor) -> Tensor:
    """Errors of a reconstruction in [-1, 1] of uint8 `[B, F, Y, X, 3]`, float64 `[3]`: squared, squared 8-bit, SSIM.

    These are sums over values, values and frames.
    """
    made = to_frames(pixels)
    squared = (pixels - to_pixels(frames)).double().square().sum()
    squared_8bit = (made.double() - frames.double()).square().sum()
    return torch.stack([squared, squared_8bit, ssim(frames.flatten(0, 1), made.flatten(0, 1)).sum()])


def psnr_db(squared_error: float) -> float:
    """PSNR from the mean squared error of 8-bit values: 10 log10(255^2 / MSE), at most 148 dB (instead of inf)."""
    return 10 * math.log10(255**2 / max(squared_error, 1e-10))


def ssim(pictures: Tensor, others: Tensor) -> Tensor:
    """Mean SSIM of each pair of uint8 `[N, Y, X, 3]`, float64 `[N]`; Y and X at least 11.

    Source: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity", equation 13,
    with its constants: a Gaussian window of 11 x 11 (sigma 1.5), averaged over the positions where it fits.
    """
    x, y = _luma(pictures), _luma(others)
    mean_x, mean_y, xx, yy, xy = (_windowed(each) for each in (x, y, x * x, y * y, x * y))
    var_x, var_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    likeness /= (mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2)
    return likeness.mean((1, 2, 3))


def _luma(pictures: Tensor) -> Tensor:
    """Luma `[N, 1, Y, X]` in float64: small variances are differences of large numbers."""
    return (pictures.double() @ torch.tensor(LUMA, dtype=torch.float64, device=pictures.device)).unsqueeze(1)


def _windowed(values: Tensor) -> Tensor:
    """Gaussian means `[N, 1, Y - 10, X - 10]`; the window is the product of a column and a row."""
    at = torch.arange(WINDOW, dtype=torch.float64, device=values.device) - WINDOW // 2
    weights = torch.exp(-(at**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    columns = torch.nn.functional.conv2d(values, weights.view(1, 1, -1, 1))
    return torch.nn.functional.conv2d(columns, weights.view(1, 1, 1, -1))
