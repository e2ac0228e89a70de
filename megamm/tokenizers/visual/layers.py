"""Layers of the visual codec, all on frames `[B * T, C, Y, X]` of B videos of T frames each.

Spatial layers see one frame at a time; temporal layers see a frame and earlier ones, so that the code of a frame never
depends on a later one. Time is padded with zeros on the left: causal convolutions, as in MAGVIT-v2
(Yu et al. 2023, "Language Model Beats Diffusion", section 3.2).
"""

import torch
from torch import Tensor, nn

from megamm.ops import Ops

TEMPORAL_KERNEL = 3
"""Frames that a temporal convolution sees: this one and two earlier ones."""


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

    def forward(self, hidden: Tensor, frames: int, ops: Ops) -> Tensor:
        """frames: T."""
        *_, rows, columns = hidden.shape
        if frames == 1:  # an image costs one frame
            weight, bias = (p.unflatten(0, (self.new_width, self.steps, 4)) for p in self.conv.parameters())
            made = nn.functional.conv2d(hidden, weight[:, -1].flatten(0, 1), bias[:, -1].flatten())
            return nn.functional.pixel_shuffle(made, 2)
        patches = self.conv(hidden).unflatten(0, (-1, frames)).permute(0, 1, 3, 4, 2)
        size, patch = (1 + (frames - 1) * self.steps, 2 * rows, 2 * columns), (self.steps, 2, 2)
        options = {"patch": patch, "channels": self.new_width, "size": size}
        videos = ops.unpatchify_3d(patches, **options, layout="channels_last", causal=True)
        return videos.flatten(0, 1).permute(0, 3, 1, 2)
