"""RMSNorm for the layer spec, on the run's operators (megamm/ops/rms_norm.py).

Megatron's torch norm refuses sequence parallel. What that needs is the `sequence_parallel` mark on the
weight: Megatron then sums its gradient over tensor parallel ranks, each of which saw a part of the
row. Without the mark gradient norms are silently wrong.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megamm.ops import Ops


class RMSNorm(torch.nn.Module):
    """`[..., hidden_size]` -> the same shape; statistics in float32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, ops: Ops, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.ops = ops
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)
