"""Products of many matrices in one, in FP8: `grouped_linear` with the scales of fp8.py.

    y[r] = weight[g] @ x[r]  for the rows r of group g
    dx[r] = weight[g]^T @ dy[r];    dweight[g] = sum of dy[r] x[r]^T over them, 0 for a group without rows

torch's kernel (compute capability 9.0 and 10.0) has requirements that shape this file:

- both factors are e4m3, so gradients are too, unlike in products of one matrix; the result is bfloat16;
- scales are float32, one for each row of a and column of b; in a product that sums over the groups' rows, one for each
  of them and each group. The tensorwise recipe repeats one scale: of all rows of x or dy, and of each group's weight;
- a factor's elements are contiguous along the sum, and their number and that of the columns are multiples of 16;
- so is each group's number of rows. Rows are copied to a matrix with rows of zeros between the groups. Its size follows
  from the numbers of rows and groups, so the host waits for nothing. Rows after the last group belong to none.

A CPU has no kernel: there `scaled_grouped_mm_reference` computes, which holds its callers to the same requirements.
Source: torch 2.13, _scaled_grouped_mm and its meta function.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megamm.ops import fp8
from megamm.ops.fp8 import ACTIVATION, Scaling

MULTIPLE = 16
"""Rows of a group, and elements along a sum."""


class GroupRows(NamedTuple):
    """Where R sorted rows of G groups lie in a matrix whose groups have multiples of 16 rows.

    ends: int32 `[G]`, the row after each group's last. target: int64 `[R]`, the new row of each row. group: int64
    `[R]`, the group of each row.
    """

    ends: Tensor
    target: Tensor
    group: Tensor


def group_rows(sizes: Tensor, rows: int) -> GroupRows:
    """sizes: integers `[G]` with sum `rows`, on the device of the rows."""
    padded = (sizes + (MULTIPLE - 1)).div(MULTIPLE, rounding_mode="floor") * MULTIPLE
    ends = padded.cumsum(0)
    group = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes, output_size=rows)
    # How many rows of zeros precede the group.
    shift = (ends - padded) - (sizes.cumsum(0) - sizes)
    target = torch.arange(rows, device=sizes.device) + shift.index_select(0, group)
    return GroupRows(ends.to(torch.int32), target, group)


def padded_rows(rows: int, groups: int) -> int:
    """Return the rows of the matrix: enough for any sizes of the groups."""
    return -(-(rows + (MULTIPLE - 1) * groups) // MULTIPLE) * MULTIPLE


def grouped_linear_fp8(x: Tensor, weight: Tensor, sizes: Tensor, scaling: Scaling) -> Tensor:
    """x `[R, K]`, weight `[G, N, K]` in bfloat16, sizes integers `[G]` with sum R, on x's device -> `[R, N]`.

    ValueError if shapes do not match, or if K or N is not a multiple of 16.
    """
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2] or sizes.shape != weight.shape[:1]:
        shapes = f"x {list(x.shape)}, weight {list(weight.shape)} and sizes {list(sizes.shape)}"
        raise ValueError(f"grouped_linear_fp8: {shapes} must be [R, K], [G, N, K] and [G]")
    result: Tensor = _GroupedLinearFp8.apply(x, weight, sizes, scaling, torch.is_grad_enabled())
    return result


class _GroupedLinearFp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: Tensor, scaling: Scaling, is_trained: bool) -> Tensor:
        ctx.scaling, ctx.shape = scaling, x.shape
        if not len(x):  # the kernel needs a row
            ctx.save_for_backward(weight)
            return x.new_empty(0, weight.shape[1])
        where = group_rows(sizes, len(x))
        rows, columns = _factors(x, where, scaling, is_trained)
        ctx.save_for_backward(weight, sizes, *where, *columns)
        y = grouped_product(*rows, *_weight(weight, 2, scaling), where.ends, fast=True)
        return y.index_select(0, where.target)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        if not kept:
            return weight.new_empty(ctx.shape), torch.zeros_like(weight), None, None, None
        sizes, where, (x_columns, x_scale) = kept[0], GroupRows(*kept[1:4]), kept[4:]
        rows, (dy_columns, dy_scale) = _factors(gradients[0], where, ctx.scaling, True)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = grouped_product(*rows, *_weight(weight, 1, ctx.scaling), where.ends)
            dx = dx.index_select(0, where.target)
        dweight = grouped_product(dy_columns, dy_scale, x_columns.t(), x_scale, where.ends)
        # Kernels leave the gradient of a group without rows as it was in memory (pytorch issue 172439).
        dweight.masked_fill_((sizes == 0).view(-1, 1, 1), 0)
        return dx, dweight, None, None, None


def _factors(
    x: Tensor, where: GroupRows, scaling: Scaling, both: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """Return x `[R, C]` as two left factors, each with its scales.

    The first is `[P, C]`, for sums over its columns. The second is `[C, P]`, for sums over the rows of each group; it
    is empty without `both`. P: `padded_rows`.
    """
    count, groups = padded_rows(len(x), len(where.ends)), len(where.ends)
    values, scale = fp8.quantize(x, ACTIVATION, scaling)
    rows = _spread(values, where, count)
    if scaling == "tensorwise":
        row_scale = scale.view(1).expand(count).contiguous()
        columns = (rows.t().contiguous(), scale.view(1).expand(groups * x.shape[1]).contiguous()) if both else ()
        return (rows, row_scale), columns
    row_scale = scale.new_ones(count).index_copy_(0, where.target, scale.view(-1))
    if not both:
        return (rows, row_scale), ()
    # Largest magnitudes of each group's columns; that of a group without rows is 0. They have x's dtype, exactly.
    largest = torch.zeros(groups, x.shape[1], dtype=x.dtype, device=x.device)
    largest.scatter_reduce_(0, where.group[:, None].expand(-1, x.shape[1]), x.abs(), "amax")
    group_scale = fp8.scale_of(largest.float(), ACTIVATION)
    inverse = group_scale.reciprocal().to(x.dtype)  # exact, as in fp8.py
    values = (x * inverse.index_select(0, where.group)).to(ACTIVATION)
    return (rows, row_scale), (_spread(values, where, count).t().contiguous(), group_scale.view(-1))


def _spread(values: Tensor, where: GroupRows, count: int) -> Tensor:
    """Copy rows `[R, C]` to their places among rows of zeros, `[count, C]`."""
    # As bytes: torch does not index FP8. The byte 0 is the number 0.
    spread = torch.zeros(count, values.shape[1], dtype=torch.uint8, device=values.device)
    return spread.index_copy_(0, where.target, values.view(torch.uint8)).view(values.dtype)


def _weight(weight: Tensor, axis: int, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Return matrices `[G, N, K]` as right factors of sums over this axis (2: K, 1: N), with their scales."""
    values, scale = fp8.quantize_along(weight, ACTIVATION, axis if scaling == "rowwise" else (1, 2))
    other = 3 - axis
    scale = scale.squeeze(axis) if scaling == "rowwise" else scale.squeeze(2).expand(-1, weight.shape[other])
    # The kernel takes `[G, sum, columns]` whose elements are contiguous along the sum.
    values = values if axis == 2 else values.transpose(1, 2).contiguous()
    return values.transpose(1, 2), scale.contiguous()


def grouped_product(
    a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, ends: Tensor, *, fast: bool = False
) -> Tensor:
    """Return the products of groups; fast: a GPU may keep fewer bits of partial sums.

    a `[P, C]`, b `[G, C, N]` -> `[P, N]`, whose rows beyond the last group are undefined; or a `[M, P]`, b `[P, N]` ->
    `[G, M, N]`, which is undefined for a group without rows.
    """
    if a.device.type == "cpu":
        return scaled_grouped_mm_reference(a, b, scale_a, scale_b, ends)
    return torch._scaled_grouped_mm(a, b, scale_a, scale_b, ends, out_dtype=torch.bfloat16, use_fast_accum=fast)


def scaled_grouped_mm_reference(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, ends: Tensor) -> Tensor:
    """Compute what torch's kernel does, in float32; what it leaves undefined is NaN. ValueError for what it refuses."""
    starts, sums_over_groups = [0, *ends.tolist()], b.dim() == 2
    _check(a, b, scale_a, scale_b, ends)
    spans = [slice(*pair) for pair in itertools.pairwise(starts)]
    if sums_over_groups:
        y = a.new_full((len(ends), len(a), b.shape[1]), torch.nan, dtype=torch.bfloat16)
        of_a, of_b = scale_a.view(len(ends), -1, 1), scale_b.view(len(ends), 1, -1)
        for g, span in enumerate(spans):
            if span.start < span.stop:
                y[g] = (a[:, span].float() * of_a[g]) @ (b[span].float() * of_b[g])
        return y
    y = a.new_full((len(a), b.shape[2]), torch.nan, dtype=torch.bfloat16)
    for g, span in enumerate(spans):
        y[span] = (a[span].float() * scale_a[span, None]) @ (b[g].float() * scale_b[g])
    return y


def _check(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, ends: Tensor) -> None:
    """Raise ValueError unless the arguments are what torch's kernel accepts."""
    groups, sums_over_groups = len(ends), b.dim() == 2
    of_a = (groups * len(a),) if sums_over_groups else (len(a),)
    of_b = (groups * b.shape[1],) if sums_over_groups else (groups, b.shape[-1])
    numbers = [0, *ends.tolist()]
    steps = [end - start for start, end in itertools.pairwise(numbers)]
    limit = a.shape[1] if sums_over_groups else len(a)
    wrong = {
        "a and b must be float8_e4m3fn": (a.dtype, b.dtype) != (torch.float8_e4m3fn, torch.float8_e4m3fn),
        "a must be [M, C] and b [C, N] or [G, C, N]": a.dim() != 2
        or b.dim() not in (2, 3)
        or a.shape[1] != b.shape[-2],
        "b must have a matrix for each group": not sums_over_groups and len(b) != groups,
        "the sum and the columns must be multiples of 16": any(n % MULTIPLE for n in (a.shape[-1], *b.shape[-2:])),
        "a must be contiguous along the sum": a.stride(-1) != 1 or a.stride(-2) % MULTIPLE != 0,
        "b must be contiguous along the sum": b.stride(-2) != 1 or b.stride(-1) % MULTIPLE != 0,
        "scales must be float32": (scale_a.dtype, scale_b.dtype) != (torch.float32, torch.float32),
        f"scales of a must be contiguous, {of_a}": scale_a.shape != of_a or not scale_a.is_contiguous(),
        f"scales of b must be contiguous, {of_b}": scale_b.shape != of_b or not scale_b.is_contiguous(),
        "ends must be int32 [G]": ends.dtype != torch.int32 or ends.dim() != 1,
        "groups must have multiples of 16 rows": any(step < 0 or step % MULTIPLE for step in steps),
        "groups must not end beyond the rows": bool(numbers[-1] > limit),
    }
    problems = [what for what, is_wrong in wrong.items() if is_wrong]
    if problems:
        raise ValueError(f"scaled_grouped_mm: {'; '.join(problems)}")
