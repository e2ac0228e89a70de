"""RMSNorm for the layer spec: y = x / sqrt(mean(x^2) + eps) * weight over the last axis.

Megatron's torch norm refuses sequence parallel. What that needs is the `sequence_parallel` mark on the
weight: Megatron then sums its gradient over tensor parallel ranks, each of which saw a part of the
row. Without the mark gradient norms are silently wrong.
Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """`[..., hidden_size]` -> the same shape; statistics in float32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
