"""RMSNorm for the layer spec, on the run's operators (megamm/ops/rms_norm.py).

Megatron's torch norm refuses sequence parallel. What that needs is the `sequence_parallel` mark on the
weight: Megatron then sums its gradient over tensor parallel ranks, each of which saw a part of the
row. Without the mark gradient norms are silently wrong.
"""

from collections.abc import Callable
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
        self.zero_centered = config.layernorm_zero_centered_gamma
        neutral = 0.0 if self.zero_centered else 1.0
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), neutral, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps, self.zero_centered)


class NormThenAdd(torch.nn.Module):
    """In the place of Megatron's sum of a part's output and the residual: the output is normalised first.

    Source: Ding et al. 2021, "CogView" (sandwich norm).
    """

    def __init__(self, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.norm = RMSNorm(config, config.hidden_size, ops, config.layernorm_epsilon)

    def forward(self, *_: Any) -> Callable[..., torch.Tensor]:
        """(training, is fused) -> the sum, as Megatron asks for it."""
        return self._add

    def _add(self, output: tuple[torch.Tensor, None], residual: torch.Tensor, _: float) -> torch.Tensor:
        """output `[S, B, H]` and its bias, residual `[S, B, H]` -> `[S, B, H]`."""
        assert output[1] is None
        return residual + self.norm(output[0])
