"""Norms and gated MLPs of the layer spec, with the run's operators (megamm/ops).

Sources: Zhang and Sennrich 2019 (RMSNorm); Shazeer 2020, "GLU Variants Improve Transformer" (SwiGLU); Ding et al. 2021,
"CogView" (sandwich norm).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megamm.ops import Ops


class RMSNorm(torch.nn.Module):
    """Maps `[..., hidden_size]` to the same shape; statistics are in float32.

    Megatron's torch norm does not support sequence parallelism. It needs the attribute `sequence_parallel` on the
    weight: Megatron then sums its gradient over the tensor parallel ranks, each of which has seen a part of the row.
    Without the attribute gradient norms would be wrong without any error.
    """

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
    """Replaces Megatron's sum of a sub-layer's output and the residual: it normalises the output first."""

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


class GatedMLP(MLP):
    """Maps `[..., hidden_size]` to the same shape, without bias; per_token_scale `[...]` float32: routing weights.

    A routed expert's weight for each token is applied inside the activation, in the same pass over memory.
    """

    ops: Ops

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        gate_up, _ = self.linear_fc1(hidden_states)
        limit = self.config.activation_func_clamp_value
        return self.linear_fc2(self.ops.swiglu(gate_up, row_weight=per_token_scale, limit=limit))


class GatedSharedExpertMLP(SharedExpertMLP, GatedMLP):
    """The shared expert for every token: Megatron's gate around a GatedMLP."""


def use_ops(model: torch.nn.Module, config: TransformerConfig, ops: Ops) -> bool:
    """Make the model's MLPs use these operators; return False if `model.megatron` requires another form.

    The class is changed after the model is built, because a layer spec cannot name it: Megatron's SequentialMLP builds
    each routed expert as `MLP`, and its TransformerLayer passes the tensor group only to a module that is `MLP` itself.
    Invariant: both subclasses add no parameter and no constructor, so that a built MLP is a valid instance of them.
    """
    is_swiglu = config.gated_linear_unit and config.activation_func is F.silu and not config.glu_linear_offset
    if not is_swiglu or config.add_bias_linear or config.activation_func_fp8_input_store:
        return False
    for module in model.modules():
        if type(module) is MLP:
            module.__class__ = GatedMLP
        elif type(module) is SharedExpertMLP:
            module.__class__ = GatedSharedExpertMLP
        if isinstance(module, GatedMLP):
            module.ops = ops
    return True
