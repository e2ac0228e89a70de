"""Training the image codec: images `[N, Y, X, 3]` decoded once, mean squared error.

Reads the train split; reports on the held-out split: `loss` (MSE of pixels in [-1, 1]), `psnr_db`
(10 log10(255^2 / MSE) over all 8-bit values), `codes_used` (share of the codebook that occurs) and
`perplexity` (exp of the entropy of the codes' frequencies).
"""

import json
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megamm.codecs.folders import Split, new_folder, open_media, save_codec
from megamm.codecs.image import ImageCodec, ImageCodecConfig, to_images, to_pixels
from megamm.codecs.training import Figures, Training, codebook_use, train_codec, warn_of_collapse
from megamm.device import Device
from megamm.errors import UserError
from megamm.modalities.base import UnreadableMedia
from megamm.modalities.image import ImageModality, PixelArray, square_pixels

logger = logging.getLogger(__name__)

MAX_IMAGES = {"train": 100_000, "heldout": 1_000}
"""Larger splits are thinned evenly: a codec needs no more, and they are kept in memory (12 kB each at 64 pixels)."""


class _Images:
    """uint8 `[N, Y, X, 3]` as training data."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, numbers: list[int], epoch: int) -> tuple[Tensor, ...]:
        return (self.images[numbers],)


def train_image_codec(
    sources: list[Path],
    target: Path,
    config: ImageCodecConfig,
    training: Training,
    place: Device,
    dtype: torch.dtype = torch.float32,
) -> Figures:
    """Train on `sources` and write the codec folder `target`, with training.json; returns the last report.

    UserError if there is no image or the target exists.
    """
    with new_folder(target) as folder:
        size = config.image_size
        train, heldout = read_images(sources, "train", size), read_images(sources, "heldout", size)
        logger.info("%d images to train on, %d held out", len(train), len(heldout))
        torch.manual_seed(training.seed)
        codec = ImageCodec(config)
        reports = train_codec(
            codec, _Images(train), training, place, lambda _, step: evaluate(codec, heldout, place.torch_device), dtype
        )
        save_codec(codec, folder)
        record = asdict(training) | {"train_images": len(train), "heldout_images": len(heldout), "heldout": reports}
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    if not reports:  # not the first rank
        return {}
    warn_of_collapse(reports[-1]["codes_used"], config.codebook_size, len(heldout) * config.grid_size**2)
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


@torch.inference_mode()
def evaluate(codec: ImageCodec, images: Tensor, device: torch.device, batch_size: int = 64) -> Figures:
    """Quality on uint8 `[N, Y, X, 3]`, computed in float32."""
    squared, squared_8bit = 0.0, 0.0
    counts = torch.zeros(codec.config.codebook_size, dtype=torch.int64)
    for batch in images.split(batch_size):
        reconstruction, ids = codec.reconstruct(to_pixels(batch.to(device)))
        squared += (reconstruction - to_pixels(batch.to(device))).square().sum().item()
        squared_8bit += (to_images(reconstruction).cpu().float() - batch.float()).square().sum().item()
        counts += torch.bincount(ids.flatten().cpu(), minlength=len(counts))
    values = images.numel()
    psnr_db = 10 * math.log10(255**2 / max(squared_8bit / values, 1e-10))
    return {"loss": squared / values, "psnr_db": psnr_db, **codebook_use(counts)}
