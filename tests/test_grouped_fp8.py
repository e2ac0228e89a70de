"""Grouped products in FP8 against float64 within the error model of megamm/ops/fp8.py.

What the GPU's kernel requires of its arguments is asked of torch's meta function.
"""

import pytest
import torch

from megamm.ops import fp8
from megamm.ops import grouped_fp8 as grouped

SIZES = [(3, 0, 21, 0, 17), (0, 0, 16), (7,), (0, 0), (1, 1, 1, 1), (32, 48)]
"""Rows of each group: some have none, the last or the first too, or all; some are multiples of 16."""
BOTH = pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
RELATIVE, ABSOLUTE = 2.0**-4, 2.0**-10
"""Largest relative error of e4m3, and its largest error near 0 in units of the scale."""


def _random(*shape, seed=1):
    """Return values over many orders of magnitude, also between rows."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(6 * torch.rand(*shape[:-1], 1, generator=generator) - 3)
    return (torch.randn(*shape, generator=generator) * spread).bfloat16()


def _inputs(sizes, inner=32, outer=48):
    x, weight = _random(sum(sizes), inner).requires_grad_(), _random(len(sizes), outer, inner, seed=2).requires_grad_()
    return x, weight, torch.tensor(sizes), _random(sum(sizes), outer, seed=3)


def _error_of(x, axis, whole):
    """Return a bound of each element's error in e4m3; a scale is at most twice the largest magnitude / 448."""
    peak = x.abs().amax() if whole else x.abs().amax(axis, True)
    return RELATIVE * x.abs() + ABSOLUTE * 2 * peak / 448


def _product(a, b, whole_a, whole_b):
    """Return `a b^T` in float64 and the bound of the errors of both factors; whole: one scale, of this magnitude."""
    error_a, error_b = (_error_of(x, 1, whole) for x, whole in ((a, whole_a), (b, whole_b)))
    bound = error_a @ b.abs().t() + a.abs() @ error_b.t() + error_a @ error_b.t()
    return a @ b.t(), bound


def _assert_within(found, expected, bound):
    rounding = 2.0**-8 * expected.abs() + 1e-6 * bound
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    assert ((found.double() - expected).abs() <= bound + rounding).all()
    assert bound.max() < 0.6 * expected.abs().max(), "the bound says something"
    assert (found.double() - expected).abs().max() > 1e-3 * bound.max(), "the bound is of the size of the errors"


@BOTH
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_three_products_are_those_of_each_group(scaling, sizes):
    x, weight, count, dy = _inputs(sizes)
    y = grouped.grouped_linear_fp8(x, weight, count, scaling)
    dx, dweight = torch.autograd.grad(y, [x, weight], dy)
    assert y.isfinite().all() and dx.isfinite().all() and dweight.isfinite().all(), "nothing undefined is read"
    assert not dweight[count == 0].any()
    whole = scaling == "tensorwise"
    # Where one scale is that of the tokens of all groups, a group's own tokens underflow earlier.
    all_x, all_dy = (v.detach().double().abs().max() if whole and v.numel() else None for v in (x, dy))
    parts = zip(x.detach().double().split(sizes), dy.double().split(sizes), weight.detach().double(), strict=True)
    found = zip(y.split(sizes), dx.split(sizes), dweight, strict=True)
    for (a, d, w), (y_g, dx_g, dw_g) in zip(parts, found, strict=True):
        if not len(a):
            continue
        _assert_within(y_g.detach(), *_scaled_product(a, w, all_x, whole))
        _assert_within(dx_g, *_scaled_product(d, w.t(), all_dy, whole))
        _assert_within(dw_g, *_scaled_product(d.t(), a.t(), all_dy, whole, all_x))


def _scaled_product(a, b, peak_a, whole, peak_b=None):
    value, bound = _product(a, b, whole, whole)
    for x, other, peak in ((a, b, peak_a), (b, a, peak_b)):
        if peak is not None:
            extra = torch.full_like(x, ABSOLUTE * 2 * peak / 448)
            bound = bound + (extra @ other.abs().t() if x is a else other.abs() @ extra.t()) * 1.1
    return value, bound


@BOTH
def test_a_group_has_the_bits_that_it_has_alone(scaling):
    """Rows of other groups change nothing but, with one scale for all, what underflows."""
    sizes = (5, 0, 19, 32)
    x, weight, count, dy = _inputs(sizes)
    x.data.clamp_(0.5, 4), dy.clamp_(0.5, 4), weight.data.clamp_(0.5, 4)
    y = grouped.grouped_linear_fp8(x, weight, count, scaling)
    dx, dweight = torch.autograd.grad(y, [x, weight], dy)
    for g, rows in enumerate(torch.arange(sum(sizes)).split(sizes)):
        a, w = x[rows].detach().requires_grad_(), weight[g : g + 1].detach().requires_grad_()
        alone = grouped.grouped_linear_fp8(a, w, torch.tensor([len(rows)]), scaling)
        da, dw = torch.autograd.grad(alone, [a, w], dy[rows])
        assert torch.equal(alone, y[rows]) and torch.equal(da, dx[rows]) and torch.equal(dw[0], dweight[g])


def test_rowwise_scales_belong_to_rows_columns_and_groups():
    """A row, a channel or a group that is small beside the others keeps its bits."""
    x = torch.ones(40, 32, dtype=torch.bfloat16)
    x[3] *= 2.0**-30
    x[20:] *= 2.0**-20
    weight = torch.ones(2, 16, 32, dtype=torch.bfloat16).requires_grad_()
    y = grouped.grouped_linear_fp8(x, weight, torch.tensor([20, 20]), "rowwise")
    assert torch.equal(y, x.sum(1, keepdim=True).expand(-1, 16))
    y.backward(torch.ones_like(y))
    assert torch.equal(weight.grad[1], torch.full((16, 32), 20 * 2.0**-20, dtype=torch.bfloat16))


@BOTH
def test_a_fault_reaches_its_rows(scaling):
    x, weight, count, dy = _inputs((5, 0, 19))
    x.data[7, 2] = torch.nan
    y = grouped.grouped_linear_fp8(x, weight, count, scaling)
    assert not y[7].isfinite().any(), "the loss guard sees it"
    (dweight,) = torch.autograd.grad(y, weight, dy)
    assert not dweight[2, :, 2].isfinite().any()
    if scaling == "rowwise":
        assert y[:7].isfinite().all() and dweight[0].isfinite().all()


def test_rows_are_spread_to_multiples_of_16():
    for sizes in SIZES:
        where = grouped.group_rows(torch.tensor(sizes), sum(sizes))
        padded = [-(-size // 16) * 16 for size in sizes]
        assert where.ends.tolist() == torch.tensor(padded).cumsum(0).tolist() and where.ends.dtype == torch.int32
        starts = [sum(padded[:g]) for g in range(len(sizes))]
        assert where.target.tolist() == [s + i for s, size in zip(starts, sizes, strict=True) for i in range(size)]
        assert where.ends[-1] <= grouped.padded_rows(sum(sizes), len(sizes))
    assert grouped.padded_rows(17, 1) == 32, "the most that one group of 17 rows can need"


class _Kernel:
    """Records the kernel's arguments, and asks torch what it says of them on a GPU."""

    def __init__(self, compute):
        self.compute, self.shapes = compute, []

    def __call__(self, a, scale_a, b, scale_b, ends, *, fast=False):
        on_meta = [x.to("meta") for x in (a, b, scale_a, scale_b, ends)]
        y = torch._scaled_grouped_mm(*on_meta, out_dtype=torch.bfloat16, use_fast_accum=fast)
        found = self.compute(a, b, scale_a, scale_b, ends)
        assert (found.shape, found.dtype) == (y.shape, y.dtype)
        self.shapes.append((a.dim(), b.dim(), fast))
        return found


@BOTH
def test_torch_accepts_what_its_kernel_gets(monkeypatch, scaling):
    """The meta function of torch's kernel repeats the checks that the kernel does before it starts."""
    kernel = _Kernel(grouped.scaled_grouped_mm_reference)
    monkeypatch.setattr(grouped, "grouped_product", kernel)
    for sizes in SIZES:
        x, weight, count, dy = _inputs(sizes)
        torch.autograd.grad(grouped.grouped_linear_fp8(x, weight, count, scaling), [x, weight], dy)
    assert set(kernel.shapes) == {(2, 3, True), (2, 3, False), (2, 2, False)}


def _arguments():
    a = fp8.quantize(_random(32, 48), fp8.ACTIVATION, "rowwise")
    values, scale = fp8.quantize_along(_random(2, 16, 48), fp8.ACTIVATION, 2)
    ends = torch.tensor([16, 32], dtype=torch.int32)
    return dict(a=a.values, b=values.transpose(1, 2), scale_a=a.scale.view(-1), scale_b=scale.squeeze(2), ends=ends)


REFUSED = {
    "float8_e4m3fn": dict(a=torch.zeros(32, 48, dtype=torch.float8_e5m2)),
    "must be a": dict(a=torch.zeros(32, 64).to(fp8.ACTIVATION)),
    "a must be contiguous": dict(a=torch.zeros(48, 32).to(fp8.ACTIVATION).t()),
    "b must be contiguous": dict(b=torch.zeros(2, 48, 16).to(fp8.ACTIVATION)),
    "a matrix for each group": dict(b=torch.zeros(3, 16, 48).to(fp8.ACTIVATION).transpose(1, 2)),
    "the columns must be multiples": dict(b=torch.zeros(2, 8, 48).to(fp8.ACTIVATION).transpose(1, 2)),
    "scales must be float32": dict(scale_a=torch.ones(32, dtype=torch.bfloat16)),
    "scales of a": dict(scale_a=torch.ones(1)),
    "scales of b": dict(scale_b=torch.ones(2, 48)),
    "must be int32": dict(ends=torch.tensor([16, 32])),
    "multiples of 16 rows": dict(ends=torch.tensor([8, 32], dtype=torch.int32)),
    "beyond the rows": dict(ends=torch.tensor([16, 48], dtype=torch.int32)),
}
ONLY_ON_THE_DEVICE = {"multiples of 16 rows", "beyond the rows", "the columns must be multiples"}
"""What torch's meta function does not see: it has no numbers, and omits one check of the kernel."""


@pytest.mark.parametrize("what", REFUSED)
def test_the_stand_in_refuses_what_the_kernel_refuses(what):
    grouped.scaled_grouped_mm_reference(**_arguments())
    arguments = _arguments() | REFUSED[what]
    problem = what.replace("must be a", r"a must be \[M, C\]")
    with pytest.raises(ValueError, match=problem):
        grouped.scaled_grouped_mm_reference(**arguments)
    if what not in ONLY_ON_THE_DEVICE:
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            torch._scaled_grouped_mm(
                *(arguments[name].to("meta") for name in ("a", "b", "scale_a", "scale_b", "ends")),
                out_dtype=torch.bfloat16,
            )


def test_undefined_results_are_not_numbers():
    """As on a GPU, what the kernel does not write is not to be read; here it would be noticed."""
    arguments = _arguments() | dict(ends=torch.tensor([16, 16], dtype=torch.int32))
    y = grouped.scaled_grouped_mm_reference(**arguments)
    assert y[:16].isfinite().all() and y[16:].isnan().all()


def test_shapes_that_do_not_match_are_named():
    with pytest.raises(ValueError, match=r"x \[3, 8\], weight \[2, 4, 9\] and sizes \[2\] must be"):
        grouped.grouped_linear_fp8(torch.zeros(3, 8), torch.zeros(2, 4, 9), torch.tensor([1, 2]), "rowwise")
