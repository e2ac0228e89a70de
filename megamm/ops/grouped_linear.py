"""Products of many matrices in one: rows are sorted by group, and each is multiplied by the matrix of its group.

    y[r] = weight[g] @ x[r]  for the sizes[g] rows r of group g
    dx[r] = weight[g]^T @ dy[r];    dweight[g] = sum of dy[r] x[r]^T over them, 0 for a group without rows

The experts of a rank are such groups. torch has one kernel for all groups, which reads the sizes on the device: the
host neither waits for them nor starts one product after another. Source: Gale et al. 2022, "MegaBlocks" (products of
experts with any number of tokens).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16
"""Bytes; torch's kernel requires rows to be a multiple of it."""


def why_not(dtype: torch.dtype, widths: tuple[int, ...], device: torch.device) -> str:
    """Why `grouped_linear` cannot multiply rows of these numbers of elements, or "" if it can."""
    name = str(dtype).removeprefix("torch.")
    # On a GPU, torch runs other dtypes group by group and copies the sizes to the host for each product.
    if dtype != torch.bfloat16 and (device.type != "cpu" or dtype not in (torch.float32, torch.float16)):
        return f"torch has no grouped product of {name} on this device"
    wrong = next((width for width in widths if width * dtype.itemsize % ALIGNMENT), None)
    return "" if wrong is None else f"{wrong} elements of {name} are not a multiple of {ALIGNMENT} bytes"


def grouped_linear(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """x `[R, K]`, weight `[G, N, K]`, sizes integers `[G]` with sum R, on x's device -> `[R, N]`.

    ValueError if shapes do not match; `why_not` says which dtypes and widths are possible.
    """
    _check(x, weight, sizes)
    if len(weight) == 1:  # the ordinary product; a view of the only matrix
        return F.linear(x, weight.squeeze(0))
    result: Tensor = _GroupedLinear.apply(x, weight, sizes)
    return result


def grouped_linear_torch(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """The same one after another, for any dtype and width; the host waits for the sizes."""
    _check(x, weight, sizes)
    parts = x.split(sizes.tolist())
    return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, weight.unbind(), strict=True)])


def _check(x: Tensor, weight: Tensor, sizes: Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2] or sizes.shape != weight.shape[:1]:
        shapes = f"x {list(x.shape)}, weight {list(weight.shape)} and sizes {list(sizes.shape)}"
        raise ValueError(f"grouped_linear: {shapes} must be [R, K], [G, N, K] and [G]")


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
        ends = sizes.cumsum(0, dtype=torch.int32)
        ctx.save_for_backward(x, weight, sizes, ends)
        if not len(x):  # the kernels need a row
            return x.new_empty(0, weight.shape[1])
        return torch._grouped_mm(x.contiguous(), weight.transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, sizes, ends = ctx.saved_tensors
        dy = gradients[0].contiguous()
        if not len(x):
            return torch.empty_like(x), torch.zeros_like(weight), None
        dx = torch._grouped_mm(dy, weight, ends) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = torch._grouped_mm(dy.t(), x.contiguous(), ends)
            # For a group without rows, kernels of some GPUs leave what was in memory before (pytorch issue 172439).
            dweight.masked_fill_((sizes == 0).view(-1, 1, 1), 0)
        return dx, dweight, None
