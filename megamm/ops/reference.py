"""The ops in plain torch: what the compiled ones are checked against, and what serves where those are not built.

Signatures, shapes and meaning are those of the functions of the same name in megamm/ops.
"""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, zero_centered: bool = False) -> Tensor:
    return F.rms_norm(x, weight.shape, weight + 1 if zero_centered else weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps, zero_centered), total
