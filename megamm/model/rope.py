"""Rotary position embedding at explicit positions, of one axis or three.

Channel pair (i, i + D/2) of a head turns by the angle position * base^(-2i / D) (Su et al. 2021, "RoFormer").
With three axes every pair follows one of (t, h, w), dealt in turn, so that each axis gets high and low
frequencies; the slowest pairs are left to t (Qwen3-VL, Bai et al. 2025: the interleaved M-RoPE; Wang et al. 2024,
Qwen2-VL, for M-RoPE itself). Where t = h = w, as in text, it is the one-axis embedding.

A longer context: "linear" divides all angles (Chen et al. 2023, position interpolation); "llama3" divides those of the
pairs that turn less than low_freq_factor times in the original length, keeps those of more than high_freq_factor
turns, and goes linearly between in the number of turns (Grattafiori et al. 2024, Llama 3.1).
"""

import math
from dataclasses import dataclass

import torch

from megamm.config import RopeScalingConfig
from megamm.errors import UserError

_NOT_SCALED = RopeScalingConfig()


@dataclass(frozen=True)
class Rope:
    """The base of the angles, whether positions have 1 axis or 3, and how slow angles are stretched."""

    base: float
    axes: int = 1
    scaling: RopeScalingConfig = _NOT_SCALED


def inverse_frequencies(head_dim: int, rope: Rope, device: torch.device) -> torch.Tensor:
    """Radians per position of every channel pair, float32 `[D / 2]`."""
    plain = rope.base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    s = rope.scaling
    if s.kind == "none":
        return plain
    if s.kind == "linear":
        return plain / s.factor
    turns = s.original_length * plain / (2 * math.pi)
    kept = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return plain * (kept + (1 - kept) / s.factor)


def sections(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's D / 2 channel pairs follow t, h and w: in Qwen3-VL's proportion, 24 : 20 : 20 of 64.

    UserError if there are not three pairs.
    """
    pairs = head_dim // 2
    if pairs < 3:
        raise UserError(f"model.head_dim = {head_dim} is too small for three axes", remedy="set at least 6")
    spatial = max(1, pairs * 20 // 64)
    return pairs - 2 * spatial, spatial, spatial


def axis_of_pairs(head_dim: int, axes: int, device: torch.device) -> torch.Tensor:
    """Which axis (0 t, 1 h, 2 w) each channel pair follows, int64 `[D / 2]`: t h w t h w .. t t. One axis: all 0."""
    pair = torch.arange(head_dim // 2, device=device)
    if axes == 1:
        return torch.zeros_like(pair)
    return torch.where(pair < 3 * sections(head_dim)[1], pair % 3, 0)


def cosines_and_sines(
    position_BAS: torch.Tensor, head_dim: int, rope: Rope, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the angles, computed in float32 and cast, `[S, B, 1, D]` each; sines are negative for the first of a pair.

    position `[B, A, S]` has A = rope.axes axes.
    """
    device = position_BAS.device
    position = position_BAS[:, axis_of_pairs(head_dim, rope.axes, device)].permute(2, 0, 1).unsqueeze(2)
    angles = position.float() * inverse_frequencies(head_dim, rope, device)
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cosines, cosines), dim=-1), torch.cat((-sines, sines), dim=-1)


def rotate(x_SBND: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn the heads of queries or keys: `[S, B, N, D]` to the same. Rolling by D / 2 swaps the two of a pair."""
    return torch.addcmul(x_SBND * cosines, x_SBND.roll(x_SBND.shape[-1] // 2, dims=-1), sines)
