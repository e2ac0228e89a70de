"""The points codec: clouds float32 `[B, N, 9]` <-> ids int64 `[B, T]`: explicit cells and learnt shapes of patches.

A cloud (xyz in [-1, 1], unit normal, RGB in [0, 1]) is halved at the median repeatedly, by height, then width, then
depth, into patches with equal numbers of points. So patch number p is always the same part of the cloud's quantiles.
Each patch is two tokens (T = 2 patches): a CELL, the cube of a regular grid that holds the patch's mean, and a SHAPE,
the FSQ code of its points relative to the cell's centre. Ids: cells 0 .. cells^3 - 1, then shapes; order cell, shape,
cell, shape. The order of the input's points has no effect.

Sources: Qi et al. 2017, "PointNet" (encoder of a patch); Bentley 1975, k-d trees (the halving); Fan et al. 2017, "A
Point Set Generation Network", section 4 (Chamfer distance, here within patches); tokenizers/fsq.py.
"""

import math
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from megamm.tokenizers.fsq import FSQ
from megamm.tokenizers.io import CodecConfig

KIND = "megamm-points-fsq"
"""`kind` in config.json, which identifies this codec's folder."""
CHANNELS = 9
HALVING_AXES = (1, 0, 2)
"""Height first: it is the most similar axis from one standing thing to the next."""
PATCH_SIZE = 0.25
"""Length unit of a patch's own coordinates, about its radius, so that the network sees values around 1."""
DISTANCE_WEIGHT, NORMAL_WEIGHT = 4.0, 0.1
SPREAD_WEIGHT = 0.05


class PointsCodecConfig(CodecConfig):
    """Sizes of the codec: `points` in and out, `patches` of points, `cells` along each axis of [-1, 1].

    `colour_weight` is the weight of colours in the training loss: at 1, codes keep shapes better than colours.
    """

    kind: str = Field(default=KIND, pattern=f"^{KIND}$")
    points: int = Field(default=2048, ge=8, le=2**20)
    patches: int = Field(default=64, ge=2, le=2**14)
    cells: int = Field(default=16, ge=2, le=64)
    width: int = Field(default=128, ge=16, le=4096, multiple_of=16)
    encoder_depth: int = Field(default=1, ge=0, le=64)
    decoder_depth: int = Field(default=2, ge=0, le=64)
    levels: tuple[int, ...] = (8, 5, 5, 5)
    colour_weight: float = Field(default=1.0, ge=0.0, le=1000.0)

    @model_validator(mode="after")
    def _check(self) -> "PointsCodecConfig":
        if self.patches & (self.patches - 1):
            raise ValueError(f"patches {self.patches} is not a power of two")
        if self.points % self.patches or self.points < 2 * self.patches:
            raise ValueError(f"points {self.points} is not a multiple of patches {self.patches}, 2 or more each")
        if not self.levels or min(self.levels) < 2 or math.prod(self.levels) > 2**20:
            raise ValueError(f"levels {self.levels} must be 2 or more each, with at most 2^20 codes")
        return self

    @property
    def cell_count(self) -> int:
        return self.cells**3

    @property
    def codebook_size(self) -> int:
        """Number of shape ids."""
        return math.prod(self.levels)

    @property
    def vocabulary_size(self) -> int:
        return self.cell_count + self.codebook_size


class TransformerLayer(nn.Module):
    """A pre-norm transformer layer over the patches of a cloud; keeps `[B, P, D]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 16 if width < 64 else width // 32
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        for last in (self.out, self.mlp_out):  # starts as the identity, which trains faster
            nn.init.zeros_(last.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(hidden)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        hidden = hidden + self.out(mixed)
        return hidden + self.mlp_out(nn.functional.gelu(self.mlp_in(self.mlp_norm(hidden))))


class PatchEmbedding(nn.Module):
    """Embedding of a patch's number and cell: centres `[B, P, 3]` to `[B, P, D]`."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.number = nn.Parameter(0.02 * torch.randn(patches, width))
        self.centre = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, centres: Tensor) -> Tensor:
        return self.centre(centres) + self.number


class PointsCodec(nn.Module):
    """Encoder, FSQ and decoder; cells need no training, and limit the error even without it."""

    Config: ClassVar[type[PointsCodecConfig]] = PointsCodecConfig

    def __init__(self, config: PointsCodecConfig) -> None:
        super().__init__()
        self.config = config
        width, codes = config.width, len(config.levels)
        self.quantiser = FSQ(config.levels)
        self.point_encoder = nn.Sequential(
            nn.Linear(CHANNELS, width // 2), nn.ReLU(), nn.Linear(width // 2, width // 2)
        )
        self.patch_encoder = nn.Linear(width, width)
        # `encoder_places` and `decoder_places` are names of tensors in saved codecs.
        self.encoder_places = PatchEmbedding(config.patches, width)
        self.encoder = nn.Sequential(
            *[TransformerLayer(width) for _ in range(config.encoder_depth)], nn.LayerNorm(width)
        )
        self.to_latent = nn.Linear(width, codes)
        self.from_codes = nn.Linear(codes, width)
        self.decoder_places = PatchEmbedding(config.patches, width)
        self.decoder = nn.Sequential(
            *[TransformerLayer(width) for _ in range(config.decoder_depth)], nn.LayerNorm(width)
        )
        outputs = config.points // config.patches * CHANNELS
        last = nn.Linear(2 * width, outputs)
        # Points that start at the same coordinates all have the same nearest points, and separate slowly.
        last.bias.data.view(-1, CHANNELS)[:, :3].normal_(std=0.5)
        self.to_points = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), last)

    @property
    def points(self) -> int:
        """N, the number of points of the input and the output."""
        return self.config.points

    @property
    def tokens(self) -> int:
        """T, the number of tokens."""
        return 2 * self.config.patches

    def forward(self, clouds: Tensor) -> Tensor:
        """The training loss of clouds `[B, N, 9]`, a mean over them."""
        patches = halve(clouds, self.config.patches)
        centres = self._centres(self._cells(patches))
        latents = self.to_latent(self._encoded(patches, centres)).float()
        decoded = self._decoded(self.quantiser(latents), centres)
        return patch_loss(patches, decoded, self.config.colour_weight) + SPREAD_WEIGHT * spread_loss(latents)

    @torch.inference_mode()
    def encode(self, clouds: Tensor) -> Tensor:
        """Clouds `[B, N, 9]` to ids `[B, T]`. Raises ValueError if N is wrong."""
        if clouds.shape[1:] != (self.config.points, CHANNELS):
            raise ValueError(f"clouds of shape {tuple(clouds.shape[1:])}, not {(self.config.points, CHANNELS)}")
        patches = halve(_in_one_order(clouds), self.config.patches)
        cells = self._cells(patches)
        shapes = self.quantiser.to_indices(self._codes(patches, self._centres(cells)))
        return torch.stack([cells, shapes + self.config.cell_count], dim=2).flatten(1)

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        """Ids `[B, T]` to clouds `[B, N, 9]`. Raises ValueError if T is wrong, or an id is invalid at its index."""
        if ids.shape[1] != self.tokens:
            raise ValueError(f"{ids.shape[1]} ids, expected {self.tokens}")
        cells, shapes = ids.view(len(ids), -1, 2).unbind(2)
        shapes = shapes - self.config.cell_count
        for name, index, count in (
            ("cell", cells, self.config.cell_count),
            ("shape", shapes, self.quantiser.codebook_size),
        ):
            if index.min() < 0 or index.max() >= count:
                raise ValueError(f"an id at the index of a {name} is not one of the {count} {name}s")
        return self._decoded(self.quantiser.to_codes(shapes), self._centres(cells)).flatten(1, 2).clamp(-1, 1)

    def valid_token_ids(self, index: int) -> range:
        """Ids that are valid at this index of a cloud's tokens: cells at even ones, shapes at odd ones."""
        cells = self.config.cell_count
        return range(cells) if index % 2 == 0 else range(cells, self.config.vocabulary_size)

    @torch.no_grad()
    def calibrate(self, clouds: Tensor) -> None:
        """Before training, set the latents of clouds `[B, N, 9]` to their patches' whitened principal components.

        With random weights, nearly all patches start in a few codes, and stay there. Source of the idea: Salimans &
        Kingma 2016, "Weight Normalization", section 3 (data-dependent initialisation).
        """
        patches = halve(clouds, self.config.patches)
        hidden = self._encoded(patches, self._centres(self._cells(patches))).flatten(0, 1).double()
        mean = hidden.mean(0)
        variances, directions = torch.linalg.eigh((hidden - mean).T @ (hidden - mean) / len(hidden))
        codes = len(self.config.levels)
        # eigh sorts ascending: the last directions have the largest variance. Dividing by the deviation whitens them.
        weight = directions[:, -codes:].T / variances[-codes:, None].clamp(min=1e-12).sqrt()
        self.to_latent.weight.copy_(weight)
        self.to_latent.bias.copy_(-weight @ mean)

    def _cells(self, patches: Tensor) -> Tensor:
        """The cells `[B, P]` that contain the means of patches `[B, P, n, 9]`; x is the least significant digit."""
        # From [-1, 1] to cell numbers along each axis; a mean exactly at 1 belongs to the last cell.
        digits = ((patches[..., :3].mean(2) + 1) / 2 * self.config.cells).floor().long().clamp(0, self.config.cells - 1)
        return digits[..., 0] + self.config.cells * (digits[..., 1] + self.config.cells * digits[..., 2])

    def _centres(self, cells: Tensor) -> Tensor:
        """Centres `[B, P, 3]` of cells `[B, P]`."""
        digits = torch.stack([cells // self.config.cells**axis % self.config.cells for axis in range(3)], dim=-1)
        return (digits + 0.5) / self.config.cells * 2 - 1

    def _codes(self, patches: Tensor, centres: Tensor) -> Tensor:
        """Codes `[B, P, C]` of patches `[B, P, n, 9]` at their cells' centres."""
        return self.quantiser(self.to_latent(self._encoded(patches, centres)).float())

    def _encoded(self, patches: Tensor, centres: Tensor) -> Tensor:
        """The encoder's output for each patch, `[B, P, D]`."""
        xyz, normal, colour = patches.split((3, 3, 3), dim=-1)
        local = torch.cat([(xyz - centres[:, :, None]) / PATCH_SIZE, normal, 2 * colour - 1], dim=-1)
        points = self.point_encoder(local)
        hidden = self.patch_encoder(torch.cat([points.amax(2), points.mean(2)], dim=-1))
        return self.encoder(hidden + self.encoder_places(centres))

    def _decoded(self, codes: Tensor, centres: Tensor) -> Tensor:
        """The decoded patches `[B, P, n, 9]`, float32."""
        hidden = self.decoder(self.from_codes(codes) + self.decoder_places(centres))
        local, normal, colour = self.to_points(hidden).float().unflatten(-1, (-1, CHANNELS)).split((3, 3, 3), dim=-1)
        xyz = centres[:, :, None] + local * PATCH_SIZE
        return torch.cat([xyz, nn.functional.normalize(normal, dim=-1), colour.sigmoid()], dim=-1)


def quantile_of_patch(patches: int) -> npt.NDArray[np.int64]:
    """`[3, patches]`: the quantile of height, width and depth of each patch, from 0."""
    number, quantile = np.arange(patches), np.zeros((3, patches), dtype=np.int64)
    levels = patches.bit_length() - 1
    for level in range(levels):
        # Bit by bit from the first cut: 1 if the patch is in the upper half of it.
        upper_half = number >> (levels - 1 - level) & 1
        quantile[level % 3] = 2 * quantile[level % 3] + upper_half
    return quantile


def halve(clouds: Tensor, patches: int) -> Tensor:
    """Clouds `[B, N, 9]` cut at medians into `[B, patches, N / patches, 9]`; equal coordinates keep their order."""
    parts = clouds
    for level in range(patches.bit_length() - 1):
        # After sorting, cutting the sequence in two equal parts cuts at the median.
        parts = _sorted(parts, HALVING_AXES[level % 3])
        parts = parts.reshape(2 * len(parts), -1, CHANNELS)
    return parts.view(len(clouds), patches, -1, CHANNELS)


def _in_one_order(clouds: Tensor) -> Tensor:
    """Points `[B, N, 9]` sorted by all their channels, so that points with one equal coordinate have an order too."""
    # Stable sorts from the least to the most significant channel give one lexicographic order.
    for channel in reversed(range(CHANNELS)):
        clouds = _sorted(clouds, channel)
    return clouds


def _sorted(clouds: Tensor, channel: int) -> Tensor:
    order = clouds[:, :, channel].argsort(dim=1, stable=True)
    return clouds.gather(1, order[:, :, None].expand(-1, -1, CHANNELS))


def spread_loss(latents: Tensor) -> Tensor:
    """Distance of the latents `[B, P, C]` of each cloud from mean 0 and variance 1, where all codes are used equally.

    Without it they drift to the ends of the levels before the decoder has learnt to use them, and stay there.
    """
    return (latents.mean(1).square() + (latents.var(1) - 1).square()).mean()


def patch_loss(target: Tensor, output: Tensor, colour_weight: float) -> Tensor:
    """Squared distances within patches `[B, P, n, 9]`, plus normals and colours of nearest points, both directions."""
    target, output = target.flatten(0, 1), output.flatten(0, 1)
    with torch.no_grad():  # the choice of the nearest point has no gradient, its distance has one
        distance = torch.cdist(target[..., :3], output[..., :3])
    total = output.new_zeros(())
    # Both directions, so that neither side has points far from all points of the other.
    for axis, mine, others in ((2, target, output), (1, output, target)):
        nearest = distance.argmin(axis)
        matched = others.gather(1, nearest[:, :, None].expand(-1, -1, CHANNELS))
        apart = (mine[..., :3] - matched[..., :3]).square().sum(-1).mean() / PATCH_SIZE**2
        turned = (1 - (mine[..., 3:6] * matched[..., 3:6]).sum(-1)).mean()
        discoloured = (mine[..., 6:] - matched[..., 6:]).square().sum(-1).mean()
        total = total + DISTANCE_WEIGHT * apart + NORMAL_WEIGHT * turned + colour_weight * discoloured
    return total
