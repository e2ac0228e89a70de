"""Finite scalar quantisation (FSQ) and residual FSQ.

FSQ: the codebook is a fixed grid, so it is not learned and cannot collapse. Source: Mentzer et al. 2023, "Finite Scalar
Quantization: VQ-VAE Made Simple", section 3 and appendix A.1. Channel c of a latent `[..., C]` is bounded to levels[c]
values and rounded; the C digits form an index in [0, prod(levels)), mixed radix, first channel least significant. Codes
are scaled to about [-1, 1].

Residual FSQ: Q quantisers in a row, each coding the residual of the ones before it. Level q normalises the residual
`[..., D]`, projects it to a few channels, quantises them and projects the codes back; this is subtracted before level
q + 1, and the sum over the levels is the output. Without normalisation later levels get ever smaller values and use few
codes (Zhu 2025, "Robust Residual Finite Scalar Quantization for Neural Compression", which also uses LayerNorm). With
its own projections each level chooses the directions in which it refines, not only the step. Sources: Zeghidour et al.
2021, "SoundStream", section III-C (residual quantisation); Kumar et al. 2023, "High-Fidelity Audio Compression with
Improved RVQGAN", section 3.2 (projections to few channels at each level).
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
        # Straight-through estimator: rounding forward, identity backward (Bengio et al. 2013).
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
        # A number in mixed radix: the digit of channel c is one of levels[c], and basis[c] is its weight.
        digits = (codes * (self.levels // 2)).round().long() + self.levels // 2
        return (digits * self.basis).sum(-1)

    def to_codes(self, indices: Tensor) -> Tensor:
        """Indices `[...]` in [0, codebook_size) to codes `[..., C]`, float32."""
        digits = indices[..., None] // self.basis % self.levels
        half = self.levels // 2
        return (digits - half).float() / half


class ResidualFSQ(nn.Module):
    """`[..., D]` to its quantised form and Q codes, each in [0, K), where K is the product of the FSQ levels."""

    def __init__(self, width: int, levels: tuple[int, ...], codebooks: int) -> None:
        super().__init__()
        self.quantiser = FSQ(levels)
        self.down = nn.ModuleList(nn.Linear(width, len(levels)) for _ in range(codebooks))
        self.up = nn.ModuleList(nn.Linear(len(levels), width) for _ in range(codebooks))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., D]` to (quantised `[..., D]`, codes `[..., Q]`, int64), in float32."""
        with torch.autocast(hidden.device.type, enabled=False):  # rounding a bf16 value would choose other codes
            residual, codes = hidden.float(), []
            quantised = torch.zeros_like(residual)
            for down, up in zip(self.down, self.up, strict=True):
                digits = self.quantiser(down(nn.functional.layer_norm(residual, residual.shape[-1:])))
                step = up(digits)
                residual, quantised = residual - step, quantised + step
                codes.append(self.quantiser.to_indices(digits))
        return quantised, torch.stack(codes, -1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes `[..., Q]` to the quantised `[..., D]` that they represent."""
        levels = zip(self.up, codes.unbind(-1), strict=True)
        return torch.stack([up(self.quantiser.to_codes(code)) for up, code in levels]).sum(0)
