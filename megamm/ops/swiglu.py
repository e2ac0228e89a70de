"""SwiGLU, the gated activation of an MLP, fused with its neighbours: clamp, MoE routing weight.

    g, u = halves of the fused projection;  with a limit: g = min(g, limit), u = clamp(u, -limit, limit)
    y = silu(g) * u * row_weight,  silu(g) = g * s,  s = 1 / (1 + exp(-g))

Backward needs only the arguments and recomputes the rest:

    dg = dy * row_weight * u * s * (1 + g * (1 - s));    du = dy * row_weight * silu(g);    0 where clamped
    drow_weight = sum over the row of dy * silu(g) * u

Source: Shazeer 2020, "GLU Variants Improve Transformer".
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megamm.ops.check import check_same_device, dtype_name


def swiglu(gate_up: Tensor, *, row_weight: Tensor | None = None, limit: float | None = None) -> Tensor:
    """The fused projection `[..., 2H]`, first half gate, second half up -> `[..., H]`.

    row_weight `[...]` multiplies each row; it may be float32 for any dtype of the rest. dtypes are float64, float32,
    bfloat16, float16. Everything is computed in float32 (float64 for float64) and rounded once at the end;
    Megatron-core and the plain torch function also round before the row's weight. Rows with one stride, such as halves
    of one tensor, are read in place, others are copied first. Raises ValueError if shapes, dtypes or devices do not
    match, or if limit is not positive.
    """
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: gate_up {list(gate_up.shape)} must end in an even axis, two halves")
    if row_weight is not None:
        check_same_device("swiglu", gate_up=gate_up, row_weight=row_weight)
        if row_weight.dtype not in (torch.float32, gate_up.dtype):
            names = f"row_weight is {dtype_name(row_weight)}, gate_up is {dtype_name(gate_up)}"
            raise ValueError(f"swiglu: {names}; row_weight must be the same or float32")
        if row_weight.shape != gate_up.shape[:-1]:
            rows = list(gate_up.shape[:-1])
            raise ValueError(f"swiglu: row_weight is {list(row_weight.shape)}, gate_up has rows {rows}")
    if limit is not None and not limit > 0:
        raise ValueError(f"swiglu: limit is {limit}, it must be positive")
    return torch.ops.megamm.swiglu.default(gate_up, row_weight, limit)


def swiglu_torch(gate_up: Tensor, *, row_weight: Tensor | None = None, limit: float | None = None) -> Tensor:
    """The same in plain torch."""
    gate, up = gate_up.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = F.silu(gate) * up
    return y if row_weight is None else (y * row_weight.unsqueeze(-1)).to(y.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.limit = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    gate_up, row_weight = ctx.saved_tensors
    dgate_up, drow_weight = torch.ops.megamm.swiglu_backward.default(dy, gate_up, row_weight, ctx.limit)
    return dgate_up, None if row_weight is None else drow_weight, None


def _fake_backward(
    dy: Tensor, gate_up: Tensor, row_weight: Tensor | None, limit: float | None
) -> tuple[Tensor, Tensor]:
    # Without row_weight its gradient is a tensor without elements: an op's results are always tensors.
    of_weight = gate_up.new_empty(0) if row_weight is None else row_weight.new_empty(row_weight.shape)
    return gate_up.new_empty(gate_up.shape), of_weight


def register() -> None:
    """Register shapes and gradient of the op in torch.ops.megamm."""
    fake = torch.library.register_fake
    fake("megamm::swiglu", lambda gate_up, *_: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)))
    fake("megamm::swiglu_backward", _fake_backward)
    torch.library.register_autograd("megamm::swiglu", _gradient, setup_context=_setup)
