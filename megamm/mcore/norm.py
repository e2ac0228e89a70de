"""RMSNorm for the layer spec, with the run's operators (megamm/ops/rms_norm.py).

Megatron's torch norm does not support sequence parallelism. Sequence parallelism needs the attribute
`sequence_parallel` on the weight: Megatron then sums its gradient over the tensor parallel ranks, each of which has
seen a part of the row. Without the attribute gradient norms would be wrong without any error.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megamm.ops import Ops


class RMSNorm(torch.nn.Module):
    """Maps `[..., hidden_size]` to the same shape; statistics are in float32."""

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
    """Replaces Megatron's sum of a sub-layer's output and the residual: it normalises the output first.

    Source: Ding et al. 2021, "CogView" (sandwich norm).
    """

    def __init__(self, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.norm = RMSNorm(config, config.hidden_size, ops, config.layernorm_epsilon)

    def forward(self, *_: Any) -> Callable[..., torch.Tensor]:
        """Return the function that Megatron calls for the sum; the arguments (training, is fused) are ignored."""
        return self._add

    def _add(self, output: tuple[torch.Tensor, None], residual: torch.Tensor, _: float) -> torch.Tensor:
        """Add output `[S, B, H]` (with bias None) and residual `[S, B, H]` -> `[S, B, H]`."""
        assert output[1] is None
        return residual + self.norm(output[0])
