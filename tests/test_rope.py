"""RoPE against rotations by complex numbers in float64: dtypes, axes, strides, far positions; tracing, errors.

The kernels are called through torch.ops, so that the sources for a GPU run here too (conftest.py: kernels); the
functions of megamm.ops, which add gradients and checks, are tested on the available devices.
"""

import pytest
import torch
from op_checks import assert_same_bits_for_any_threads

from megamm import ops
from megamm.model.rope import Rope, angles_of

DTYPES = {torch.float64: 1e-13, torch.float32: 5e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Largest error relative to the largest value: the rounding of the dtype."""

SHAPES = [(37, 2, 4, 2, 64), (5, 3, 8, 1, 128), (3, 1, 3, 3, 10), (2, 2, 1, 1, 6), (7, 1, 5, 2, 600), (1, 1, 40, 8, 16)]
SHAPES += [(0, 2, 4, 2, 8), (4, 0, 2, 1, 8), (4, 2, 0, 1, 8)]
"""S, B, heads of queries, of keys, channels: halves in vectors or not, more pairs than are held, empty ones."""


def close(actual, expected, dtype):
    assert actual.shape == expected.shape and actual.dtype == dtype
    if expected.numel():
        error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error <= DTYPES[dtype], f"{error:.1e}"


def operands(shape, dtype, device, axes=3, reach=300):
    """Return (query, key, position, frequency); positions are up to `reach`."""
    length, rows, heads, groups, head_dim = shape
    generator = torch.Generator().manual_seed(sum(shape) + axes)
    query, key = (torch.randn(length, rows, n, head_dim, generator=generator).to(dtype) for n in (heads, groups))
    position = torch.randint(0, reach, (rows, axes, length), generator=generator)
    _, frequency, _ = angles_of(position, head_dim, Rope(10000.0, axes))
    return [each.to(device) for each in (query, key, position, frequency)]


def reference(x, position, frequency, factor, inverse=False):
    """Rotate x in float64, pairs of channels as complex numbers; angles are float32."""
    follows, pairs = frequency.abs().argmax(0).tolist(), x.shape[-1] // 2
    angle = torch.stack([position[:, axis].float() * frequency[axis, i] for i, axis in enumerate(follows)], -1).double()
    turn = torch.polar(torch.full_like(angle, factor), -angle if inverse else angle).transpose(0, 1).unsqueeze(2)
    number = torch.complex(x[..., :pairs].double(), x[..., pairs:].double()) * turn
    return torch.cat((number.real, number.imag), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_their_inverse(kernels, shape, dtype):
    for axes, factor in ((1, 1.0), (3, 1.25)):
        query, key, position, frequency = operands(shape, dtype, kernels.device, axes)
        for inverse in (False, True):
            found = kernels.ops.rope(query, key, position, frequency, factor, inverse)
            for actual, x in zip(found, (query, key), strict=True):
                assert actual.is_contiguous()
                close(actual, reference(x, position, frequency, factor, inverse), dtype)


def test_positions_as_far_as_float32_counts(kernels):
    """Angles up to 2^24: in a row of millions of tokens the fastest pair still has its sine and cosine."""
    query, key, position, frequency = operands((512, 1, 1, 1, 6), torch.float32, kernels.device, reach=2**24)
    for actual, x in zip(kernels.ops.rope(query, key, position, frequency, 1.0, False), (query, key), strict=True):
        close(actual, reference(x, position, frequency, 1.0), torch.float32)


def test_every_quarter_turn_is_exact_to_a_unit_in_the_last_digit(kernels):
    """The cosine and sine of every angle up to 8 full turns, also near the zeros of both."""
    angle = torch.cat([torch.linspace(0, 16 * torch.pi, 4000), torch.arange(65) * (torch.pi / 2)]).float()
    ones, zeros = torch.ones_like(angle), torch.zeros_like(angle)
    query = torch.cat((ones, zeros)).view(1, 1, 1, -1).to(kernels.device)
    position = torch.ones(1, 1, 1, dtype=torch.int64).to(kernels.device)
    found = kernels.ops.rope(query, query, position, angle.unsqueeze(0).to(kernels.device), 1.0, False)[0].cpu()
    expected = torch.cat((angle.double().cos(), angle.double().sin())).view_as(found)
    assert (found.double() - expected).abs().max() < 1e-7


def views(query, key):
    """Return (name, query, key) of the same numbers: parts of a fused projection, other orders of the axes."""
    groups, head_dim = key.shape[2:]
    by_group = query.unflatten(2, (groups, -1)).flatten(3)
    fused = torch.cat((by_group, key, key), -1)
    parts = fused.split([by_group.shape[3], head_dim, head_dim], -1)
    yield "fused projection", parts[0].unflatten(3, (-1, head_dim)).flatten(2, 3), parts[1]
    yield "heads before tokens", *(x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for x in (query, key))
    yield "unaligned", *(torch.cat([x[..., :1], x], -1)[..., 1:] for x in (query, key))
    yield "channels apart", *(torch.stack([x, x], -1)[..., 0] for x in (query, key))


def test_strides_change_nothing(kernels):
    query, key, position, frequency = operands((9, 2, 6, 2, 32), torch.bfloat16, kernels.device)
    apart = position.transpose(0, 2).contiguous().transpose(0, 2)
    expected = kernels.ops.rope(query, key, position, frequency, 1.0, False)
    for name, *same in views(query, key):
        assert all(torch.equal(a, b) for a, b in zip(same, (query, key), strict=True)), name
        found = kernels.ops.rope(*same, apart, frequency, 1.0, False)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name


def test_bitwise_the_same_again_and_for_any_number_of_threads(kernels):
    operand = operands((700, 2, 4, 2, 32), torch.float32, kernels.device)
    assert_same_bits_for_any_threads(lambda: kernels.ops.rope(*operand, 1.0, False))


def test_gradcheck(ops_device):
    query, key, *angles = operands((3, 2, 4, 2, 6), torch.float64, ops_device)
    inputs = query.requires_grad_(), key.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: ops.CSRC.rope(q, k, *angles, 1.25), inputs)
    # The keys are not used: their gradient is zero.
    rotated = ops.CSRC.rope(*inputs, *angles)[0]
    assert not torch.autograd.grad(rotated.sum(), key)[0].any()


def test_opcheck(ops_device):
    query, key, *angles = operands((3, 2, 4, 2, 6), torch.float32, ops_device)
    inputs = (query.requires_grad_(), key.requires_grad_(), *angles, 1.25, False)
    torch.library.opcheck(torch.ops.megamm.rope.default, inputs)


def test_compiled_graph_is_whole_and_equal(ops_device):
    query, key, *angles = operands((5, 2, 4, 2, 8), torch.float32, ops_device)
    inputs = query.requires_grad_(), key.requires_grad_()

    def function(query, key):
        rotated_query, rotated_key = ops.CSRC.rope(query * 2, key, *angles)
        return (rotated_query.mean(2) * rotated_key.mean(2)).sum()

    expected = torch.autograd.grad(function(*inputs), inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("axes", [1, 3])
def test_the_plain_torch_functions_agree(ops_device, axes):
    query, key, *angles = operands((11, 2, 4, 2, 16), torch.float32, ops_device, axes)
    inputs = query.requires_grad_(), key.requires_grad_()
    results = []
    for each in (ops.CSRC, ops.TORCH):
        rotated = each.rope(*inputs, *angles, 1.25)
        results.append([*rotated, *torch.autograd.grad([x.square().sum() for x in rotated], inputs)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-5)


def test_messages_name_both_sides(ops_device):
    query, key, position, frequency = operands((4, 2, 3, 1, 8), torch.float32, ops_device)
    for arguments, message in (
        ((query, key.double(), position, frequency), "rope: key is float64, query is float32; they must be the same"),
        (
            (query, key[:3], position, frequency),
            "rope: query [4, 2, 3, 8] and key [3, 2, 1, 8] must be [S, B, heads, D] that differ in heads only",
        ),
        (
            (query[..., :7], key[..., :7], position, frequency),
            "rope: query [4, 2, 3, 7] must end in an even axis, pairs of channels",
        ),
        ((query, key, position.int(), frequency), "rope: position int32 [2, 3, 4] must be int64 [2, axes, 4] as query"),
        ((query, key, position, frequency[:1]), "rope: frequency float32 [1, 4] must be float32 [3, 4]"),
        (
            (query, key, position.to("meta"), frequency),
            f"rope: position is on meta, query is on {ops_device}; they must be the same",
        ),
    ):
        with pytest.raises(ValueError) as error:
            ops.CSRC.rope(*arguments)
        assert str(error.value) == message


def test_unchecked_calls_are_refused_too(kernels):
    """The kernels do not read out of bounds even when called below megamm.ops."""
    query, key, position, frequency = operands((4, 2, 3, 1, 8), torch.float32, kernels.device)
    for arguments, message in (
        ((query, key[:3], position, frequency), "the same S, B and even D"),
        ((query, key, position[:, :, :3], frequency), "position must be"),
        ((query, key, position, frequency[:, :3]), "frequency must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels.ops.rope(*arguments, 1.0, False)
    with pytest.raises(RuntimeError, match="takes float64, float32, bfloat16 and float16"):
        kernels.ops.rope(query.int(), key.int(), position, frequency, 1.0, False)
