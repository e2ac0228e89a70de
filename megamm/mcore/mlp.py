"""Gated MLPs (dense, routed and shared experts) with the run's SwiGLU operator (megamm/ops/swiglu.py).

A routed expert's weight for each token is applied inside the activation, in the same pass over memory. The layer specs
of Megatron-core's versions name their MLPs differently but build the same modules, so the modules are replaced after
they are built. Source: Shazeer 2020, "GLU Variants Improve Transformer".
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megamm.ops import Ops


class GatedMLP(MLP):
    """Maps `[..., hidden_size]` to the same shape, without bias; per_token_scale `[...]` float32: routing weights."""

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
    """Make the model's MLPs use these operators; return False if `model.megatron` requires another form."""
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
