"""SwiGLU, the gated activation of an MLP, fused with its neighbours: bias, clamp, MoE routing weight.

    g, u = halves of the fused projection (+ bias);  with a limit: g = min(g, limit), u = clamp(u, -limit, limit)
    y = silu(g) * u * row_weight,  silu(g) = g * s,  s = 1 / (1 + exp(-g))

Backward needs only the arguments and recomputes the rest:

    dg = dy * row_weight * u * s * (1 + g * (1 - s));    du = dy * row_weight * silu(g);    0 where clamped
    dbias = sums of (dg, du) over rows;    drow_weight = sum over the row of dy * silu(g) * u

Source: Shazeer 2020, "GLU Variants Improve Transformer".
"""

from typing import Any

import torch
from torch import Tensor

from megamm.ops.check import check_same_device, check_same_kind, check_same_shape, dtype_name


def swiglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    limit: float | None = None,
) -> Tensor:
    """The fused projection `[..., 2H]`, first half gate, second half up; or `gate` and `up` `[..., H]` -> `[..., H]`.

    bias `[2H]` is added first: the gate's half, then up's. row_weight `[...]` multiplies each row; it may be float32
    for any dtype of the rest. dtypes are float64, float32, bfloat16, float16. Everything is computed in float32
    (float64 for float64) and rounded once at the end; Megatron-core and the plain torch function also round before the
    row's weight. Rows with one stride, such as halves of one tensor, are read in place, others are copied first.
    Raises ValueError if shapes, dtypes or devices do not match, or if limit is not positive.
    """
    _check(gate, up, bias, row_weight, limit)
    return torch.ops.megamm.swiglu.default(gate, up, bias, row_weight, limit)


def _check(
    gate: Tensor, up: Tensor | None, bias: Tensor | None, row_weight: Tensor | None, limit: float | None
) -> None:
    if up is not None:
        check_same_shape("swiglu", gate=gate, up=up)
    if gate.dim() == 0 or (up is None and gate.shape[-1] % 2):
        raise ValueError(f"swiglu: gate {list(gate.shape)} must end in an even axis, two halves, where up is not given")
    if bias is not None:
        check_same_kind("swiglu", gate=gate, bias=bias)
        columns = 2 * _value_shape(gate, up)[-1]
        if bias.shape != (columns,):
            raise ValueError(f"swiglu: bias is {list(bias.shape)}, gate and up together have {columns} columns")
    if row_weight is not None:
        check_same_device("swiglu", gate=gate, row_weight=row_weight)
        if row_weight.dtype not in (torch.float32, gate.dtype):
            names = f"row_weight is {dtype_name(row_weight)}, gate is {dtype_name(gate)}"
            raise ValueError(f"swiglu: {names}; row_weight must be the same or float32")
        if row_weight.shape != gate.shape[:-1]:
            raise ValueError(f"swiglu: row_weight is {list(row_weight.shape)}, gate has rows {list(gate.shape[:-1])}")
    if limit is not None and not limit > 0:
        raise ValueError(f"swiglu: limit is {limit}, it must be positive")


def _value_shape(gate: Tensor, up: Tensor | None) -> list[int]:
    return [*gate.shape[:-1], gate.shape[-1] // (2 if up is None else 1)]


def _like(gate: Tensor, tensor: Tensor | None) -> Tensor:
    """An empty tensor with the shape of `tensor`; without elements if that is None."""
    return gate.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.limit = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None, None
    tensors = ctx.saved_tensors
    gradients = torch.ops.megamm.swiglu_backward.default(dy, *tensors, ctx.limit)
    return *(None if tensor is None else each for tensor, each in zip(tensors, gradients, strict=True)), None


def register() -> None:
    """Register shapes and gradient of the op in torch.ops.megamm."""
    fake = torch.library.register_fake
    fake("megamm::swiglu", lambda gate, up, *_: gate.new_empty(_value_shape(gate, up)))
    fake("megamm::swiglu_backward", lambda dy, gate, *others: tuple(_like(gate, each) for each in (gate, *others[:3])))
    torch.library.register_autograd("megamm::swiglu", _gradient, setup_context=_setup)
