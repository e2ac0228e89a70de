"""Rotary position embedding (RoPE) of queries and keys, in one pass, at explicit positions.

    angle[s, b, p] = sum over axes a of position[b, a, s] * frequency[a, p]            (float32)
    y[i] = factor * (x[i] * cos - x[i + D/2] * sin),  y[i + D/2] = factor * (x[i + D/2] * cos + x[i] * sin)

for the channel pairs p = i < D/2 of each head. With several axes, a pair follows one of them: its frequency is 0 in the
others. Backward rotates the gradients back and needs only positions and frequencies.

Source: Su et al. 2021, "RoFormer".
"""

from typing import Any

import torch
from torch import Tensor

from megamm.ops.check import check_same_device, check_same_kind


def rope(query: Tensor, key: Tensor, position: Tensor, frequency: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """query `[S, B, N, D]`, key `[S, B, G, D]`, position int64 `[B, A, S]`, frequency float32 `[A, D / 2]` -> both.

    Queries and keys have one dtype (float64, float32, bfloat16, float16), any strides and contiguous results; those
    with a contiguous last axis, such as views of a fused projection, are read in place. Sines and cosines are float32
    (float64 for float64), and results are rounded once; the plain torch function rounds them to the dtype first.
    Raises ValueError if shapes, dtypes or devices do not match.
    """
    check_same_kind("rope", query=query, key=key)
    check_same_device("rope", query=query, position=position, frequency=frequency)
    if query.dim() != 4 or key.dim() != 4 or query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        shapes = f"query {list(query.shape)} and key {list(key.shape)}"
        raise ValueError(f"rope: {shapes} must be [S, B, heads, D] that differ in heads only")
    length, rows, _, head_dim = query.shape
    if head_dim % 2:
        raise ValueError(f"rope: query {list(query.shape)} must end in an even axis, pairs of channels")
    if position.dtype != torch.int64 or position.dim() != 3 or position[:, 0].shape != (rows, length):
        raise ValueError(f"rope: position {_form(position)} must be int64 [{rows}, axes, {length}] as query")
    if frequency.dtype != torch.float32 or frequency.shape != (position.shape[1], head_dim // 2):
        axes = position.shape[1]
        raise ValueError(f"rope: frequency {_form(frequency)} must be float32 [{axes}, {head_dim // 2}]")
    rotated: tuple[Tensor, Tensor] = torch.ops.megamm.rope.default(query, key, position, frequency, factor, False)
    return rotated


def rope_torch(
    query: Tensor, key: Tensor, position: Tensor, frequency: Tensor, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    # Not a matrix product, which a GPU may round: a pair has one axis with a frequency, so that this sum is exact.
    angles = (position.permute(2, 0, 1).float().unsqueeze(-1) * frequency).sum(2).unsqueeze(2)
    cosines, sines = ((wave * factor).to(query.dtype) for wave in (angles.cos(), angles.sin()))
    cosines, sines = torch.cat((cosines, cosines), dim=-1), torch.cat((-sines, sines), dim=-1)
    return _rotate(query, cosines, sines), _rotate(key, cosines, sines)


def _rotate(x_SBND: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate heads. Rolling by D / 2 swaps the two channels of a pair; sines are negative for the first of a pair."""
    return torch.addcmul(x_SBND * cosines, x_SBND.roll(x_SBND.shape[-1] // 2, dims=-1), sines)


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *_, position, frequency, ctx.factor, ctx.inverse = inputs
    ctx.save_for_backward(position, frequency)


def _gradient(ctx: Any, dquery: Tensor, dkey: Tensor) -> tuple[Tensor | None, ...]:
    position, frequency = ctx.saved_tensors
    gradients = torch.ops.megamm.rope.default(dquery, dkey, position, frequency, ctx.factor, not ctx.inverse)
    return *gradients, None, None, None, None


def register() -> None:
    """Register shapes and gradient of the op in torch.ops.megamm."""
    fake = torch.library.register_fake
    fake("megamm::rope", lambda query, key, *_: (query.new_empty(query.shape), key.new_empty(key.shape)))
    torch.library.register_autograd("megamm::rope", _gradient, setup_context=_setup)
