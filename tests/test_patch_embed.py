"""Patch embedding against Conv3d and views of windows: dtypes, layouts, odd sizes, causal time, gradients, errors.

The kernels are called through torch.ops, so that the sources for a GPU run here too (conftest.py: kernels); the
functions of megamm.ops, which add the product, gradients and checks, are tested on the available devices.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import GPU
from op_checks import assert_same_bits_for_any_threads
from torch.autograd.graph import saved_tensors_hooks

from megamm import ops

DTYPES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
"""Largest error relative to the largest value: the rounding of the dtype."""

CASES = [
    ((2, 3, 4, 32, 48), (2, 16, 16)),  # rows and colour images in vectors
    ((1, 1, 2, 8, 16), (1, 4, 8)),
    ((2, 3, 2, 28, 28), (1, 14, 14)),  # two columns at a time
    ((1, 5, 3, 6, 9), (3, 2, 3)),  # one column at a time
    ((2, 4, 5, 7, 22), (2, 4, 8)),  # padded at every end
    ((1, 3, 1, 17, 15), (4, 16, 16)),  # one patch, larger than the video
    ((1, 9, 4, 4, 4), (1, 2, 2)),  # more channels than a thread holds at once
    ((0, 3, 2, 8, 8), (1, 4, 4)),
    ((2, 0, 2, 8, 8), (1, 4, 4)),
    ((2, 3, 0, 8, 0), (2, 4, 4)),
]
HOW = [(False, False, False), (True, False, False), (False, True, True), (True, True, True), (False, True, False)]
"""channels_last, causal, replicated."""


def make(shape, dtype, generator):
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def normalised(video, scale, shift):
    scale, shift = (torch.tensor(each, dtype=torch.float64).view(-1, 1, 1, 1) for each in (scale, shift))
    return video.double() * scale + shift


def windows(video, patch, causal, replicated):
    """Return patches of a float64 `[B, C, T, Y, X]` by views of windows, `[B, T', Y', X', K]`."""
    if causal and video.shape[2]:
        first = video[:, :, :1].expand(-1, -1, patch[0] - 1, -1, -1)
        video = torch.cat([first if replicated else first * 0, video], 2)
    ends = [(0, -size % part) for size, part in zip(video.shape[2:], patch, strict=True)]
    video = F.pad(video, [n for end in reversed(ends) for n in end])
    if 0 in video.shape:
        grid = [size // part for size, part in zip(video.shape[2:], patch, strict=True)]
        return video.new_empty(video.shape[0], *grid, video.shape[1] * math.prod(patch))
    for axis, part in enumerate(patch, 2):
        video = video.unfold(axis, part, part)
    return video.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)


def laid_out(video, channels_last):
    return video.movedim(1, -1).contiguous() if channels_last else video


def close(actual, expected, dtype):
    assert actual.shape == expected.shape
    if expected.numel():
        error = (actual.double().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error <= DTYPES[dtype], f"{error:.1e}"


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_patches_and_back(kernels, case, how):
    """Every pair of dtypes; the backward pass is the transposed linear map, with autograd of the views as reference."""
    shape, patch = case
    channels_last, causal, replicated = how
    generator = torch.Generator().manual_seed(sum(shape))
    for dtype in DTYPES:
        for video_dtype in dict.fromkeys((torch.uint8, torch.float32, dtype)):
            scale, shift = ([0.5], [-0.25]) if dtype == torch.float16 else ([0.3, 0.7] * 5, [0.1, -0.2] * 5)
            scale, shift = scale[: shape[1] or 1], shift[: shape[1] or 1]
            video = make(shape, video_dtype, generator)
            pixels = normalised(video, scale, shift).requires_grad_()
            expected = windows(pixels, patch, causal, replicated)
            options = (channels_last, causal, replicated)
            given = laid_out(video, channels_last).to(kernels.device)
            actual = kernels.ops.patchify_3d(given, patch, scale, shift, *options, dtype)
            assert actual.dtype == dtype
            close(actual, expected.detach(), dtype)
            if video_dtype == torch.uint8:
                continue
            dy = torch.randn(expected.shape, generator=generator).to(dtype)
            gradient = torch.autograd.grad(expected, pixels, dy.double())[0] if expected.numel() else pixels.detach()
            gradient = laid_out(normalised(gradient, scale, [0.0]), channels_last)
            back = kernels.ops.unpatchify_3d(dy.to(kernels.device), patch, shape[2:], scale, *options, video_dtype)
            assert back.dtype == video_dtype
            close(back, gradient, max(dtype, video_dtype, key=DTYPES.get))


def strided(name, video):
    """Return the values of `[2, 3, 4, 32, 32]` in another layout."""
    if name == "part of a longer video":
        return torch.cat([video, video], 2)[:, :, 2:6]
    if name == "unaligned":
        return torch.cat([video[..., :1], video], -1)[..., 1:]
    if name == "channels last":
        return video.movedim(1, -1).contiguous().movedim(-1, 1)
    if name == "transposed":
        return video.transpose(3, 4).contiguous().transpose(3, 4)
    assert name == "expanded"
    return video[:1, :1].expand(2, 3, 4, 32, 32)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("name", ["part of a longer video", "unaligned", "channels last", "transposed", "expanded"])
def test_strides_change_nothing(kernels, name, dtype):
    video = strided(name, make((2, 3, 4, 32, 32), dtype, torch.Generator().manual_seed(0)).to(kernels.device))
    options = ((2, 16, 16), [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], False, True, True, torch.bfloat16)
    patches = kernels.ops.patchify_3d(video, *options)
    assert torch.equal(patches, kernels.ops.patchify_3d(video.contiguous(), *options))
    wide = torch.cat([patches, patches], -1)[..., : patches.shape[-1]]
    unaligned = torch.cat([patches[..., :1], patches], -1)[..., 1:]
    scattered = patches.transpose(1, 2).contiguous().transpose(1, 2)
    options = ((2, 16, 16), (4, 32, 32), [0.1, 0.2, 0.3], False, True, True, torch.float32)
    expected = kernels.ops.unpatchify_3d(patches, *options)
    for each in (wide, unaligned, scattered):
        assert torch.equal(kernels.ops.unpatchify_3d(each, *options), expected)


def test_offsets_beyond_31_bits(kernels):
    """Two images, the second 2^31 bytes after the first; the memory between is never touched."""
    memory = torch.empty(2**31 + 64, dtype=torch.uint8, device=kernels.device)
    video = memory.as_strided((2, 1, 1, 4, 4), (2**31 + 32, 16, 16, 4, 1))
    values = torch.arange(32, dtype=torch.uint8).view(2, 1, 1, 4, 4)
    video.copy_(values)
    patches = kernels.ops.patchify_3d(video, (1, 4, 4), [1.0], [0.0], False, False, False, torch.float32)
    assert torch.equal(patches.flatten().cpu(), values.flatten().float())


@pytest.mark.parametrize("ops_device", [GPU], indirect=True)
def test_more_units_of_work_than_31_bits(ops_device):
    """One image 2^31 times, one column per thread: the index is computed in 64 bits."""
    image = torch.tensor([[7, 9, 11]], dtype=torch.uint8, device=ops_device)
    video = image.view(1, 1, 1, 1, 3).expand(2**31 // 3 + 5, 1, 1, 1, 3)
    patches = torch.ops.megamm.patchify_3d(video, (1, 1, 3), [1.0], [0.0], False, False, False, torch.float16)
    assert torch.equal(patches[[0, 12345, -1]].view(3, 3), image.half().expand(3, 3))


def test_bitwise_the_same_again_and_for_any_number_of_threads(kernels):
    video = torch.randint(0, 256, (3, 3, 5, 64, 48)).to(torch.uint8).to(kernels.device)

    def run():
        patches = kernels.ops.patchify_3d(video, (2, 8, 8), [0.3], [0.1], False, True, True, torch.float32)
        back = kernels.ops.unpatchify_3d(patches, (2, 8, 8), (5, 64, 48), [0.7], False, True, True, torch.float32)
        return (patches, back)

    assert_same_bits_for_any_threads(run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_normalisation_values_pass_unchanged(kernels, dtype):
    video = make((2, 3, 2, 16, 16), dtype, torch.Generator().manual_seed(1))
    video[0, 0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    options = (False, False, False, dtype)
    patches = kernels.ops.patchify_3d(video.to(kernels.device), (1, 8, 8), [1.0], [-0.0], *options)
    back = kernels.ops.unpatchify_3d(patches, (1, 8, 8), (2, 16, 16), [1.0], *options).cpu()
    numbers = ~video.isnan()
    assert torch.equal(back.isnan(), ~numbers) and torch.equal(back[numbers], video[numbers])
    assert torch.equal(back[numbers].signbit(), video[numbers].signbit())


@pytest.mark.parametrize("size", [(4, 8, 12), (2, 4, 20)], ids=str)
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_embedding_and_gradients_equal_a_convolution(ops_device, size, layout, causal, dtype):
    """Compare with a Conv3d in float64 on the normalised video, with its weight as it is stored."""
    torch.manual_seed(0)
    patch, mean, std = (2, 4, 4), [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    conv = torch.nn.Conv3d(3, 6, patch, stride=patch, dtype=dtype)
    frames, *sides = size
    video = torch.randn(2, 3, frames + causal, *sides)
    leaves = [video.to(dtype), conv.weight.detach(), conv.bias.detach()]
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    pixels = normalised(exact[0], [1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)])
    if causal:
        pixels = torch.cat([pixels[:, :, :1], pixels], 2)
    expected = F.conv3d(pixels, exact[1], exact[2], stride=patch).movedim(1, -1)
    leaves[0] = laid_out(leaves[0], layout == "channels_last")
    leaves = [leaf.to(ops_device).requires_grad_() for leaf in leaves]
    options = dict(patch=patch, mean=mean, std=std, layout=layout, causal=causal)
    actual = ops.CSRC.patch_embed_3d(*leaves, **options)
    assert actual.dtype == dtype
    close(actual.detach(), expected.detach(), dtype)
    dy = torch.randn(expected.shape).to(dtype)
    gradients = torch.autograd.grad(actual, leaves, dy.to(ops_device))
    dvideo, *others = torch.autograd.grad(expected, exact, dy.double())
    for a, b in zip(gradients, [laid_out(dvideo, layout == "channels_last"), *others], strict=True):
        assert a.dtype == dtype
        close(a, b, dtype)


def test_bytes_are_the_same_video_as_floats(ops_device):
    video = torch.randint(0, 256, (2, 3, 2, 8, 8)).to(torch.uint8).to(ops_device)
    weight = torch.randn(5, 3, 1, 4, 4).to(ops_device)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    for normalisation in ({}, {"mean": mean}, {"std": std}, {"mean": mean, "std": std}):
        options = dict(patch=(1, 4, 4), **normalisation)
        as_bytes = ops.CSRC.patch_embed_3d(video, weight, **options)
        as_floats = ops.CSRC.patch_embed_3d(video.float() / 255, weight.flatten(1), **options)
        torch.testing.assert_close(as_bytes, as_floats, rtol=1e-5, atol=1e-5)


def test_causal_patches_know_no_later_frame(ops_device):
    """An image is a video of one frame; each further patch has t frames and adds one embedding."""
    weight = torch.randn(5, 3, 4, 2, 2).to(ops_device)
    video = torch.randn(1, 3, 13, 4, 4).to(ops_device)

    def embed(frames):
        return ops.CSRC.patch_embed_3d(video[:, :, :frames], weight, patch=(4, 2, 2), causal=True)

    whole = embed(13)
    assert whole.shape == (1, 4, 2, 2, 5)
    for frames in (1, 5, 9):
        assert torch.equal(embed(frames), whole[:, : 1 + (frames - 1) // 4])
    still = F.conv2d(video[:, :, 0], weight.sum(2), stride=2).permute(0, 2, 3, 1)
    torch.testing.assert_close(whole[:, 0], still, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("patch", [(1, 16, 16), (2, 4, 3), (3, 5, 8)], ids=str)
def test_unpatchify_gives_the_video_back(ops_device, patch, causal, layout):
    """The kernel pads sizes that are not multiples of the patch at the end."""
    is_last = layout == "channels_last"
    video = laid_out(torch.randn(2, 2, 5, 33, 18).to(ops_device), is_last)
    how = dict(patch=patch, layout=layout, causal=causal)
    patches = torch.ops.megamm.patchify_3d(video, list(patch), [1.0], [-0.0], is_last, causal, True, dtype=video.dtype)
    for each in (ops.CSRC, ops.TORCH):
        assert torch.equal(each.unpatchify_3d(patches, channels=2, size=(5, 33, 18), **how), video)


def test_gradcheck(ops_device):
    kind = dict(dtype=torch.float64, device=ops_device, requires_grad=True)
    weight, bias = torch.randn(3, 2, 2, 2, 3, **kind), torch.randn(3, **kind)
    for layout, causal in (("channels_first", True), ("channels_last", False)):
        video = torch.randn(1, 2, 3, 4, 6, **kind)
        if layout == "channels_last":
            video = torch.randn(1, 2, 4, 6, 2, **kind)
        how = dict(patch=(2, 2, 3), layout=layout, causal=causal)
        options = dict(mean=[0.1, 0.2], std=[0.5, 2.0], **how)
        assert torch.autograd.gradcheck(lambda *a, o=options: ops.CSRC.patch_embed_3d(*a, **o), (video, weight, bias))
        patches = torch.randn(2, 2, 2, 2, 24, **kind)
        back = lambda x, h=how: ops.CSRC.unpatchify_3d(x, channels=2, size=(3, 3, 4), **h)  # noqa: E731
        assert torch.autograd.gradcheck(back, patches)
        assert torch.autograd.gradgradcheck(back, patches)
    # Without a bias, and the video alone.
    assert torch.autograd.gradcheck(lambda v: ops.CSRC.patch_embed_3d(v, weight, **options), video)


def test_opcheck(ops_device):
    for causal, replicated in ((False, False), (True, True)):
        video = torch.randn(2, 3, 3, 9, 16, device=ops_device, requires_grad=True)
        how = (False, causal, replicated, torch.float32)
        arguments = (video, [2, 4, 8], [0.1, 0.2, 0.3], [0.0, 1.0, 2.0], *how)
        torch.library.opcheck(torch.ops.megamm.patchify_3d.default, arguments)
        patches = torch.randn(2, 2, 3, 2, 192, device=ops_device, requires_grad=True)
        arguments = (patches, [2, 4, 8], [3, 9, 16], [0.1, 0.2, 0.3], *how)
        torch.library.opcheck(torch.ops.megamm.unpatchify_3d.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_graph_is_whole_and_equal(ops_device, dynamic):
    weight = torch.randn(192, 3, 2, 4, 8, device=ops_device, requires_grad=True)
    bias = torch.randn(192, device=ops_device, requires_grad=True)

    def function(video, weight, bias):
        patches = ops.CSRC.patch_embed_3d(video, weight, bias, patch=(2, 4, 8), std=[0.1, 0.2, 0.3])
        size = (video.shape[2], video.shape[3], video.shape[4])
        return ops.CSRC.unpatchify_3d(patches, patch=(2, 4, 8), channels=3, size=size).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 3, 2, 8, 16), (3, 3, 4, 8, 24)):
        leaves = (torch.randn(shape, device=ops_device, requires_grad=True), weight, bias)
        expected = torch.autograd.grad(function(*leaves), leaves)
        for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            assert torch.equal(a, b)


def test_backward_keeps_the_video_not_the_operand(ops_device):
    video = torch.zeros(2, 3, 2, 32, 32, dtype=torch.uint8, device=ops_device)
    weight = torch.randn(4, 3, 2, 16, 16, device=ops_device, requires_grad=True)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t.nbytes), lambda _: None):
        ops.CSRC.patch_embed_3d(video, weight, patch=(2, 16, 16))
    assert sum(kept) == video.nbytes + weight.nbytes


def test_autocast_leaves_the_dtype_to_the_weight(ops_device):
    video = torch.randn(1, 3, 1, 8, 8, device=ops_device, requires_grad=True)
    weight = torch.randn(4, 3, 1, 4, 4, device=ops_device, requires_grad=True)
    with torch.autocast(ops_device.type, dtype=torch.bfloat16):
        result = ops.CSRC.patch_embed_3d(video, weight, patch=(1, 4, 4))
        result.sum().backward()
    assert result.dtype == video.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_the_plain_torch_functions_agree(ops_device, layout, causal):
    for video_dtype, dtype in ((torch.uint8, torch.float32), (torch.float32, torch.bfloat16)):
        video = make((2, 3, 4 + causal, 8, 12), video_dtype, torch.Generator().manual_seed(2))
        video = laid_out(video, layout == "channels_last").to(ops_device)
        weight, bias = torch.randn(4, 3, 2, 4, 4).to(ops_device, dtype), torch.randn(4).to(ops_device, dtype)
        options = dict(patch=(2, 4, 4), mean=[0.1, 0.2, 0.3], layout=layout, causal=causal)
        ours, plain = (each.patch_embed_3d(video, weight, bias, **options) for each in (ops.CSRC, ops.TORCH))
        torch.testing.assert_close(ours, plain, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("which", [ops.CSRC, ops.TORCH], ids=lambda each: each.name)
def test_messages_name_both_sides(ops_device, which):
    video, weight = torch.randn(2, 3, 4, 8, 8, device=ops_device), torch.randn(5, 3, 2, 4, 4, device=ops_device)
    bias = torch.randn(5, device=ops_device)

    def refused(*tensors, patch=(2, 4, 4), **options):
        with pytest.raises(ValueError) as error:
            which.patch_embed_3d(*tensors, patch=patch, **options)
        return str(error.value).removeprefix("patch_embed_3d: ")

    sizes = "(T, Y, X) is {}, patch is (2, 4, 4); it needs {} of it"
    assert refused(video[:, :, :3], weight) == sizes.format("(3, 8, 8)", "T, Y and X multiples")
    assert refused(video[..., :7], weight) == sizes.format("(4, 8, 7)", "T, Y and X multiples")
    causal = sizes.format("(4, 8, 8)", "T = 1 + a multiple, Y and X multiples")
    assert refused(video, weight, causal=True) == causal
    assert refused(video[:, 0], weight) == (
        "video is [2, 4, 8, 8], channels_first is [B, C, T, Y, X] (an image has T = 1)"
    )
    form = "channels and patch make it [D, 3, 2, 4, 4] or [D, 96]"
    assert refused(video, weight[:, :2]) == f"weight is [5, 2, 2, 4, 4]; {form}"
    assert refused(video, weight, bias[:4]) == "bias [4] does not match weight [5, 3, 2, 4, 4]"
    assert refused(video, weight, bias.half()) == "bias is float16, weight is float32; they must be the same"
    same = "they must be the same"
    assert refused(video, weight.to("meta")) == f"video is on {ops_device}, weight is on meta; {same}"
    assert refused(video.half(), weight) == "video is float16, weight is float32; video: uint8, float32 or the same"
    assert refused(video, weight, mean=[0.5]) == (
        "mean has 1 numbers, std 3, the video 3 channels; they must be the same, at most 128"
    )
    assert refused(video, weight, std=[1, 0, 1]) == "std is [1, 0, 1]; it must be positive"
    assert "three positive numbers" in refused(video, weight, patch=(2, 4, 0))
    assert refused(video, weight, layout="last") == "layout is 'last'; it must be 'channels_first' or 'channels_last'"
    with pytest.raises(ValueError) as error:
        which.unpatchify_3d(torch.randn(2, 2, 2, 2, 96), patch=(2, 4, 4), channels=3, size=(4, 8, 9))
    assert str(error.value) == (
        "unpatchify_3d: patches is [2, 2, 2, 2, 96]; size (4, 8, 9), patch (2, 4, 4) and 3 channels "
        "make it ['B', 2, 2, 3, 96]"
    )


def test_unchecked_calls_are_refused_too(kernels):
    """The kernels do not read out of bounds even when called below megamm.ops."""
    video, patches = torch.randn(1, 3, 2, 4, 4).to(kernels.device), torch.randn(1, 1, 1, 1, 96).to(kernels.device)
    how = (False, False, False)
    cut, join = kernels.ops.patchify_3d, kernels.ops.unpatchify_3d
    for call, message in (
        (lambda: cut(video[0], [2, 4, 4], [1.0], [0.0], *how, torch.float32), "five axes"),
        (lambda: cut(video, [2, 4], [1.0], [0.0], *how, torch.float32), "three positive numbers"),
        (lambda: cut(video, [2, 0, 4], [1.0], [0.0], *how, torch.float32), "three positive numbers"),
        (lambda: cut(video, [2, 4, 4], [1.0] * 2, [0.0] * 2, *how, torch.float32), "one number for all channels"),
        (lambda: cut(video, [2, 4, 4], [1.0], [0.0] * 3, *how, torch.float32), "one number for all channels"),
        (lambda: cut(video.int(), [2, 4, 4], [1.0], [0.0], *how, torch.float32), "float32 or uint8"),
        (lambda: cut(video, [2, 4, 4], [1.0], [0.0], *how, torch.int32), "takes float64, float32"),
        (lambda: join(patches, [2, 4, 4], [2, 4, 5], [1.0], *how, torch.float32), "does not fit size"),
        (lambda: join(patches, [2, 4, 4], [2, 4], [1.0], *how, torch.float32), "three numbers of 0 or more"),
        (lambda: join(patches, [5, 4, 4], [2, 4, 4], [1.0], *how, torch.float32), "must be \\[B"),
        (lambda: join(patches, [2, 4, 4], [2, 4, 4], [1.0], *how, torch.uint8), "that of the patches, float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
