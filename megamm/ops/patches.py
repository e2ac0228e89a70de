"""Checks and sizes of the patch operators, for the compiled and the plain functions; no device synchronisation."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megamm.ops.check import check_same_device, check_same_kind, dtype_name

Size = tuple[int, int, int]
"""Frames, rows, columns."""

MAX_CHANNELS = 128
"""Maximum channels for mean and std: GPU kernels take the numbers as arguments."""


def check_video(
    video: Tensor, weight: Tensor, bias: Tensor | None, patch: Size, layout: str, causal: bool, odd: str
) -> int:
    """The number of channels. Raises ValueError if the arguments of patch_embed_3d do not match each other."""
    _check_patch("patch_embed_3d", patch, layout)
    if odd not in ("refuse", "pad"):
        raise ValueError(f"patch_embed_3d: odd is {odd!r}; it must be 'refuse' or 'pad'")
    if video.dim() != 5:
        axes = "[B, C, T, Y, X]" if layout == "channels_first" else "[B, T, Y, X, C]"
        raise ValueError(f"patch_embed_3d: video is {list(video.shape)}, {layout} is {axes} (an image has T = 1)")
    channels, time = (video.shape[1], 2) if layout == "channels_first" else (video.shape[4], 1)
    frames, rows, columns = video.shape[time : time + 3]
    after_first = frames - 1 if causal and frames else frames
    if odd == "refuse" and (after_first % patch[0] or rows % patch[1] or columns % patch[2]):
        rule = "T = 1 + a multiple, Y and X multiples" if causal else "T, Y and X multiples"
        sizes = f"(T, Y, X) is {(frames, rows, columns)}, patch is {tuple(patch)}"
        raise ValueError(f"patch_embed_3d: {sizes}; it needs {rule} of it, or odd='pad'")
    _check_weight(video, weight, bias, channels, patch)
    return channels


def _check_weight(video: Tensor, weight: Tensor, bias: Tensor | None, channels: int, patch: Size) -> None:
    expected = (channels, *patch)
    if tuple(weight.shape[1:]) not in (expected, (math.prod(expected),)):
        forms = f"[D, {', '.join(map(str, expected))}] or [D, {math.prod(expected)}]"
        raise ValueError(f"patch_embed_3d: weight is {list(weight.shape)}; channels and patch make it {forms}")
    if bias is not None:
        check_same_kind("patch_embed_3d", weight=weight, bias=bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"patch_embed_3d: bias {list(bias.shape)} does not match weight {list(weight.shape)}")
    check_same_device("patch_embed_3d", weight=weight, video=video)
    if video.dtype not in (torch.uint8, torch.float32, weight.dtype):
        names = f"video is {dtype_name(video)}, weight is {dtype_name(weight)}"
        raise ValueError(f"patch_embed_3d: {names}; video: uint8, float32 or the same")


def check_patches(patches: Tensor, patch: Size, channels: int, size: Size, layout: str, causal: bool) -> None:
    """Raise ValueError if the arguments of unpatchify_3d do not match each other."""
    _check_patch("unpatchify_3d", patch, layout)
    expected = (*grid(size, patch, causal), channels * math.prod(patch))
    if patches.dim() != 5 or tuple(patches.shape[1:]) != expected:
        given = f"size {tuple(size)}, patch {tuple(patch)} and {channels} channels"
        raise ValueError(f"unpatchify_3d: patches is {list(patches.shape)}; {given} make it {['B', *expected]}")


def grid(size: Size, patch: Size, causal: bool) -> Size:
    """Number of patches in time, rows and columns that cover a video of `size`."""
    frames = size[0] + patch[0] - 1 if causal and size[0] else size[0]
    return -(-frames // patch[0]), -(-size[1] // patch[1]), -(-size[2] // patch[2])


def normalisation(
    dtype: torch.dtype, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """(scale, shift), one number for all channels or one each: a pixel x becomes x * scale + shift."""
    unit = 1 / 255 if dtype == torch.uint8 else 1.0
    if mean is None and std is None:
        return [unit], [-0.0]  # the shift that preserves -0
    mean = [0.0] * channels if mean is None else mean
    std = [1.0] * channels if std is None else std
    if len(mean) != channels or len(std) != channels or channels > MAX_CHANNELS:
        numbers = f"mean has {len(mean)} numbers, std {len(std)}, the video {channels} channels"
        raise ValueError(f"patch_embed_3d: {numbers}; they must be the same, at most {MAX_CHANNELS}")
    if not all(s > 0 for s in std):
        raise ValueError(f"patch_embed_3d: std is {list(std)}; it must be positive")
    return [unit / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


def _check_patch(op: str, patch: Size, layout: str) -> None:
    if len(patch) != 3 or min(patch) < 1:
        raise ValueError(f"{op}: patch is {tuple(patch)}; it must be three positive numbers (frames, rows, columns)")
    if layout not in ("channels_first", "channels_last"):
        raise ValueError(f"{op}: layout is {layout!r}; it must be 'channels_first' or 'channels_last'")
