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


def reference(dy, *tensors, limit):
    """Return (y, gradients of the tensors, None for None) in float64."""
    inputs = [None if each is None else each.double().requires_grad_() for each in tensors]
    gate_up, row_weight = inputs
    gate, up = gate_up.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = F.silu(gate) * up if row_weight is None else F.silu(gate) * up * row_weight[..., None]
    gradients = iter(torch.autograd.grad(y, [each for each in inputs if each is not None], dy.double()))
    return y.detach(), *(None if each is None else next(gradients) for each in inputs)


def arguments(shape, dtype, weight_dtype, device, seed=0):
    """Return (dy, gate_up, row_weight) for results of this shape; row_weight is None if not requested."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    dy, gate, up = (torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(3))
    row_weight = None if weight_dtype is None else torch.rand(shape[:-1], generator=generator).to(weight_dtype)
    return dy, torch.cat([gate, up], -1), row_weight if row_weight is None else row_weight.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(kernels, shape, dtype):
    kinds = [(None, None), (None, 0.7), (dtype, None), (torch.float32, None), (torch.float32, 0.7)]
    for weight_dtype, limit in kinds:
        dy, *tensors = arguments(shape, dtype, weight_dtype, kernels.device)
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
    row_weight = torch.rand(6, 4).to(kernels.device).T
    results = []
    for each in (x, x.contiguous()):
        for tensors in ((each, row_weight), (each, None)):
            y = kernels.ops.swiglu(*tensors, None)
            results.append([y, *kernels.ops.swiglu_backward(each[..., : y.shape[-1]], *tensors, None)])
    for one, other in zip(results[:2], results[2:], strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_bitwise_the_same_again_and_for_any_number_of_threads(kernels):
    dy, *tensors = arguments((700, 96), torch.float32, torch.float32, kernels.device)

    def run():
        return [kernels.ops.swiglu(*tensors, 1.0), *kernels.ops.swiglu_backward(dy, *tensors, 1.0)]

    assert_same_bits_for_any_threads(run)


def test_silu_is_exact_to_a_few_units_in_the_last_place(kernels):
    gate = torch.cat([torch.linspace(-87, 87, 20_001), torch.logspace(-30, 30, 999), -torch.logspace(-30, 1.9, 999)])
    gate_up = torch.cat([gate, torch.ones_like(gate)]).to(kernels.device)
    actual = kernels.ops.swiglu(gate_up, None, None)
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
    gate_up = torch.cat([gate, up])
    expected = [each.to(dtype) for each in reference(dy, gate_up, None, limit=limit)[:2]]
    actual = [kernels.ops.swiglu(gate_up.to(kernels.device), None, limit)]
    actual += kernels.ops.swiglu_backward(dy.to(kernels.device), gate_up.to(kernels.device), None, limit)[:1]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=DTYPES[dtype], atol=1e-30, equal_nan=True)


@pytest.mark.parametrize(("weighted", "limit"), product((False, True), (None, 0.8)))
def test_gradcheck(ops_device, weighted, limit):
    double = torch.float64
    _, *tensors = arguments((3, 2, 5), double, double if weighted else None, ops_device)
    inputs = [each.requires_grad_() if each is not None else None for each in tensors]

    def function(gate_up, row_weight):
        return ops.CSRC.swiglu(gate_up, row_weight=row_weight, limit=limit)

    assert torch.autograd.gradcheck(function, inputs)


def test_opcheck(ops_device):
    for weight_dtype, limit in ((None, None), (torch.float32, 0.5)):
        dy, *tensors = arguments((3, 5, 24), torch.bfloat16, weight_dtype, ops_device)
        torch.library.opcheck(torch.ops.megamm.swiglu_backward.default, (dy, *tensors, limit))
        tensors = [each if each is None else each.requires_grad_() for each in tensors]
        torch.library.opcheck(torch.ops.megamm.swiglu.default, (*tensors, limit))


def test_compiled_graph_is_whole_and_equal(ops_device):
    _, *tensors = arguments((6, 32), torch.float32, torch.float32, ops_device)
    inputs = [each.requires_grad_() for each in tensors]

    def function(gate_up, row_weight):
        weighted = ops.CSRC.swiglu(gate_up, row_weight=row_weight, limit=1.0)
        return ops.CSRC.swiglu(torch.cat([weighted, gate_up[:, 32:]], -1)).sum()

    expected = torch.autograd.grad(function(*inputs), inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert torch.equal(a, b)


def test_the_plain_torch_function_agrees(ops_device):
    for weighted, limit in product((False, True), (None, 0.8)):
        _, gate_up, row_weight = arguments((4, 9), torch.float32, torch.float32 if weighted else None, ops_device)
        ours, plain = (each.swiglu(gate_up, row_weight=row_weight, limit=limit) for each in (ops.CSRC, ops.TORCH))
        torch.testing.assert_close(ours, plain)


def test_messages_name_both_sides(ops_device):
    x, weight = torch.randn(4, 8, device=ops_device), torch.rand(4, device=ops_device)
    double = weight.double()
    for given, message in (
        ({"gate_up": x[:, :7]}, "gate_up [4, 7] must end in an even axis, two halves"),
        ({"row_weight": weight[:3]}, "row_weight is [3], gate_up has rows [4]"),
        ({"row_weight": double}, "row_weight is float64, gate_up is float32; row_weight must be the same or float32"),
        (
            {"row_weight": weight.to("meta")},
            f"row_weight is on meta, gate_up is on {ops_device}; they must be the same",
        ),
        ({"limit": 0.0}, "limit is 0.0, it must be positive"),
    ):
        with pytest.raises(ValueError) as error:
            ops.CSRC.swiglu(**{"gate_up": x} | given)
        assert str(error.value) == f"swiglu: {message}"
    with pytest.raises(RuntimeError, match="takes float64, float32, bfloat16 and float16"):
        ops.CSRC.swiglu(x.int())


def test_unchecked_calls_are_refused_too(kernels):
    """The kernels do not read out of bounds even when called below megamm.ops."""
    x = torch.randn(4, 8).to(kernels.device)
    for given, message in (
        ((x[:, :7], None, None), "must be even"),
        ((x, x[:3, 0], None), "one element per row"),
        ((x, x[:, 0].double(), None), "row_weight has another dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels.ops.swiglu(*given)
    with pytest.raises(RuntimeError, match="dy is not of the sizes"):
        kernels.ops.swiglu_backward(x, x, None, None)
