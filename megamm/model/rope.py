"""Rotary position embedding at explicit positions (Su et al. 2021, "RoFormer").

Channel pair (i, i + D/2) of a head turns by the angle position * base^(-2i / D).
"""

import torch


def inverse_frequencies(head_dim: int, base: float, device: torch.device) -> torch.Tensor:
    """Radians per position of every channel pair, float32 `[D / 2]`."""
    return base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)


def cosines_and_sines(
    position_BS: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the angles, computed in float32 and cast, `[S, B, 1, D]` each; sines are negative for the first of a pair."""
    angles = position_BS.t()[:, :, None, None].float() * frequencies
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cosines, cosines), dim=-1), torch.cat((-sines, sines), dim=-1)


def rotate(x_SBND: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn the heads of queries or keys: `[S, B, N, D]` to the same. Rolling by D / 2 swaps the two of a pair."""
    return torch.addcmul(x_SBND * cosines, x_SBND.roll(x_SBND.shape[-1] // 2, dims=-1), sines)
