"""Training the image codec: images `[N, Y, X, 3]` decoded once, AdamW with warm-up and cosine, mean squared error.

Reads the train split; reports on the held-out split: `loss` (MSE of pixels in [-1, 1]), `psnr_db`
(10 log10(255^2 / MSE) over all 8-bit values), `codes_used` (share of the codebook that occurs) and
`perplexity` (exp of the entropy of the codes' frequencies). The same seed, data, device and thread count give
the same weights, bit for bit.
"""

import json
import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from megamm.codecs.folders import Split, new_folder, open_media
from megamm.codecs.image import ImageCodec, ImageCodecConfig, save_image_codec, to_images, to_pixels
from megamm.errors import UserError
from megamm.modalities.base import UnreadableMedia
from megamm.modalities.image import ImageModality, PixelArray, square_pixels

logger = logging.getLogger(__name__)

MAX_IMAGES = {"train": 100_000, "heldout": 1_000}
"""Larger splits are thinned evenly: a codec needs no more, and they are kept in memory (12 kB each at 64 pixels)."""
MAX_GRADIENT_NORM = 1.0
COLLAPSED = 0.1
"""Share of the codes that could occur in the held-out images, below which the codebook counts as collapsed."""


@dataclass(frozen=True)
class ImageTraining:
    """How to train: the codec's sizes, and `steps` batches of `batch_size` images."""

    codec: ImageCodecConfig
    steps: int
    batch_size: int
    learning_rate: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}", remedy="use a number above 0")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up over 2 % of the steps, then a cosine to zero."""
        warm_up = max(1, self.steps // 50)
        progress = max(0.0, (step - warm_up) / max(1, self.steps - warm_up))
        return self.learning_rate * min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Report:
    """Held-out quality after `step` steps; the module docstring says what each figure is."""

    step: int
    loss: float
    psnr_db: float
    codes_used: float
    perplexity: float


def train_image_codec(
    sources: list[Path], target: Path, training: ImageTraining, device: torch.device, dtype: torch.dtype = torch.float32
) -> Report:
    """Train on `sources` and write the codec folder `target`, with training.json; returns the last report.

    dtype is that of the computation (autocast); weights are float32. UserError if there is no image or the
    target exists.
    """
    with new_folder(target) as folder:
        size = training.codec.image_size
        train, heldout = read_images(sources, "train", size), read_images(sources, "heldout", size)
        logger.info("%d images to train on, %d held out", len(train), len(heldout))
        torch.manual_seed(training.seed)
        codec = ImageCodec(training.codec).to(device)
        reports = list(_train(codec, train, heldout, training, device, dtype))
        _warn_of_collapse(reports[-1], codec.config, len(heldout))
        save_image_codec(codec, folder)
        record = {
            "steps": training.steps,
            "batch_size": training.batch_size,
            "learning_rate": training.learning_rate,
            "seed": training.seed,
            "train_images": len(train),
            "heldout_images": len(heldout),
            "heldout": [asdict(report) for report in reports],
        }
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return reports[-1]


def read_images(sources: list[Path], split: Split, size: int) -> Tensor:
    """The images of a split, uint8 `[N, size, size, 3]`, at most MAX_IMAGES. UserError at an unreadable one."""
    members = [(shards, i) for shards in open_media(sources, split, ImageModality.name) for i in range(len(shards))]
    count = min(len(members), MAX_IMAGES[split])
    chosen = [members[i * len(members) // count] for i in range(count)]
    data = ((shards, i, shards.read(i)) for shards, i in chosen)

    def read(shards_i_data: tuple) -> PixelArray:
        shards, i, media = shards_i_data
        try:
            return square_pixels(media, shards.extensions[i], size)
        except UnreadableMedia as error:
            remedy = "rebuild these shards with `megamm data build`, which leaves such samples out"
            raise UserError(f"sample {shards.keys[i]}: {error}", where=shards.folder, remedy=remedy) from error

    with ThreadPoolExecutor() as threads:  # Pillow decodes outside the interpreter lock
        return torch.from_numpy(np.stack(list(threads.map(read, data))))


def _train(
    codec: ImageCodec, train: Tensor, heldout: Tensor, training: ImageTraining, device: torch.device, dtype: torch.dtype
) -> Iterator[Report]:
    """Train in place; yields a report ten times and at the end."""
    matrices = [p for p in codec.parameters() if p.ndim > 1]
    vectors = [p for p in codec.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.95))
    batches = _batches(train, training)
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate_at(step)
        pixels = to_pixels(next(batches).to(device))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            reconstruction, _ = codec(pixels)
        loss = nn.functional.mse_loss(reconstruction.float(), pixels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        done = step + 1
        if done == training.steps or done % max(1, training.steps // 10) == 0:
            report = evaluate(codec, heldout, done, device)
            logger.info(
                "step %d/%d: train loss %.4f, held-out loss %.4f, PSNR %.2f dB, %.0f %% of the codes, perplexity %.0f",
                *(done, training.steps, loss.item(), report.loss, report.psnr_db),
                *(100 * report.codes_used, report.perplexity),
            )
            yield report


def _batches(images: Tensor, training: ImageTraining) -> Iterator[Tensor]:
    """Endless batches `[B, Y, X, 3]`, every image once an epoch, in an order that only the seed decides."""
    generator = torch.Generator().manual_seed(training.seed)
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < training.batch_size:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        yield images[order[: training.batch_size]]
        order = order[training.batch_size :]


@torch.inference_mode()
def evaluate(codec: ImageCodec, images: Tensor, step: int, device: torch.device, batch_size: int = 64) -> Report:
    """Quality on uint8 `[N, Y, X, 3]`, computed in float32."""
    squared, squared_8bit = 0.0, 0.0
    counts = torch.zeros(codec.config.codebook_size, dtype=torch.int64)
    for batch in images.split(batch_size):
        reconstruction, ids = codec(to_pixels(batch.to(device)))
        squared += (reconstruction - to_pixels(batch.to(device))).square().sum().item()
        squared_8bit += (to_images(reconstruction).cpu().float() - batch.float()).square().sum().item()
        counts += torch.bincount(ids.flatten().cpu(), minlength=len(counts))
    values = images.numel()
    frequency = counts[counts > 0].double() / counts.sum()
    return Report(
        step=step,
        loss=squared / values,
        psnr_db=10 * math.log10(255**2 / max(squared_8bit / values, 1e-10)),
        codes_used=(counts > 0).float().mean().item(),
        perplexity=math.exp(-(frequency * frequency.log()).sum().item()),
    )


def _warn_of_collapse(report: Report, config: ImageCodecConfig, images: int) -> None:
    possible = min(config.codebook_size, images * config.grid_size**2)
    used = round(report.codes_used * config.codebook_size)
    if used < COLLAPSED * possible:
        logger.warning("codebook collapsed: %d codes of %d are used; train longer or at a lower rate", used, possible)
