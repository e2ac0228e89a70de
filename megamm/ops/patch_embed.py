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

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megamm.ops.patches import Size, check_patches, check_video, grid, normalisation

Layout = Literal["channels_first", "channels_last"]


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
    odd: Literal["refuse", "pad"] = "refuse",
) -> Tensor:
    """Video `[B, C, T, Y, X]`, or `[B, T, Y, X, C]` for channels_last, to embeddings `[B, T', Y', X', D]`.

    weight `[D, C, t, p, q]`, as in a Conv3d, or flattened `[D, K]`; bias `[D]`; float64, float32, bfloat16 or float16,
    which is the dtype of the result. video: uint8, float32 or the weight's dtype, with any strides.
    uint8 becomes (x / 255 - mean) / std, other dtypes (x - mean) / std, by channel; defaults are mean 0 and std 1.
    T, Y and X must be multiples of the patch (causal: T = 1 + t * n); with odd="pad" the normalised video is padded
    with zeros. Raises ValueError, which names both sides, if shapes, dtypes or devices do not match.
    """
    channels = check_video(video, weight, bias, patch, layout, causal, odd)
    scale, shift = normalisation(video.dtype, channels, mean, std)
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
    check_patches(patches, patch, channels, size, layout, causal)
    op = torch.ops.megamm.unpatchify_3d.default
    return op(patches, list(patch), list(size), [1.0], layout == "channels_last", causal, False, patches.dtype)


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
    cells = grid(_size(video, channels_last), (patch[0], patch[1], patch[2]), causal)
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
