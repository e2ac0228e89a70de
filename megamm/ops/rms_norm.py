"""RMSNorm over the last axis, alone or of the sum of x and a residual.

    y = x * rstd * weight,  rstd = 1 / sqrt(mean(x^2) + eps)            (zero-centred: * (1 + weight))

Statistics are float32 (float64 for float64) and y is rounded once. Backward needs only x, weight and rstd:

    dx = rstd * (g - x * rstd^2 * mean(g * x)),  g = dy * weight;       dweight = sum over rows of dy * x * rstd

The sum is rounded to the dtype before it is normalised, as if it were computed alone. Its own gradient is added to dx,
which is the gradient of both addends.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megamm.ops.check import check_same_kind


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, zero_centered: bool = False) -> Tensor:
    """x `[..., N]`, weight `[N]` of the same dtype (float64, float32, bfloat16, float16) and device -> `[..., N]`.

    Rows with one stride are read in place, others are copied first. ValueError if shapes, dtypes or devices differ.
    """
    check_same_kind("rms_norm", x=x, weight=weight)
    _check_weight("rms_norm", x, weight)
    return torch.ops.megamm.rms_norm.default(x, weight, eps, zero_centered)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """Add x and residual `[..., N]` -> (rms_norm of the sum, the sum), in one pass over memory."""
    check_same_kind("add_rms_norm", x=x, residual=residual, weight=weight)
    if residual.shape != x.shape:
        raise ValueError(f"add_rms_norm: residual is {list(residual.shape)}, x is {list(x.shape)}")
    _check_weight("add_rms_norm", x, weight)
    y, total, _ = torch.ops.megamm.add_rms_norm.default(x, residual, weight, eps, zero_centered)
    return y, total


def _check_weight(op: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: weight {list(weight.shape)} does not match the last axis of x {list(x.shape)}")


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float = 1e-6, zero_centered: bool = False) -> Tensor:
    """The same in plain torch."""
    return F.rms_norm(x, weight.shape, weight + 1 if zero_centered else weight, eps)


def add_rms_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    total = x + residual
    return rms_norm_torch(total, weight, eps, zero_centered), total


def _statistics(x: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[:-1], dtype=dtype)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.zero_centered = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.megamm.rms_norm_backward.default(dy, None, x, weight, rstd, ctx.zero_centered)
    return dx, dweight, None, None


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, _, ctx.zero_centered = inputs
    _, total, rstd = output
    ctx.save_for_backward(total, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _gradient_add(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return dtotal, dtotal, None, None, None
    total, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.megamm.rms_norm_backward.default(dy, dtotal, total, weight, rstd, ctx.zero_centered)
    return dx, dx, dweight, None, None


def register() -> None:
    """Register shapes and gradients of the ops in torch.ops.megamm."""
    fake = torch.library.register_fake
    fake("megamm::rms_norm", lambda x, weight, eps, zero_centered: (_empty(x), _statistics(x)))
    fake("megamm::rms_norm_backward", lambda dy, dx_add, x, weight, *_: (_empty(x), _empty(weight)))
    fake("megamm::add_rms_norm", lambda x, *_: (_empty(x), _empty(x), _statistics(x)))
    torch.library.register_autograd("megamm::rms_norm", _gradient, setup_context=_setup)
    torch.library.register_autograd("megamm::add_rms_norm", _gradient_add, setup_context=_setup_add)
