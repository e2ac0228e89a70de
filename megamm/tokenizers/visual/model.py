"""The visual codec: an FSQ autoencoder of videos, uint8 `[B, F, Y, X, 3]` <-> ids `[B, T]`; an image is one frame.

Causal in time: the first frame is coded alone, and each further latent frame covers `frames_per_step` frames, so that
F = 1 + n * frames_per_step frames give 1 + n latent frames. Ids and decoded frames never depend on later frames, and a
video's first latent frame is that of its first frame as an image, with one codebook for both.
T = (1 + n) * (image_size / downsample)^2, in the order of time, rows, columns. Sources: ops/patch_embed.py (the causal
patches), tokenizers/fsq.py (the quantiser).

Layers work on frames `[B * T, C, Y, X]` of B videos of T frames each. Spatial layers see one frame at a time; temporal
layers see a frame and earlier ones, so that the code of a frame never depends on a later one. Time is padded with zeros
on the left: causal convolutions, as in MAGVIT-v2 (Yu et al. 2023, "Language Model Beats Diffusion", section 3.2).
"""

import logging
import math
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from megamm import ops
from megamm.common.device import Device
from megamm.ops.op_proofs import KernelSizes, op_proofs
from megamm.ops.proof import UNPROVEN
from megamm.ops.proof_cache import prove_here
from megamm.tokenizers.fsq import FSQ
from megamm.tokenizers.io import CodecConfig

logger = logging.getLogger(__name__)

TEMPORAL_KERNEL = 3
"""Frames that a temporal convolution sees: this one and two earlier ones."""
KIND = "megamm-visual-fsq"
"""`kind` in config.json, which identifies this codec's folder."""
FRAMES_AT_ONCE = 128
"""Frames of a batch outside of training: more are not faster, and take more memory."""
PROVEN_SIZES = KernelSizes(tokens=0, hidden=64, width=0, heads=0, groups=0, head_dim=0, vocabulary=0)
"""Of the inputs with which the patch operators are compared; they only have channels."""
CENTRED = (0.5, 0.5, 0.5)
"""Mean and standard deviation that map x / 255 to [-1, 1]."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a residual; keeps `[N, C, Y, X]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv_in = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)  # starts as the identity, which trains faster

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.conv_out(nn.functional.gelu(self.conv_in(self.norm(hidden))))


class TemporalBlock(nn.Module):
    """A causal temporal convolution and a 1x1 convolution with a residual; keeps `[B * T, C, Y, X]`.

    The temporal one is a 1x1 convolution over the channels of three frames, which is faster than a Conv3d.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv_in = nn.Conv2d(TEMPORAL_KERNEL * width, width, 1)
        self.conv_out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, hidden: Tensor, frames: int) -> Tensor:
        """frames: T."""
        return hidden + self.conv_out(nn.functional.gelu(self._over_time(self.norm(hidden), frames)))

    def _over_time(self, hidden: Tensor, frames: int) -> Tensor:
        weight, bias = self.conv_in.weight, self.conv_in.bias
        seen = min(frames, TEMPORAL_KERNEL)  # an image costs one frame: weights that would meet padding are not used
        videos = hidden.unflatten(0, (-1, frames))
        # Channels of the frames t - 2, t - 1 and t side by side, the earliest first; zeros before the first frame.
        earlier = [
            torch.cat([torch.zeros_like(videos[:, :lag]), videos[:, : frames - lag]], 1)
            for lag in range(seen - 1, -1, -1)
        ]
        return nn.functional.conv2d(torch.cat(earlier, 2).flatten(0, 1), weight[:, -seen * hidden.shape[1] :], bias)


class Upsample(nn.Module):
    """`[N, width, Y, X]` to `[N, new_width, 2 Y, 2 X]`."""

    def __init__(self, width: int, new_width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * new_width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(self.conv(hidden), 2)


class CausalUpsample(nn.Module):
    """`[B * T, width, Y, X]` to `[B * F, new_width, 2 Y, 2 X]`, F = 1 + (T - 1) * steps.

    The first latent frame gives one frame: the last of `steps`, where the causal patch has it.
    """

    def __init__(self, width: int, new_width: int, steps: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, new_width * steps * 4, 1)
        self.new_width, self.steps = new_width, steps

    def forward(self, hidden: Tensor, frames: int, implementation: ops.Ops) -> Tensor:
        """frames: T."""
        *_, rows, columns = hidden.shape
        if frames == 1:  # an image costs one frame
            weight, bias = (p.unflatten(0, (self.new_width, self.steps, 4)) for p in self.conv.parameters())
            made = nn.functional.conv2d(hidden, weight[:, -1].flatten(0, 1), bias[:, -1].flatten())
            return nn.functional.pixel_shuffle(made, 2)
        patches = self.conv(hidden).unflatten(0, (-1, frames)).permute(0, 1, 3, 4, 2)
        size, patch = (1 + (frames - 1) * self.steps, 2 * rows, 2 * columns), (self.steps, 2, 2)
        options = {"patch": patch, "channels": self.new_width, "size": size}
        videos = implementation.unpatchify_3d(patches, **options, layout="channels_last", causal=True)
        return videos.flatten(0, 1).permute(0, 3, 1, 2)


class VisualCodecConfig(CodecConfig):
    """Sizes of the codec; `image_size` and `downsample` in pixels, `frame_rate` in Hz, `max_frames` of a video."""

    kind: str = Field(default=KIND, pattern=f"^{KIND}$")
    image_size: int = Field(default=64, ge=16, le=2048)
    downsample: int = Field(default=8, ge=4, le=64, multiple_of=4)
    frames_per_step: int = Field(default=4, ge=1, le=16)
    frame_rate: float = Field(default=8.0, gt=0, le=240)
    max_frames: int = Field(default=17, ge=1, le=4096)
    width: int = Field(default=64, ge=16, le=4096, multiple_of=16)
    encoder_depth: int = Field(default=1, ge=0, le=64)
    decoder_depth: int = Field(default=2, ge=0, le=64)
    levels: tuple[int, ...] = (8, 5, 5, 5)

    @model_validator(mode="after")
    def _check(self) -> "VisualCodecConfig":
        if self.image_size % self.downsample:
            raise ValueError(f"image_size {self.image_size} is not a multiple of downsample {self.downsample}")
        if not self.levels or min(self.levels) < 2 or math.prod(self.levels) > 2**20:
            raise ValueError(f"levels {self.levels} must be 2 or more each, with at most 2^20 codes")
        return self

    @property
    def grid_size(self) -> int:
        """Rows (and columns) of the latent grid."""
        return self.image_size // self.downsample

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels)


class Encoder(nn.Module):
    """Frames to latents for the quantiser, all at the resolution of the latent grid, where it costs least."""

    def __init__(self, config: VisualCodecConfig) -> None:
        super().__init__()
        self.patch = (config.frames_per_step, config.downsample, config.downsample)
        self.embed = nn.Linear(3 * math.prod(self.patch), config.width)
        self.spatial = nn.ModuleList(ResidualBlock(config.width) for _ in range(config.encoder_depth))
        self.temporal = nn.ModuleList(TemporalBlock(config.width) for _ in range(config.encoder_depth))
        self.head = nn.Conv2d(config.width, len(config.levels), 1)

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 `[B, F, Y, X, 3]` to `[B, T', Y', X', C]`, T' latent frames of Y' x X' with one channel per level."""
        patches = chosen_ops(frames.device).patch_embed_3d(
            frames,
            self.embed.weight,
            self.embed.bias,
            patch=self.patch,
            mean=CENTRED,
            std=CENTRED,
            layout="channels_last",
            causal=True,
        )
        hidden = patches.flatten(0, 1).permute(0, 3, 1, 2)  # channels last in memory: fastest for convolutions
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            hidden = temporal(spatial(hidden), patches.shape[1])
        return self.head(hidden).permute(0, 2, 3, 1).unflatten(0, patches.shape[:2])


class Decoder(nn.Module):
    """Codes to frames; ends in two cheap stages at 2x and 4x of the grid, which smooth the seams between patches."""

    def __init__(self, config: VisualCodecConfig) -> None:
        super().__init__()
        width, self.pixels = config.width, config.downsample // 4
        self.stem = nn.Conv2d(len(config.levels), width, 1)
        self.spatial = nn.ModuleList(ResidualBlock(width) for _ in range(config.decoder_depth))
        self.temporal = nn.ModuleList(TemporalBlock(width) for _ in range(config.decoder_depth))
        self.expand = CausalUpsample(width, width // 2, config.frames_per_step)
        self.smooth_time = TemporalBlock(width // 2)
        self.finish = nn.Sequential(
            ResidualBlock(width // 2),
            Upsample(width // 2, width // 4),
            nn.Conv2d(width // 4, width // 4, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 4, 3 * self.pixels**2, 1),
        )

    def forward(self, codes: Tensor) -> Tensor:
        """Codes `[B, T', Y', X', C]` to pixels `[B, F, Y, X, 3]`, nominally in [-1, 1]."""
        batch, steps = codes.shape[:2]
        implementation = chosen_ops(codes.device)
        hidden = self.stem(codes.flatten(0, 1).permute(0, 3, 1, 2))
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            hidden = temporal(spatial(hidden), steps)
        hidden = self.expand(hidden, steps, implementation)
        hidden = self.finish(self.smooth_time(hidden, hidden.shape[0] // batch))
        patches = hidden.unflatten(0, (batch, -1)).permute(0, 1, 3, 4, 2)
        size = (patches.shape[1], patches.shape[2] * self.pixels, patches.shape[3] * self.pixels)
        patch = (1, self.pixels, self.pixels)
        return implementation.unpatchify_3d(patches, patch=patch, channels=3, size=size, layout="channels_last")


class VisualCodec(nn.Module):
    """Encoder, FSQ and decoder, with the attributes of every visual codec."""

    Config: ClassVar[type[VisualCodecConfig]] = VisualCodecConfig

    def __init__(self, config: VisualCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_size, self.grid_size = config.codebook_size, config.grid_size
        self.image_size, self.frames_per_step = config.image_size, config.frames_per_step
        self.frame_rate, self.max_frames = config.frame_rate, config.max_frames
        self.quantiser = FSQ(config.levels)
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def forward(self, *batches: Tensor) -> Tensor:
        """Batches uint8 `[B, F, Y, X, 3]`, each with videos of one length, to the mean squared error of all samples."""
        samples = sum(len(frames) for frames in batches)
        losses = [len(f) * nn.functional.mse_loss(self.reconstruct(f)[0].float(), to_pixels(f)) for f in batches]
        return torch.stack(losses).sum() / samples

    def reconstruct(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 `[B, F, Y, X, 3]` to (pixels of the same shape, nominally in [-1, 1]; ids `[B, T]`)."""
        codes = self.quantiser(self.encoder(frames))
        return self.decoder(codes), self.quantiser.to_indices(codes).flatten(1)

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 `[B, F, Y, X, 3]`, F = 1 + n * frames_per_step, to ids `[B, T]`, int64. ValueError for another F."""
        return self.quantiser.to_indices(self.quantiser(self.encoder(frames))).flatten(1)

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        """ids `[B, T]` to uint8 `[B, F, Y, X, 3]`. Raises ValueError for incomplete frames or an id out of range."""
        grid = self.grid_size
        check_ids(ids, grid, self.codebook_size)
        return to_frames(self.decoder(self.quantiser.to_codes(ids.unflatten(1, (-1, grid, grid)))))


def check_ids(ids: Tensor, grid: int, codebook_size: int) -> None:
    """Raise ValueError unless `[B, T]` are ids of whole latent frames of grid x grid."""
    if not ids.shape[1] or ids.shape[1] % grid**2:
        raise ValueError(f"{ids.shape[1]} ids are not whole frames of {grid} x {grid}")
    if ids.min() < 0 or ids.max() >= codebook_size:
        raise ValueError(f"ids must be in [0, {codebook_size})")


@cache
def chosen_ops(device: torch.device) -> ops.Ops:
    """The compiled patch operators if they are built for the device and agree with plain torch, else torch's."""
    proven = UNPROVEN
    if ops.library.choose("auto", device)[0] == "csrc":
        proofs = op_proofs(("patch_embed_3d", "unpatchify_3d"), torch.float32, PROVEN_SIZES)
        proven = prove_here(proofs, Device(device, "gloo" if device.type == "cpu" else "nccl"))
    chosen, reason = ops.choose("auto", device, proven)
    logger.info("visual tokenizer on %s: %s operators, %s", device, chosen.name, reason)
    return chosen


def batches_of_one_length(lengths: Sequence[int]) -> list[list[int]]:
    """Batches of video numbers, given lengths in frames: one length each, at most FRAMES_AT_ONCE frames."""
    batches = []
    for length, group in groupby(sorted(range(len(lengths)), key=lengths.__getitem__), lengths.__getitem__):
        numbers, at_once = list(group), max(1, FRAMES_AT_ONCE // length)
        batches += [numbers[i : i + at_once] for i in range(0, len(numbers), at_once)]
    return batches


def to_pixels(frames: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1], any shape."""
    return frames.float() / 127.5 - 1


def to_frames(pixels: Tensor) -> Tensor:
    """float in [-1, 1] to uint8, rounded and clipped, any shape."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
