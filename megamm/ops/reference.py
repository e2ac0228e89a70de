"""The ops in plain torch: the reference for the compiled ops, and the implementation where those are not built.

Signatures, shapes and semantics are those of the functions with the same names in megamm/ops.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megamm.ops.patches import Size, check_patches, check_video, normalisation


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, zero_centered: bool = False) -> Tensor:
    return F.rms_norm(x, weight.shape, weight + 1 if zero_centered else weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps, zero_centered), total


def swiglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    limit: float | None = None,
) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, -1)
    if bias is not None:
        bias_of_gate, bias_of_up = bias.chunk(2)
        gate, up = gate + bias_of_gate, up + bias_of_up
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = F.silu(gate) * up
    return y if row_weight is None else (y * row_weight.unsqueeze(-1)).to(y.dtype)


def patch_embed_3d(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch: Size,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layout: str = "channels_first",
    causal: bool = False,
    odd: str = "refuse",
) -> Tensor:
    channels = check_video(video, weight, bias, patch, layout, causal, odd)
    numbers = normalisation(video.dtype, channels, mean, std)
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    scale, shift = (torch.tensor(each, dtype=compute, device=video.device).view(-1, 1, 1, 1) for each in numbers)
    pixels = video.movedim(-1, 1) if layout == "channels_last" else video
    pixels = (pixels.to(compute) * scale + shift).to(weight.dtype)
    if causal:
        pixels = torch.cat([pixels[:, :, :1]] * (patch[0] - 1) + [pixels], 2)
    t, y, x = (-size % length for size, length in zip(pixels.shape[2:], patch, strict=True))
    cut = F.pad(pixels, (0, x, 0, y, 0, t))
    for axis, length in ((2, patch[0]), (4, patch[1]), (6, patch[2])):
        cut = cut.unflatten(axis, (cut.shape[axis] // length, length))
    return F.linear(cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4), weight.flatten(1), bias)


def unpatchify_3d(
    patches: Tensor,
    *,
    patch: Size,
    channels: int,
    size: Size,
    layout: str = "channels_first",
    causal: bool = False,
) -> Tensor:
    check_patches(patches, patch, channels, size, layout, causal)
    cut = patches.unflatten(4, (channels, *patch)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    video = cut.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    first = patch[0] - 1 if causal else 0
    video = video[:, :, first : first + size[0], : size[1], : size[2]]
    return video.movedim(1, -1) if layout == "channels_last" else video
