"""Finite scalar quantisation (FSQ): the codebook is a fixed grid, so it is not learned and cannot collapse.

Source: Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple", section 3 and appendix A.1.
Channel c of a latent `[..., C]` is bounded to levels[c] values and rounded; the C digits form an index in
[0, prod(levels)), mixed radix, first channel least significant. Codes are scaled to about [-1, 1].
"""

import math

import torch
from torch import Tensor, nn


class FSQ(nn.Module):
    """Quantises the last axis, one channel per entry of levels. The buffers are constants and not saved."""

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"FSQ needs at least one channel and two levels in each, not {levels}")
        self.codebook_size = math.prod(levels)
        basis = [math.prod(levels[:c]) for c in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def forward(self, latent: Tensor) -> Tensor:
        """Latent `[..., C]` of any real value to codes `[..., C]`; the gradient passes the rounding unchanged."""
        bounded = self.bound(latent)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (self.levels // 2)

    def bound(self, latent: Tensor) -> Tensor:
        """Squash channel c so that rounding gives exactly levels[c] integers: -(L//2) .. (L-1)//2."""
        half_width = (self.levels - 1) * (1 + 1e-3) / 2  # the margin keeps the outermost levels reachable
        offset = (self.levels % 2 == 0) * 0.5  # an even number of integers is not symmetric around 0 ...
        shift = torch.atanh(offset / half_width)  # ... but latent 0 still maps to 0
        return torch.tanh(latent + shift) * half_width - offset

    def to_indices(self, codes: Tensor) -> Tensor:
        """Codes `[..., C]` to indices `[...]`, int64."""
        digits = (codes * (self.levels // 2)).round().long() + self.levels // 2
        return (digits * self.basis).sum(-1)

    def to_codes(self, indices: Tensor) -> Tensor:
        """Indices `[...]` in [0, codebook_size) to codes `[..., C]`, float32."""
        digits = indices[..., None] // self.basis % self.levels
        half = self.levels // 2
        return (digits - half).float() / half
