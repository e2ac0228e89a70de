"""Matrices in FP8 with current scaling, and their products by torch._scaled_mm.

A matrix x is stored as values q and scales s with q s = x (1 + e) + u: one scale for the whole matrix (tensorwise) or
one for each row of a factor (rowwise). A scale is the least power of two for which the largest magnitude is at most
that of the format. So dividing by it is exact, and a value that does not underflow is rounded the same way with any
scale. With p bits of mantissa and the least positive value d of the format, |e| <= 2^-(p+1) and
|u| <= s d / 2:

    format  largest  p  d      use
    e4m3    448      3  2^-9   activations and weights
    e5m2    57344    2  2^-16  gradients of activations

A product multiplies a `[M, K]` and the transpose of b `[N, K]`, both with rows in memory order, as a GPU requires;
sums are in float32. Sources: Micikevicius et al. 2022, "FP8 Formats for Deep Learning"; NVIDIA's cuBLAS documentation.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Scaling = Literal["tensorwise", "rowwise"]
ACTIVATION, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
_MANTISSA, _EXPONENT = 0x007FFFFF, 0x7F800000
_LEAST = 2.0**-100
"""Least scale: its inverse is finite, and a matrix of zeros has it."""


class Scaled(NamedTuple):
    """A matrix in FP8: values `[R, C]`, contiguous, and float32 scales `[1, 1]`, or `[R, 1]` of rows."""

    values: Tensor
    scale: Tensor

    def dequantized(self) -> Tensor:
        """Return the matrix as float32 `[R, C]`."""
        return self.values.float() * self.scale


def quantize(x_RC: Tensor, dtype: torch.dtype, scaling: Scaling) -> Scaled:
    """Return x as a factor of a product that sums over its columns."""
    return quantize_along(x_RC, dtype, 1 if scaling == "rowwise" else None)


def quantize_transposed(x_RC: Tensor, dtype: torch.dtype, scaling: Scaling) -> Scaled:
    """Return the transpose of x `[C, R]` as a factor of a product that sums over the rows of x."""
    values, scale = quantize_along(x_RC, dtype, 0 if scaling == "rowwise" else None)
    return Scaled(values.t().contiguous(), scale.view(-1, 1))


def quantize_both(x_RC: Tensor, dtype: torch.dtype, scaling: Scaling) -> tuple[Scaled, Scaled]:
    """Return `quantize` and `quantize_transposed` of x; tensorwise, both have the same values."""
    rows = quantize(x_RC, dtype, scaling)
    if scaling == "rowwise":
        return rows, quantize_transposed(x_RC, dtype, scaling)
    return rows, Scaled(rows.values.t().contiguous(), rows.scale)


def quantize_along(x: Tensor, dtype: torch.dtype, axes: int | tuple[int, ...] | None) -> Scaled:
    """Quantise x of any shape with one scale along these axes, or one for all; the scales' shape broadcasts to x."""
    # A norm needs no copy of the magnitudes. NaN and infinite values stay in the result: neither has a finite scale.
    largest = torch.linalg.vector_norm(x, torch.inf, axes, keepdim=True, dtype=torch.float32)
    scale = scale_of(largest, dtype)
    # Powers of two are exact in every dtype, so that the quotient is x with another exponent.
    return Scaled((x * scale.reciprocal().to(x.dtype)).to(dtype), scale)


def scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scales for values whose largest magnitudes are these float32 numbers."""
    ratio = (largest / torch.finfo(dtype).max).clamp(min=_LEAST)
    # Round up to a power of two in the bits of the number: a carry from its mantissa increments its exponent.
    return ((ratio.view(torch.int32) + _MANTISSA) & _EXPONENT).view(torch.float32)


def product(a: Scaled, b: Scaled, dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """Return `a b^T` `[M, N]` in the dtype; fast: a GPU may keep fewer bits of partial sums."""
    return torch._scaled_mm(a.values, b.values.t(), a.scale, b.scale.t(), out_dtype=dtype, use_fast_accum=fast)
