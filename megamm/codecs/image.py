"""The image codec: an FSQ autoencoder of square images, uint8 `[B, Y, X, 3]` <-> ids `[B, T]`.

T = (image_size / downsample)^2, row-major over the latent grid. A folder of two files: `config.json` and
`model.safetensors`. Source of the quantiser: codecs/fsq.py.
"""

import math
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from megamm.codecs.folders import CodecConfig
from megamm.codecs.fsq import FSQ

KIND = "megamm-image-fsq"
"""`kind` in config.json: what tells this codec's folder from any other."""


class ImageCodecConfig(CodecConfig):
    """Sizes of the codec; `image_size` and `downsample` in pixels."""

    kind: str = Field(default=KIND, pattern=f"^{KIND}$")
    image_size: int = Field(default=64, ge=8, le=2048)
    downsample: int = Field(default=8, ge=4, le=64, multiple_of=4)
    width: int = Field(default=64, ge=16, le=4096, multiple_of=16)
    encoder_depth: int = Field(default=1, ge=0, le=64)
    decoder_depth: int = Field(default=2, ge=0, le=64)
    levels: tuple[int, ...] = (8, 5, 5, 5)

    @model_validator(mode="after")
    def _check(self) -> "ImageCodecConfig":
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


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a residual, `[B, C, Y, X]` to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv_in = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)  # starts as the identity, which trains faster

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.conv_out(nn.functional.gelu(self.conv_in(self.norm(hidden))))


def upsample(width: int, new_width: int) -> tuple[nn.Module, nn.Module]:
    """`[B, width, Y, X]` to `[B, new_width, 2 Y, 2 X]`."""
    return nn.Conv2d(width, 4 * new_width, 1), nn.PixelShuffle(2)


class ImageCodec(nn.Module):
    """Encoder, FSQ and decoder. Nearly all work is at the resolution of the latent grid, where it costs least.

    The decoder ends in two cheap stages at 2x and 4x of it, which smooth the seams between the patches.
    """

    Config: ClassVar[type[ImageCodecConfig]] = ImageCodecConfig

    def __init__(self, config: ImageCodecConfig) -> None:
        super().__init__()
        self.config = config
        patch, width = 3 * config.downsample**2, config.width
        self.quantiser = FSQ(config.levels)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(config.downsample),
            nn.Conv2d(patch, width, 1),
            *[ResidualBlock(width) for _ in range(config.encoder_depth)],
            nn.Conv2d(width, len(config.levels), 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(len(config.levels), width, 1),
            *[ResidualBlock(width) for _ in range(config.decoder_depth)],
            *upsample(width, width // 2),
            ResidualBlock(width // 2),
            *upsample(width // 2, width // 4),
            nn.Conv2d(width // 4, width // 4, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 4, patch // 16, 1),
            nn.PixelShuffle(config.downsample // 4),
        )

    def forward(self, images: Tensor) -> Tensor:
        """uint8 `[B, Y, X, 3]` to the mean squared error of their reconstruction."""
        pixels = to_pixels(images)
        return nn.functional.mse_loss(self.reconstruct(pixels)[0].float(), pixels)

    def reconstruct(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels `[B, 3, Y, X]` in [-1, 1] to (reconstruction of the same shape, ids `[B, T]`)."""
        codes = self.quantiser(self.encoder(pixels).permute(0, 2, 3, 1))
        return self.decoder(codes.permute(0, 3, 1, 2)), self.quantiser.to_indices(codes).flatten(1)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 `[B, Y, X, 3]` to ids `[B, T]`, int64."""
        codes = self.quantiser(self.encoder(to_pixels(images)).permute(0, 2, 3, 1))
        return self.quantiser.to_indices(codes).flatten(1)

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        """ids `[B, T]` to uint8 `[B, Y, X, 3]`. ValueError if T is not the grid or an id is out of range."""
        grid = self.config.grid_size
        if ids.shape[1] != grid * grid:
            raise ValueError(f"{ids.shape[1]} ids for a grid of {grid} x {grid}")
        if ids.min() < 0 or ids.max() >= self.config.codebook_size:
            raise ValueError(f"ids must be in [0, {self.config.codebook_size})")
        codes = self.quantiser.to_codes(ids.view(-1, grid, grid))
        return to_images(self.decoder(codes.permute(0, 3, 1, 2)))


def to_pixels(images: Tensor) -> Tensor:
    """uint8 `[B, Y, X, 3]` to float32 `[B, 3, Y, X]` in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> Tensor:
    """float `[B, 3, Y, X]` in [-1, 1] to uint8 `[B, Y, X, 3]`, rounded and clipped."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
