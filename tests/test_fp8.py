"""FP8 matrices and products against float64, within the error model of megamm/ops/fp8.py."""

import math

import pytest
import torch

from megamm.ops import fp8

FORMATS = {fp8.ACTIVATION: (448.0, 2.0**-4, 2.0**-10), fp8.GRADIENT: (57344.0, 2.0**-3, 2.0**-17)}
"""Largest value, largest relative error, and largest error near 0 in units of the scale, of each format."""
EITHER = pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
DTYPES = pytest.mark.parametrize("dtype", FORMATS)


def _matrix(rows=48, columns=80, spread=12.0, dtype=torch.bfloat16, seed=1):
    """Return values over many orders of magnitude, also between rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(rows, columns, generator=generator)
    powers = (torch.rand(rows, 1, generator=generator) + torch.rand(1, columns, generator=generator) - 1) * spread
    return (size * torch.exp2(powers)).to(dtype)


@EITHER
@DTYPES
def test_a_matrix_is_within_the_error_model(scaling, dtype):
    largest, relative, absolute = FORMATS[dtype]
    x = _matrix()
    for matrix, quantized in zip((x, x.t()), fp8.quantize_both(x, dtype, scaling), strict=True):
        values, scale = quantized
        assert values.is_contiguous() and values.dtype == dtype and scale.dtype == torch.float32
        assert scale.shape == ((1, 1) if scaling == "tensorwise" else (len(matrix), 1))
        assert (torch.frexp(scale).mantissa == 0.5).all(), "a power of two"
        exact = matrix.double()
        peak = exact.abs().amax(1, True) if scaling == "rowwise" else exact.abs().max()
        assert ((peak / scale <= largest) & (peak / scale > largest / 2)).all(), "the least scale that holds the values"
        error = (quantized.dequantized() - exact).abs()
        share = error / (relative * exact.abs() + absolute * scale)
        assert 0.8 < share.max() <= 1, "the bound is that of the largest errors"


@EITHER
def test_zeros_extremes_and_faults(scaling):
    x = torch.zeros(16, 32, dtype=torch.bfloat16)
    assert not fp8.quantize(x, fp8.ACTIVATION, scaling).dequantized().any()
    x[3, 5] = 1e-38  # its scale would have no finite inverse
    x[4, 5] = 1e30 if scaling == "rowwise" else 0
    found = fp8.quantize(x, fp8.GRADIENT, scaling).dequantized()
    assert found.isfinite().all()
    assert found[4, 5] == pytest.approx(x[4, 5].item(), rel=1 / 8)
    weight = fp8.quantize(_matrix(16, 32), fp8.ACTIVATION, scaling)
    for fault in (math.nan, math.inf):
        x[7, 2] = fault
        result = fp8.product(fp8.quantize(x, fp8.GRADIENT, scaling), weight, torch.float32)
        assert not result[7].isfinite().any(), "the loss guard sees it"
        if scaling == "rowwise":
            assert result[:7].isfinite().all()


@EITHER
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_products_are_those_of_float64(scaling, out):
    """They are exact for the dequantised factors but for sums in float32, and within the bounds of both factors."""
    a, b = _matrix(48, 80, 4.0), _matrix(32, 80, 4.0, seed=2)
    for kind in (fp8.ACTIVATION, fp8.GRADIENT):
        p, q = fp8.quantize(a, kind, scaling), fp8.quantize(b, fp8.ACTIVATION, scaling)
        result = fp8.product(p, q, out).double()
        assert result.shape == (48, 32)
        ours, magnitudes = (f(p).double() @ f(q).double().t() for f in (fp8.Scaled.dequantized, _magnitudes))
        rounding = torch.finfo(out).eps / 2 * ours.abs() + 80 * torch.finfo(torch.float32).eps * magnitudes
        assert ((result - ours).abs() <= rounding).all()
        (_, ra, ua), (_, rb, ub) = FORMATS[kind], FORMATS[fp8.ACTIVATION]
        exact, of_a, of_b = a.double() @ b.double().t(), a.double().abs(), b.double().abs()
        error_a, error_b = ra * of_a + ua * p.scale, rb * of_b + ub * q.scale
        bound = error_a @ of_b.t() + of_a @ error_b.t() + error_a @ error_b.t()
        assert ((result - exact).abs() <= bound + rounding).all()
        assert (result - exact).abs().max() > 1e-3 * bound.max(), "the bound is of the size of the errors"


def _magnitudes(x):
    return x.dequantized().abs()


def test_parts_of_a_matrix_have_the_values_of_the_whole():
    """A tensor rank has scales of its own part: a value is the same, unless it underflows."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).sign() * (torch.rand(32, 64) + 0.5)
    x[:16] *= 2.0**-5
    for dtype in FORMATS:
        whole = fp8.quantize(x, dtype, "tensorwise").dequantized()
        parts = [fp8.quantize(part, dtype, "tensorwise") for part in x.chunk(2)]
        assert parts[0].scale < parts[1].scale
        assert torch.equal(torch.cat([part.dequantized() for part in parts]), whole)


def test_rowwise_keeps_what_one_scale_loses():
    """A row that is small beside the others underflows with one scale for all."""
    x = torch.ones(16, 32, dtype=torch.bfloat16)
    x[3] = 2.0**-20
    assert not fp8.quantize(x, fp8.ACTIVATION, "tensorwise").dequantized()[3].any()
    assert torch.equal(fp8.quantize(x, fp8.ACTIVATION, "rowwise").dequantized(), x.float())
