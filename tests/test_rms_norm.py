"""RMSNorm against float64 torch: every dtype, odd sizes, strides, extremes; gradients, tracing, errors.

The kernels are called through torch.ops, so that the sources for a GPU run here too (conftest.py: kernels); the
functions of megamm.ops, which add gradients and checks, are tested on the available devices.
"""

import pytest
import torch
import torch.nn.functional as F
from op_checks import LAYOUTS, assert_same_bits_for_any_threads

from megamm import ops
from megamm.ops import library

DTYPES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
"""Largest error relative to the largest value: the rounding of the dtype."""

SHAPES = [(37, 333), (5, 128), (300, 64), (2, 3, 1024), (7, 4096), (2, 9000), (9, 7), (11, 3), (0, 8), (3, 0), (5,)]
"""Groups of 8 threads to a block for a row, rows in vectors or not, rows too wide for registers, empty ones."""


def close(actual, expected, dtype):
    assert actual.shape == expected.shape
    if expected.numel():
        error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error <= DTYPES[dtype], f"{error:.1e}"


def reference(x, residual, weight, eps, zero_centered, dy, dsum):
    """Return (y, sum, dx, dweight) in float64; the sum is rounded to the dtype as the op does."""
    total = (x if residual is None else x + residual).double().requires_grad_()
    factor = weight.double().requires_grad_()
    y = F.rms_norm(total, factor.shape, factor + 1 if zero_centered else factor, eps)
    outputs, gradients = [y], [dy.double()]
    if dsum is not None:
        outputs, gradients = [y, total], [*gradients, dsum.double()]
    return y.detach(), total.detach(), *torch.autograd.grad(outputs, (total, factor), gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(kernels, shape, dtype):
    generator = torch.Generator().manual_seed(len(str(shape)) + shape[-1])
    x, residual, dy, dsum = (torch.randn(shape, generator=generator).to(dtype).to(kernels.device) for _ in range(4))
    weight = torch.randn(shape[-1], generator=generator).to(dtype).to(kernels.device)
    for residual_, dsum_, zero_centered in ((None, None, False), (residual, dsum, True)):
        y, total, dx, dweight = reference(x, residual_, weight, 1e-5, zero_centered, dy, dsum_)
        if residual_ is None:
            actual_y, rstd = kernels.ops.rms_norm(x, weight, 1e-5, zero_centered)
        else:
            actual_y, actual_total, rstd = kernels.ops.add_rms_norm(x, residual_, weight, 1e-5, zero_centered)
            assert torch.equal(actual_total.double(), total)
        actual_dx, actual_dw = kernels.ops.rms_norm_backward(dy, dsum_, total.to(dtype), weight, rstd, zero_centered)
        close(actual_y, y, dtype)
        close(actual_dx, dx, dtype)
        close(actual_dw, dweight, dtype)


@pytest.mark.parametrize("width", [40_000, 70_001])
def test_rows_wider_than_registers(kernels, width):
    x, dy = torch.randn(2, 3, width).to(kernels.device)
    weight = torch.randn(width).to(kernels.device)
    y, _, dx, dweight = reference(x, None, weight, 1e-6, False, dy, None)
    actual, rstd = kernels.ops.rms_norm(x, weight, 1e-6, False)
    close(actual, y, x.dtype)
    actual_dx, actual_dw = kernels.ops.rms_norm_backward(dy, None, x, weight, rstd, False)
    close(actual_dx, dx, x.dtype)
    close(actual_dw, dweight, x.dtype)


@pytest.mark.everything
def test_more_numbers_than_31_bits_count(ops_device):
    """9 GB; the last rows, whose offsets need more than 31 bits, equal the same rows computed alone."""
    x = torch.zeros(2**21 + 3, 1024, dtype=torch.bfloat16, device=ops_device)
    x[-5:] = torch.randn(5, 1024).to(x)
    weight = torch.randn(1024).to(x)
    y, rstd = torch.ops.megamm.rms_norm(x, weight, 1e-6, False)
    last, rstd_of_last = torch.ops.megamm.rms_norm(x[-5:].clone(), weight, 1e-6, False)
    assert torch.equal(y[-5:], last) and not y[:-5].any()
    del y
    dx, dweight = torch.ops.megamm.rms_norm_backward(x, None, x, weight, rstd, False)
    dx_of_last, dweight_of_last = torch.ops.megamm.rms_norm_backward(
        x[-5:].clone(), None, x[-5:].clone(), weight, rstd_of_last, False
    )
    assert torch.equal(dx[-5:], dx_of_last) and not dx[:-5].any()
    torch.testing.assert_close(dweight, dweight_of_last)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(kernels, layout):
    plain = torch.randn(4, 6, 64).to(kernels.device)
    x = LAYOUTS[layout](plain)
    weight = torch.randn(128).to(kernels.device)[::2]
    results = []
    for each in (x, x.contiguous()):
        y, total, rstd = kernels.ops.add_rms_norm(each, each, weight, 1e-6, False)
        results.append([y, total, rstd, *kernels.ops.rms_norm_backward(each, each, each, weight, rstd, False)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_bitwise_the_same_again_and_for_any_number_of_threads(kernels):
    x, dy = torch.randn(2, 700, 96).to(kernels.device)
    weight = torch.randn(96).to(kernels.device)

    def run():
        y, rstd = kernels.ops.rms_norm(x, weight, 1e-6, False)
        return [y, *kernels.ops.rms_norm_backward(dy, None, x, weight, rstd, False)]

    assert_same_bits_for_any_threads(run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(kernels, dtype):
    """Large values keep their direction; a NaN or infinity stays in its own row."""
    x = torch.randn(6, 72).to(dtype)
    x[0] *= 1e4
    x[1, 5], x[2, 7], x[3, 9], x[4] = float("nan"), float("inf"), -float("inf"), 0.0
    weight = torch.ones(72, dtype=dtype)
    expected = F.rms_norm(x.double(), (72,), weight.double(), 1e-6)
    actual = kernels.ops.rms_norm(x.to(kernels.device), weight.to(kernels.device), 1e-6, False)[0].cpu().double()
    assert torch.equal(actual.isnan(), expected.isnan())
    finite = ~expected.isnan()
    torch.testing.assert_close(actual[finite], expected[finite], rtol=DTYPES[dtype], atol=DTYPES[dtype])


@pytest.mark.parametrize("zero_centered", [False, True])
def test_gradcheck(ops_device, zero_centered):
    x, residual = (torch.randn(3, 5, 7, dtype=torch.float64, device=ops_device, requires_grad=True) for _ in range(2))
    weight = torch.randn(7, dtype=torch.float64, device=ops_device, requires_grad=True)
    norm, add_norm = ops.CSRC.rms_norm, ops.CSRC.add_rms_norm
    assert torch.autograd.gradcheck(lambda x, w: norm(x, w, 1e-5, zero_centered), (x, weight))
    assert torch.autograd.gradcheck(lambda *a: add_norm(*a, 1e-5, zero_centered), (x, residual, weight))
    # Only the sum is used.
    assert torch.equal(torch.autograd.grad(add_norm(x, residual, weight)[1].sum(), x)[0], torch.ones_like(x))


def test_opcheck(ops_device):
    x, residual = (torch.randn(3, 5, 24, device=ops_device, requires_grad=True) for _ in range(2))
    weight = torch.randn(24, device=ops_device, requires_grad=True)
    rstd = torch.rand(3, 5, device=ops_device)
    compiled = torch.ops.megamm
    torch.library.opcheck(compiled.rms_norm.default, (x, weight, 1e-6, True))
    torch.library.opcheck(compiled.add_rms_norm.default, (x, residual, weight, 1e-6, False))
    gradient = (x.detach(), residual.detach(), x.detach(), weight.detach(), rstd, False)
    torch.library.opcheck(compiled.rms_norm_backward.default, gradient)


def test_compiled_graph_is_whole_and_equal(ops_device):
    x, residual = (torch.randn(6, 32, device=ops_device, requires_grad=True) for _ in range(2))
    weight = torch.randn(32, device=ops_device, requires_grad=True)

    def function(x, residual, weight):
        y, total = ops.CSRC.add_rms_norm(x, residual, weight)
        return (ops.CSRC.rms_norm(y, weight) * total).sum()

    expected = torch.autograd.grad(function(x, residual, weight), (x, residual, weight))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(x, residual, weight), (x, residual, weight)), expected, strict=True):
        assert torch.equal(a, b)


def test_the_plain_torch_functions_agree(ops_device):
    x, residual, weight = (
        torch.randn(4, 9, device=ops_device),
        torch.randn(4, 9, device=ops_device),
        torch.randn(9).to(ops_device),
    )
    for name in ("rms_norm", "add_rms_norm"):
        tensors = (x, weight) if name == "rms_norm" else (x, residual, weight)
        for zero_centered in (False, True):
            ours, plain = (getattr(each, name)(*tensors, 1e-5, zero_centered) for each in (ops.CSRC, ops.TORCH))
            torch.testing.assert_close(ours, plain)


def test_messages_name_both_sides(ops_device):
    x, weight = torch.randn(4, 8, device=ops_device), torch.randn(8, device=ops_device)
    for arguments, message in (
        ((x, weight.double()), "rms_norm: weight is float64, x is float32; they must be the same"),
        ((x, torch.randn(6, device=ops_device)), "rms_norm: weight [6] does not match the last axis of x [4, 8]"),
        ((x, weight.to("meta")), f"rms_norm: weight is on meta, x is on {ops_device}; they must be the same"),
    ):
        with pytest.raises(ValueError) as error:
            ops.CSRC.rms_norm(*arguments)
        assert str(error.value) == message
    with pytest.raises(ValueError, match=r"residual is \[8\], x is \[4, 8\]"):
        ops.CSRC.add_rms_norm(x, weight, weight)
    with pytest.raises(RuntimeError, match="takes float64, float32, bfloat16 and float16"):
        ops.CSRC.rms_norm(x.int(), weight.int())


def test_unchecked_calls_are_refused_too(kernels):
    """The kernels do not read out of bounds even when called below megamm.ops."""
    x, weight = torch.randn(4, 8).to(kernels.device), torch.randn(9).to(kernels.device)
    with pytest.raises(RuntimeError, match="as many elements as the last axis"):
        kernels.ops.rms_norm(x, weight, 1e-6, False)
    with pytest.raises(RuntimeError, match="dy has other sizes"):
        kernels.ops.rms_norm_backward(x[:2], None, x, weight[:8], x[:, 0], False)


def test_choice():
    cpu = torch.device("cpu")
    assert ops.choose("auto", cpu) == (ops.CSRC, "built for cpu")
    assert ops.choose("torch", cpu) == (ops.TORCH, "requested")
    assert library.choose("auto", torch.device("meta"))[0] == "torch"
