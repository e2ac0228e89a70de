"""RMSNorm over the last axis.

    y = x * rstd * weight,  rstd = 1 / sqrt(mean(x^2) + eps)            (zero-centred: * (1 + weight))

Statistics are float32 (float64 for float64) and y is rounded once. Backward needs only x, weight and rstd:

    dx = rstd * (g - x * rstd^2 * mean(g * x)),  g = dy * weight;       dweight = sum over rows of dy * x * rstd

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
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight {list(weight.shape)} does not match the last axis of x {list(x.shape)}")
    return torch.ops.megamm.rms_norm.default(x, weight, eps, zero_centered)[0]


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float = 1e-6, zero_centered: bool = False) -> Tensor:
    """The same in plain torch."""
    return F.rms_norm(x, weight.shape, weight + 1 if zero_centered else weight, eps)


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
    dx, dweight = torch.ops.megamm.rms_norm_backward.default(dy, x, weight, rstd, ctx.zero_centered)
    return dx, dweight, None, None


def register() -> None:
    """Register shapes and gradient of the op in torch.ops.megamm."""
    fake = torch.library.register_fake
    fake("megamm::rms_norm", lambda x, weight, eps, zero_centered: (_empty(x), _statistics(x)))
    fake("megamm::rms_norm_backward", lambda dy, x, weight, rstd, zero_centered: (_empty(x), _empty(weight)))
    torch.library.register_autograd("megamm::rms_norm", _gradient, setup_context=_setup)
