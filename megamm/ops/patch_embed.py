"""The embedding of video patches as one matrix product, and the inverse of cutting patches.

A video is cut into patches of t x p x q (frames, rows, columns). `megamm::patchify_3d` normalises, gathers and casts in
one pass and writes the matrix product's operand `[B, T', Y', X', K]`, K = C * t * p * q in the order of a Conv3d's
weight; the product with the weight `[D, K]` is torch's. The result equals a Conv3d with stride = kernel. Backward cuts
the patches again: it saves the video (one byte per pixel), not the operand (two or four).

Causal in time, the first patch holds only frame 0, repeated to its t frames, and T = 1 + t * n frames make 1 + n
patches in time, so that an image is a video of one frame. Source: the patcher of the Cosmos tokenizer (NVIDIA 2025,
"Cosmos World Foundation Model Platform for Physical AI"); 1 + t * n is also the count of MAGVIT-v2 (Yu et al. 2023),
whose convolutions pad with zeros instead.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megamm.ops.check import check_same_device, check_same_kind, dtype_name

Layout = Literal["channels_first", "channels_last"]
Size = tuple[int, int, int]
"""Frames, rows, columns."""

MAX_CHANNELS = 128
"""Maximum channels for mean and std: GPU kernels take the numbers as arguments."""


def patch_embed_3d(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch: Size,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layout: Layout = "channels_first",
    causal: bool = False,
) -> Tensor:
    """Video `[B, C, T, Y, X]`, or `[B, T, Y, X, C]` for channels_last, to embeddings `[B, T', Y', X', D]`.

    weight `[D, C, t, p, q]`, as in a Conv3d, or flattened `[D, K]`; bias `[D]`; float64, float32, bfloat16 or float16,
    which is the dtype of the result. video: uint8, float32 or the weight's dtype, with any strides.
    uint8 becomes (x / 255 - mean) / std, other dtypes (x - mean) / std, by channel; defaults are mean 0 and std 1.
    T, Y and X must be multiples of the patch (causal: T = 1 + t * n). Raises ValueError, which names both sides, if
    shapes, dtypes or devices do not match.
    """
    channels = _check_video(video, weight, bias, patch, layout, causal)
    scale, shift = _normalisation(video.dtype, channels, mean, std)
    return _PatchEmbed.apply(video, weight, bias, list(patch), scale, shift, layout == "channels_last", causal)


def unpatchify_3d(
    patches: Tensor,
    *,
    patch: Size,
    channels: int,
    size: Size,
    layout: Layout = "channels_first",
    causal: bool = False,
) -> Tensor:
    """Patches `[B, T', Y', X', K]` to the video of `size` (T, Y, X) that they were cut from, in `layout`.

    K = C * t * p * q in this order. Padding at the end or (causal) before frame 0 is removed. The dtype is kept and
    nothing is normalised. Patches with one stride are read in place. Raises ValueError if the grid or K does not match.
    """
    _check_patches(patches, patch, channels, size, layout, causal)
    op = torch.ops.megamm.unpatchify_3d.default
    return op(patches, list(patch), list(size), [1.0], layout == "channels_last", causal, False, patches.dtype)


def patch_embed_3d_torch(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch: Size,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layout: str = "channels_first",
    causal: bool = False,
) -> Tensor:
    """The same as `patch_embed_3d` in plain torch."""
    channels = _check_video(video, weight, bias, patch, layout, causal)
    numbers = _normalisation(video.dtype, channels, mean, std)
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    scale, shift = (torch.tensor(each, dtype=compute, device=video.device).view(-1, 1, 1, 1) for each in numbers)
    pixels = video.movedim(-1, 1) if layout == "channels_last" else video
    pixels = (pixels.to(compute) * scale + shift).to(weight.dtype)
    if causal:
        pixels = torch.cat([pixels[:, :, :1]] * (patch[0] - 1) + [pixels], 2)
    cut = pixels
    # Each cut adds an axis, so the next one to cut is two further: [B, C, T', t, Y', p, X', q].
    for axis, length in ((2, patch[0]), (4, patch[1]), (6, patch[2])):
        cut = cut.unflatten(axis, (cut.shape[axis] // length, length))
    return F.linear(cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4), weight.flatten(1), bias)


def unpatchify_3d_torch(
    patches: Tensor,
    *,
    patch: Size,
    channels: int,
    size: Size,
    layout: str = "channels_first",
    causal: bool = False,
) -> Tensor:
    """The same as `unpatchify_3d` in plain torch."""
    _check_patches(patches, patch, channels, size, layout, causal)
    # [B, T', Y', X', C, t, p, q] to [B, C, T', t, Y', p, X', q]; then each pair of axes is one again.
    cut = patches.unflatten(4, (channels, *patch)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    video = cut.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    first = patch[0] - 1 if causal else 0
    video = video[:, :, first : first + size[0], : size[1], : size[2]]
    return video.movedim(1, -1) if layout == "channels_last" else video


def _check_video(video: Tensor, weight: Tensor, bias: Tensor | None, patch: Size, layout: str, causal: bool) -> int:
    """The number of channels. Raises ValueError if the arguments of patch_embed_3d do not match each other."""
    _check_patch("patch_embed_3d", patch, layout)
    if video.dim() != 5:
        axes = "[B, C, T, Y, X]" if layout == "channels_first" else "[B, T, Y, X, C]"
        raise ValueError(f"patch_embed_3d: video is {list(video.shape)}, {layout} is {axes} (an image has T = 1)")
    channels, time = (video.shape[1], 2) if layout == "channels_first" else (video.shape[4], 1)
    frames, rows, columns = video.shape[time : time + 3]
    after_first = frames - 1 if causal and frames else frames
    if after_first % patch[0] or rows % patch[1] or columns % patch[2]:
        rule = "T = 1 + a multiple, Y and X multiples" if causal else "T, Y and X multiples"
        sizes = f"(T, Y, X) is {(frames, rows, columns)}, patch is {tuple(patch)}"
        raise ValueError(f"patch_embed_3d: {sizes}; it needs {rule} of it")
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


def _check_patches(patches: Tensor, patch: Size, channels: int, size: Size, layout: str, causal: bool) -> None:
    """Raise ValueError if the arguments of unpatchify_3d do not match each other."""
    _check_patch("unpatchify_3d", patch, layout)
    expected = (*_grid(size, patch, causal), channels * math.prod(patch))
    if patches.dim() != 5 or tuple(patches.shape[1:]) != expected:
        given = f"size {tuple(size)}, patch {tuple(patch)} and {channels} channels"
        raise ValueError(f"unpatchify_3d: patches is {list(patches.shape)}; {given} make it {['B', *expected]}")


def _grid(size: Size, patch: Size, causal: bool) -> Size:
    """Number of patches in time, rows and columns that cover a video of `size`."""
    frames = size[0] + patch[0] - 1 if causal and size[0] else size[0]
    return -(-frames // patch[0]), -(-size[1] // patch[1]), -(-size[2] // patch[2])


def _normalisation(
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


class _PatchEmbed(torch.autograd.Function):
    """patchify_3d and the product, without autocast, so that the result has the weight's dtype as documented."""

    @staticmethod
    def forward(video: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        with torch.autocast(video.device.type, enabled=False):
            return F.linear(_patchify(video, weight, options), weight.flatten(1), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        video, weight, _, *ctx.options = inputs
        ctx.save_for_backward(video, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        video, weight = ctx.saved_tensors
        dy = gradients[0].flatten(0, -2)
        dvideo = dweight = dbias = None
        # Each product is computed only if its gradient is needed: a video of bytes never needs one.
        if ctx.needs_input_grad[0]:
            patch, scale, _, channels_last, causal = ctx.options
            patches = (dy @ weight.flatten(1)).view(*gradients[0].shape[:-1], -1)
            size = list(_size(video, channels_last))
            op = torch.ops.megamm.unpatchify_3d.default
            dvideo = op(patches, patch, size, scale, channels_last, causal, True, video.dtype)
        if ctx.needs_input_grad[1]:
            dweight = (dy.t() @ _patchify(video, weight, ctx.options).flatten(0, -2)).view_as(weight)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dvideo, dweight, dbias, None, None, None, None, None


def _patchify(video: Tensor, weight: Tensor, options: Sequence[Any]) -> Tensor:
    return torch.ops.megamm.patchify_3d.default(video, *options, True, weight.dtype)


def _size(video: Tensor, channels_last: bool) -> Size:
    frames, rows, columns = video.shape[1:4] if channels_last else video.shape[2:]
    return frames, rows, columns


def _fake_patchify(
    video: Tensor,
    patch: list[int],
    scale: list[float],
    shift: list[float],
    channels_last: bool,
    causal: bool,
    replicated: bool,
    dtype: torch.dtype,
) -> Tensor:
    cells = _grid(_size(video, channels_last), (patch[0], patch[1], patch[2]), causal)
    width = video.shape[4 if channels_last else 1] * patch[0] * patch[1] * patch[2]
    return video.new_empty((video.shape[0], *cells, width), dtype=dtype)


def _fake_unpatchify(
    patches: Tensor,
    patch: list[int],
    size: list[int],
    scale: list[float],
    channels_last: bool,
    causal: bool,
    replicated: bool,
    dtype: torch.dtype,
) -> Tensor:
    batch, channels = patches.shape[0], patches.shape[4] // (patch[0] * patch[1] * patch[2])
    sizes = (batch, *size, channels) if channels_last else (batch, channels, *size)
    return patches.new_empty(sizes, dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    given, *ctx.options, _ = inputs
    ctx.shape, ctx.dtype = given.shape, given.dtype


def _patchify_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    patch, scale, _, channels_last, causal, replicated = ctx.options
    size = ctx.shape[1:4] if channels_last else ctx.shape[2:]
    op = torch.ops.megamm.unpatchify_3d.default
    return op(dy, patch, size, scale, channels_last, causal, replicated, ctx.dtype), *[None] * 7


def _unpatchify_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    patch, _, scale, *how = ctx.options
    op = torch.ops.megamm.patchify_3d.default
    return op(dy, patch, scale, [-0.0] * len(scale), *how, ctx.dtype), *[None] * 7


def register() -> None:
    """Register shapes and gradients of the ops in torch.ops.megamm; each is the other's gradient."""
    fake, gradient = torch.library.register_fake, torch.library.register_autograd
    fake("megamm::patchify_3d", _fake_patchify)
    fake("megamm::unpatchify_3d", _fake_unpatchify)
    gradient("megamm::patchify_3d", _patchify_gradient, setup_context=_setup)
    gradient("megamm::unpatchify_3d", _unpatchify_gradient, setup_context=_setup)
