"""Rotary position embedding at explicit positions, with one axis or three.

Channel pair (i, i + D/2) of a head is rotated by the angle position * base^(-2i / D) (Su et al. 2021, "RoFormer").
With three axes every pair follows one of (t, h, w), assigned in turn, so that each axis gets high and low
frequencies; the slowest pairs follow t (Qwen3-VL, Bai et al. 2025: interleaved M-RoPE; M-RoPE itself: Wang et al.
2024, Qwen2-VL). Where t = h = w, as in text, it equals the one-axis embedding.

A longer context: "linear" divides all angles (Chen et al. 2023, position interpolation); "llama3" divides those of
pairs with fewer than low_freq_factor turns within the original length, keeps those with more than high_freq_factor
turns, and interpolates linearly in between (Grattafiori et al. 2024, Llama 3.1); "yarn" interpolates over channel
pairs instead of turns, and multiplies the rotated queries and keys by `attention_factor` (Peng et al. 2023, YaRN).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megamm.common.errors import UserError
from megamm.config import RopeScalingConfig

_NOT_SCALED = RopeScalingConfig()


@dataclass(frozen=True)
class Rope:
    """The base of the angles, the number of position axes (1 or 3), and the scaling of slow angles."""

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
    if s.kind == "yarn":
        scaled = _yarn_ramp(head_dim, rope).to(device)
        return plain * (1 - scaled) + plain / s.factor * scaled
    # llama3: pairs that turn often within the original length stay, those that turn rarely are slowed by the factor.
    turns = s.original_length * plain / (2 * math.pi)
    kept = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return plain * (kept + (1 - kept) / s.factor)


def _yarn_ramp(head_dim: int, rope: Rope) -> torch.Tensor:
    """How far each channel pair is scaled, from 0 to 1, float32 `[D / 2]`."""
    s = rope.scaling

    def pair(turns: float) -> float:
        """The pair, not rounded, with that many turns within the original length."""
        return head_dim * math.log(s.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = pair(s.beta_fast), pair(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    # As in transformers, the upper limit is in channels, although pairs are counted.
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def attention_factor(scaling: RopeScalingConfig) -> float:
    """Factor on rotated queries and keys, so that scores grow by its square; 1 without YaRN."""
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor:
        return scaling.attention_factor
    growth = 0.1 * math.log(scaling.factor)
    return (scaling.mscale * growth + 1) / (scaling.mscale_all_dim * growth + 1)


def sections(head_dim: int) -> tuple[int, int, int]:
    """Number of a head's D / 2 channel pairs that follow t, h and w: Qwen3-VL's proportion, 24 : 20 : 20 of 64.

    Raises UserError if there are fewer than three pairs.
    """
    pairs = head_dim // 2
    if pairs < 3:
        raise UserError(f"model.head_dim = {head_dim} is too small for three axes", remedy="set at least 6")
    spatial = max(1, pairs * 20 // 64)
    return pairs - 2 * spatial, spatial, spatial


class RopeAngles(NamedTuple):
    """Arguments of the operator `rope` (megamm/ops) beside queries and keys; position is `[B, A, S]`."""

    position: torch.Tensor
    frequency: torch.Tensor
    """Radians per position of every channel pair for each axis, float32 `[A, D / 2]`: 0 for axes it does not follow."""
    factor: float


def angles_of(position_BAS: torch.Tensor, head_dim: int, rope: Rope) -> RopeAngles:
    """Return what rotates heads at these positions, int64 with A = rope.axes; pairs follow t h w t h w .. t t."""
    frequency = inverse_frequencies(head_dim, rope, position_BAS.device)
    factor = attention_factor(rope.scaling)
    if rope.axes == 1:
        return RopeAngles(position_BAS, frequency.unsqueeze(0), factor)
    pair = torch.arange(head_dim // 2, device=position_BAS.device)
    axis = torch.where(pair < 3 * sections(head_dim)[1], pair % 3, 0)
    follows = axis == torch.arange(3, device=axis.device).unsqueeze(1)
    return RopeAngles(position_BAS, torch.where(follows, frequency, 0), factor)
