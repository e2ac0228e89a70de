"""Residual FSQ: Q finite scalar quantisers in a row, each coding the residual of the ones before it.

Level q normalises the residual `[..., D]`, projects it to a few channels, quantises them (tokenizers/fsq.py) and
projects the codes back; this is subtracted before level q + 1, and the sum over the levels is the output. Without
normalisation later levels get ever smaller values and use few codes (Zhu 2025, "Robust Residual Finite Scalar
Quantization for Neural Compression", which also uses LayerNorm). With its own projections each level chooses the
directions in which it refines, not only the step. Sources: Zeghidour et al. 2021, "SoundStream", section III-C
(residual quantisation); Kumar et al. 2023, "High-Fidelity Audio Compression with Improved RVQGAN", section 3.2
(projections to few channels at each level).
"""

import torch
from torch import Tensor, nn

from megamm.tokenizers.fsq import FSQ


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
