"""RMSNorm over the last axis, alone or with an addition of the residual before it.

    y = x * rstd * weight,  rstd = 1 / sqrt(mean(x^2) + eps)            (zero-centred: * (1 + weight))

Statistics are float32 (float64 for float64) and y is rounded once. Backward needs only x, weight and rstd:

    dx = rstd * (g - x * rstd^2 * mean(g * x)),  g = dy * weight;       dweight = sum over rows of dy * x * rstd

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from typing import Any

import torch
from torch import Tensor

from megamm.ops.check import check_same_kind, check_same_shape


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, zero_centered: bool = False) -> Tensor:
    """x `[..., N]`, weight `[N]` of the same dtype (float64, float32, bfloat16, float16) and device -> `[..., N]`.

    Rows with one stride are read in place, others are copied first. ValueError if shapes, dtypes or devices differ.
    """
    _check_weight("rms_norm", x, weight)
    return torch.ops.megamm.rms_norm.default(x, weight, eps, zero_centered)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """rms_norm(x + residual), and x + residual as the new residual, `[..., N]` each, in one pass over memory.

    The sum is rounded to the dtype before it is normalised, as with two separate operators.
    """
    check_same_shape("add_rms_norm", x=x, residual=residual)
    _check_weight("add_rms_norm", x, weight)
    return torch.ops.megamm.add_rms_norm.default(x, residual, weight, eps, zero_centered)[:2]


def _check_weight(op: str, x: Tensor, weight: Tensor) -> None:
    check_same_kind(op, x=x, weight=weight)
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: weight {list(weight.shape)} does not match the last axis of x {list(x.shape)}")


def _statistics(x: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[:-1], dtype=dtype)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.zero_centered = inputs
    _save(ctx, x, weight, output[-1])


def _setup_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, _, ctx.zero_centered = inputs
    _save(ctx, output[1], weight, output[-1])


def _save(ctx: Any, x: Tensor, weight: Tensor, rstd: Tensor) -> None:
    ctx.save_for_backward(x, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _norm_gradient(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.megamm.rms_norm_backward.default(dy, None, x, weight, rstd, ctx.zero_centered)
    return dx, dweight, None, None


def _add_norm_gradient(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return dsum, dsum, None, None, None
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.megamm.rms_norm_backward.default(dy, dsum, x, weight, rstd, ctx.zero_centered)
    return dx, dx, dweight, None, None


def register() -> None:
    """Register shapes and gradients of the ops in torch.ops.megamm."""
    fake, gradient = torch.library.register_fake, torch.library.register_autograd
    fake("megamm::rms_norm", lambda x, weight, eps, zero_centered: (_empty(x), _statistics(x)))
    fake(
        "megamm::add_rms_norm",
        lambda x, residual, weight, eps, zero_centered: (_empty(x), _empty(x), _statistics(x)),
    )
    fake(
        "megamm::rms_norm_backward",
        lambda dy, dx_add, x, weight, rstd, zero_centered: (_empty(x), _empty(weight)),
    )
    gradient("megamm::rms_norm", _norm_gradient, setup_context=_setup_norm)
    gradient("megamm::add_rms_norm", _add_norm_gradient, setup_context=_setup_add_norm)
