"""Trains the points codec: clouds `[N, 9]` drawn from shards of meshes and clouds, Chamfer distance within patches.

Reads the train split; reports on the held-out split, for clouds in [-1, 1] (a distance of 0.02 is 1 % of the longest
side), a = the input, b = its reconstruction, N points each:
- `chamfer`: mean over a of the distance to the nearest point of b, plus the same from b to a;
  `chamfer_squared`: the same with squared distances.
- `f_score`: harmonic mean of the shares of a and of b that have a point of the other within 0.05
  (Tatarchenko et al. 2019, "What Do Single-view 3D Reconstruction Networks Learn?", section 4.3).
- `colour_error`: root mean square difference of the RGB values, in [0, 1], from a point of a to the nearest of b;
  `normal_cosine`: mean absolute cosine between their normals.
- `floor_...`: the same figures with b = another sample of N points of the same surface. A cloud is one sample of many,
  so even a perfect codec of surfaces cannot be much better than this; only the error above it is the codec's.
- `codes_used`, `perplexity` of the shape tokens (tokenizers/training_loop.py); `cells_used`, a number of cells.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megamm.common.device import Device
from megamm.common.errors import UnreadableMedia, UserError
from megamm.media.points_file import read_points
from megamm.tokenizers.io import Split, new_folder, open_media, save_codec
from megamm.tokenizers.points.model import PointsCodec, PointsCodecConfig
from megamm.tokenizers.training_loop import Figures, Training, codebook_use, train_codec, warn_of_collapse

logger = logging.getLogger(__name__)

MAX_CLOUDS = {"train": 8192, "heldout": 256}
"""Larger splits are thinned evenly: they are kept in memory, 72 kB per draw of 2048 points."""
DRAWS = {"train": 4, "heldout": 2}
"""Draws of points per sample: training uses another one each epoch, the report computes its floor from two."""
CALIBRATION = 64
"""Clouds used to calibrate the codes' first scale."""
INTERIM = 16
"""Clouds of the reports before the last, which uses all: they cost as much as training steps."""
F_SCORE_DISTANCE = 0.05


class _Clouds:
    """float32 `[samples, draws, N, 9]` as training data."""

    def __init__(self, clouds: Tensor) -> None:
        self.clouds = clouds

    def __len__(self) -> int:
        return len(self.clouds)

    def batch(self, numbers: list[int], epoch: int) -> tuple[Tensor, ...]:
        return (self.clouds[numbers, epoch % self.clouds.shape[1]],)


def train_points_codec(
    sources: list[Path],
    target: Path,
    config: PointsCodecConfig,
    training: Training,
    device: Device,
    dtype: torch.dtype = torch.float32,
) -> Figures:
    """Train on `sources` and write the codec folder `target`, with training.json; returns the last report.

    Raises UserError if there is no mesh or cloud, or the target exists. Ranks other than the first return nothing.
    """
    with new_folder(target) as folder:
        train, heldout = (read_clouds(sources, split, config.points) for split in ("train", "heldout"))
        logger.info("%d clouds to train on, %d held out", len(train), len(heldout))
        torch.manual_seed(training.seed)
        codec = PointsCodec(config)
        codec.calibrate(train[:: -(-len(train) // CALIBRATION), 0])
        floor = floor_of(heldout.to(device.torch_device))

        def report(_: object, step: int) -> Figures:
            chosen = heldout if step == training.steps else heldout[:INTERIM]
            return evaluate(codec, chosen[:, 0].to(device.torch_device))

        reports = train_codec(codec, _Clouds(train), training, device, report, dtype)
        if reports:
            reports[-1] |= floor
        save_codec(codec, folder)
        record = asdict(training) | {"train_clouds": len(train), "heldout_clouds": len(heldout), "heldout": reports}
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    if not reports:
        return {}
    warn_of_collapse(reports[-1]["codes_used"], config.codebook_size, len(heldout) * config.patches, "shape codebook")
    return reports[-1]


def read_clouds(sources: list[Path], split: Split, points: int) -> Tensor:
    """The clouds of a split, `[samples, draws, points, 9]`, at most MAX_CLOUDS. Raises UserError if unreadable."""
    members = [(shards, i) for shards in open_media(sources, split, "points") for i in range(len(shards))]
    count = min(len(members), MAX_CLOUDS[split])
    clouds = np.empty((count, DRAWS[split], points, 9), dtype=np.float32)
    for number in range(count):
        shards, i = members[number * len(members) // count]
        try:
            clouds[number] = read_points(shards.read(i), shards.extensions[i], points, DRAWS[split])
        except UnreadableMedia as error:
            remedy = "rebuild these shards with `megamm data build`, which skips such samples"
            raise UserError(f"sample {shards.keys[i]}: {error}", where=shards.folder, remedy=remedy) from error
    return torch.from_numpy(clouds)


@torch.inference_mode()
def evaluate(codec: PointsCodec, clouds: Tensor) -> Figures:
    """The module docstring's figures, except the floor, on clouds `[samples, N, 9]`, computed in float32."""
    counts = torch.zeros(codec.config.vocabulary_size, dtype=torch.int64, device=clouds.device)
    figures = []
    for cloud in clouds:
        ids = codec.encode(cloud[None])
        counts += ids.flatten().bincount(minlength=len(counts))
        figures.append(compare(cloud, codec.decode(ids)[0]))
    cells, shapes = counts.split([codec.config.cell_count, codec.config.codebook_size])
    return _means(figures) | codebook_use(shapes) | {"cells_used": (cells > 0).sum().item()}


def floor_of(heldout: Tensor) -> Figures:
    """Figures between two draws of each sample `[samples, 2 or more, N, 9]`, if the draws share no point."""
    figures = [compare(draws[0], draws[1]) for draws in heldout if not _share_a_point(draws[0], draws[1])]
    if len(figures) < len(heldout):
        what = "no floor figures for %d held-out clouds: they have too few points for two draws"
        logger.info(what, len(heldout) - len(figures))
    return {f"floor_{name}": value for name, value in _means(figures).items()}


def _share_a_point(one: Tensor, other: Tensor) -> bool:
    return len(torch.cat([one, other]).unique(dim=0)) < len(one) + len(other)


def _means(figures: list[Figures]) -> Figures:
    return {name: sum(f[name] for f in figures) / len(figures) for name in figures[0]} if figures else {}


def compare(a: Tensor, b: Tensor) -> Figures:
    """Figures of reconstruction b `[M, 9]` of cloud a `[N, 9]`."""
    # The fast way, with a matrix product, loses the small distances that matter here.
    distance = torch.cdist(a[:, :3], b[:, :3], compute_mode="donot_use_mm_for_euclid_dist")
    from_a, from_b = distance.min(1), distance.min(0)
    nearest = b[from_a.indices]
    recall, precision = ((d.values < F_SCORE_DISTANCE).float().mean().item() for d in (from_a, from_b))
    return {
        "chamfer": (from_a.values.mean() + from_b.values.mean()).item(),
        "chamfer_squared": (from_a.values.square().mean() + from_b.values.square().mean()).item(),
        "f_score": 2 * recall * precision / max(recall + precision, 1e-12),
        "colour_error": (a[:, 6:] - nearest[:, 6:]).square().mean().sqrt().item(),
        "normal_cosine": (a[:, 3:6] * nearest[:, 3:6]).sum(1).abs().mean().item(),
    }
