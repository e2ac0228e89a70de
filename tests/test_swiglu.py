"""SwiGLU against float64 torch: dtypes, combinations of arguments, odd sizes, strides, extremes; tracing, errors.

The kernels are called through torch.ops, so that the sources for a GPU run here too (conftest.py: kernels); the
functions of megamm.ops, which add gradients and checks, are tested on the available devices.
"""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from op_checks import LAYOUTS, assert_same_bits_for_any_threads

from megamm import ops

DTYPES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
"""Largest error relative to the largest value: the rounding of the dtype."""

SHAPES = [(37, 333), (5, 128), (300, 8), (2, 3, 1024), (3, 2600), (9, 7), (11, 1), (0, 8), (3, 0), (40,)]
"""Columns in vectors or not, rows narrower and wider than a group of threads, empty ones, a single row."""


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    if expected.numel():
        error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"{error:.1e}"


def formula(gate, up, bias, row_weight, limit):
    """Compute the definition step by step."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    if bias is not None:
        half = bias.shape[0] // 2
        gate, up = gate + bias[:half], up + bias[half:]
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = F.silu(gate) * up
    return y if row_weight is None else y * row_weight[..., None]


def reference(dy, *tensors, limit):
    """Return (y, gradients of the tensors, None for None) in float64."""
    inputs = [None if each is None else each.double().requires_grad_() for each in tensors]
    y = formula(*inputs, limit)
    gradients = iter(torch.autograd.grad(y, [each for each in inputs if each is not None], dy.double()))
    return y.detach(), *(None if each is None else next(gradients) for each in inputs)


def arguments(shape, dtype, fused, has_bias, weight_dtype, device, seed=0):
    """Return (dy, gate, up, bias, row_weight), the last three None if not requested."""
    generator = torch.Generator().manual_seed(seed + sum(shape))

    def numbers(*sizes):
        return torch.randn(sizes, generator=generator).to(dtype).to(device)

    dy, gate, up = (numbers(*shape) for _ in range(3))
    if fused:
        gate, up = torch.cat([gate, up], -1), None
    bias = numbers(2 * shape[-1]) if has_bias else None
    row_weight = None if weight_dtype is None else torch.rand(shape[:-1], generator=generator).to(weight_dtype)
    return dy, gate, up, bias, row_weight if row_weight is None else row_weight.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(kernels, shape, dtype):
    kinds = [(True, False, None, None), (False, True, None, 0.7), (True, True, dtype, None)]
    kinds += [(False, False, torch.float32, None), (True, False, torch.float32, 0.7)]
    for fused, has_bias, weight_dtype, limit in kinds:
        dy, *tensors = arguments(shape, dtype, fused, has_bias, weight_dtype, kernels.device)
        expected = reference(dy, *tensors, limit=limit)
        actual = (kernels.ops.swiglu(*tensors, limit), *kernels.ops.swiglu_backward(dy, *tensors, limit))
        for one, other in zip(actual, expected, strict=True):
            if other is None:
                assert one.numel() == 0
            else:
                assert one.dtype == (weight_dtype if one is actual[-1] else dtype)
                close(one, other, DTYPES[dtype] if one.dtype == dtype else 2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(kernels, layout):
    x = LAYOUTS[layout](torch.randn(4, 6, 64).to(kernels.device))
    bias, row_weight = torch.randn(256).to(kernels.device)[::2], torch.rand(6, 4).to(kernels.device).T
    results = []
    for each in (x, x.contiguous()):
        for tensors in ((each, each, bias, row_weight), (each, each, None, None), (each, None, None, None)):
            y = kernels.ops.swiglu(*tensors, None)
            results.append([y, *kernels.ops.swiglu_backward(each[..., : y.shape[-1]], *tensors, None)])
    for one, other in zip(results[:3], results[3:], strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_bitwise_the_same_again_and_for_any_number_of_threads(kernels):
    dy, *tensors = arguments((700, 96), torch.float32, True, True, torch.float32, kernels.device)

    def run():
        return [kernels.ops.swiglu(*tensors, 1.0), *kernels.ops.swiglu_backward(dy, *tensors, 1.0)]

    assert_same_bits_for_any_threads(run)


def test_silu_is_exact_to_a_few_units_in_the_last_place(kernels):
    gate = torch.cat([torch.linspace(-87, 87, 20_001), torch.logspace(-30, 30, 999), -torch.logspace(-30, 1.9, 999)])
    actual = kernels.ops.swiglu(gate.to(kernels.device), torch.ones_like(gate).to(kernels.device), None, None, None)
    expected = F.silu(gate.double())
    assert ((actual.cpu().double() - expected) / expected).abs().nan_to_num().max() < 4e-7


@pytest.mark.parametrize("limit", [None, 7.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(kernels, dtype, limit):
    """Large values saturate; NaN and infinity appear where they do in float64, and nowhere else."""
    values = torch.tensor([0.0, 1.5, -1.5, 7.0, -7.0, 1e4, -1e4, float("inf"), -float("inf"), float("nan")])
    if dtype != torch.float16:
        values = torch.cat([values, torch.tensor([80.0, -80.0, 1e30, -1e30])])
    gate, up = (each.reshape(-1).to(dtype) for each in torch.meshgrid(values, values, indexing="ij"))
    dy = torch.full_like(gate, 0.5)
    expected = [each.to(dtype) for each in reference(dy, gate, up, None, None, limit=limit)[:3]]
    on_device = [each.to(kernels.device) for each in (dy, gate, up)]
    actual = [kernels.ops.swiglu(*on_device[1:], None, None, limit)]
    actual += kernels.ops.swiglu_backward(*on_device, None, None, limit)[:2]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=DTYPES[dtype], atol=1e-30, equal_nan=True)


@pytest.mark.parametrize(("fused", "has_bias", "weighted", "limit"), product(*[(False, True)] * 3, (None, 0.8)))
def test_gradcheck(ops_device, fused, has_bias, weighted, limit):
    double = torch.float64
    _, *tensors = arguments((3, 2, 5), double, fused, has_bias, double if weighted else None, ops_device)
    inputs = [each.requires_grad_() if each is not None else None for each in tensors]

    def function(gate, up, bias, row_weight):
        return ops.CSRC.swiglu(gate, up, bias=bias, row_weight=row_weight, limit=limit)

    assert torch.autograd.gradcheck(function, inputs)


def test_opcheck(ops_device):
    for fused, has_bias, weight_dtype, limit in ((True, False, None, None), (False, True, torch.float32, 0.5)):
        dy, *tensors = arguments((3, 5, 24), torch.bfloat16, fused, has_bias, weight_dtype, ops_device)
        torch.library.opcheck(torch.ops.megamm.swiglu_backward.default, (dy, *tensors, limit))
        tensors = [each if each is None else each.requires_grad_() for each in tensors]
        torch.library.opcheck(torch.ops.megamm.swiglu.default, (*tensors, limit))


def test_compiled_graph_is_whole_and_equal(ops_device):
    _, gate, _, bias, row_weight = arguments((6, 32), torch.float32, True, True, torch.float32, ops_device)
    inputs = [each.requires_grad_() for each in (gate, bias, row_weight)]

    def function(gate, bias, row_weight):
        weighted = ops.CSRC.swiglu(gate, bias=bias, row_weight=row_weight, limit=1.0)
        return ops.CSRC.swiglu(weighted, gate[:, 32:]).sum()

    expected = torch.autograd.grad(function(*inputs), inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert torch.equal(a, b)


def test_the_plain_torch_function_agrees(ops_device):
    for fused, has_bias, weighted, limit in product(*[(False, True)] * 3, (None, 0.8)):
        weight_dtype = torch.float32 if weighted else None
        _, gate, up, bias, row_weight = arguments((4, 9), torch.float32, fused, has_bias, weight_dtype, ops_device)
        ours, plain = (
            each.swiglu(gate, up, bias=bias, row_weight=row_weight, limit=limit) for each in (ops.CSRC, ops.TORCH)
        )
        torch.testing.assert_close(ours, plain)


def test_messages_name_both_sides(ops_device):
    x, weight = torch.randn(4, 8, device=ops_device), torch.rand(4, device=ops_device)
    double = weight.double()
    for given, message in (
        ({"up": x[:, :6]}, "up is [4, 6], gate is [4, 8]; they must be the same"),
        ({"up": x.double()}, "up is float64, gate is float32; they must be the same"),
        ({"gate": x[:, :7]}, "gate [4, 7] must end in an even axis, two halves, where up is not given"),
        ({"bias": x[0, :6]}, "bias is [6], gate and up together have 8 columns"),
        ({"up": x, "bias": x[0]}, "bias is [8], gate and up together have 16 columns"),
        ({"row_weight": weight[:3]}, "row_weight is [3], gate has rows [4]"),
        ({"row_weight": double}, "row_weight is float64, gate is float32; row_weight must be the same or float32"),
        ({"row_weight": weight.to("meta")}, f"row_weight is on meta, gate is on {ops_device}; they must be the same"),
        ({"limit": 0.0}, "limit is 0.0, it must be positive"),
    ):
        with pytest.raises(ValueError) as error:
            ops.CSRC.swiglu(**{"gate": x} | given)
        assert str(error.value) == f"swiglu: {message}"
    with pytest.raises(RuntimeError, match="takes float64, float32, bfloat16 and float16"):
        ops.CSRC.swiglu(x.int())


def test_unchecked_calls_are_refused_too(kernels):
    """The kernels do not read out of bounds even when called below megamm.ops."""
    x = torch.randn(4, 8).to(kernels.device)
    for given, message in (
        ((x[:, :7], None, None, None, None), "must be even"),
        ((x, x[:3], None, None, None), "up has other sizes"),
        ((x, None, x[0, :7], None, None), "two elements per column"),
        ((x, None, None, x[:3, 0], None), "one element per row"),
        ((x, None, None, x[:, 0].double(), None), "row_weight has another dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels.ops.swiglu(*given)
    with pytest.raises(RuntimeError, match="dy is not of the sizes"):
        kernels.ops.swiglu_backward(x, x, None, None, None, None)
