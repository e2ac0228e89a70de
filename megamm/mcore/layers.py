"""Norms and gated MLPs of the layer spec, with the run's operators (megamm/ops).

Sources: Zhang and Sennrich 2019 (RMSNorm); Shazeer 2020, "GLU Variants Improve Transformer" (SwiGLU); Ding et al. 2021,
"CogView" (sandwich norm).
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput, is_checkpointing
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

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


class ResidualNorm(RMSNorm):
    """The norm between attention and MLP, which also adds attention's output to the residual: one pass over memory.

    `join_residuals` makes Megatron's sum call it, with the residual: it returns the sum and holds the norm of the sum
    until Megatron calls it with this sum. With any other tensor, as when its result is recomputed, it is a plain norm.
    """

    held: tuple[torch.Tensor, torch.Tensor] | None = None
    """A sum and its norm."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if residual is not None:
            y, total = self.ops.add_rms_norm(x, residual, self.weight, self.eps, self.zero_centered)
            self.held = total, y
            return total
        held, self.held = self.held, None
        return held[1] if held is not None and held[0] is x else super().forward(x)


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


class AddForNorm(torch.nn.Module):
    """Replaces Megatron's sum of attention's output and the residual: the norm that follows computes it.

    output_norm: a norm of the output before the sum (sandwich norm), or None.
    """

    following: ResidualNorm

    def __init__(self, following: ResidualNorm, output_norm: RMSNorm | None) -> None:
        super().__init__()
        self.norm = output_norm
        # The layer has this norm as a submodule already: a second name would appear in checkpoints.
        self.__dict__["following"] = following

    def forward(self, *_: Any) -> Callable[..., torch.Tensor]:
        """Return the function that Megatron calls for the sum; the arguments (training, is fused) are ignored."""
        return self._add

    def _add(self, output: tuple[torch.Tensor, None], residual: torch.Tensor, _: float) -> torch.Tensor:
        """Add output `[S, B, H]` (with bias None) and residual `[S, B, H]` -> `[S, B, H]`."""
        assert output[1] is None
        x = output[0] if self.norm is None else self.norm(output[0])
        total: torch.Tensor = self.following(x, residual=residual)
        return total


def recomputing(activate: Callable[..., torch.Tensor], product: Callable[[torch.Tensor], Any], *inputs: Any) -> Any:
    """Return product(activate(*inputs)); the activation is freed, and computed again in the backward pass.

    product keeps the activation for its backward pass. It returns a tensor, or a tuple that begins with one.
    """
    # Without gradients nothing is kept; a module that is recomputed as a whole computes the activation again anyway.
    if not torch.is_grad_enabled() or is_checkpointing():
        return product(activate(*inputs))
    kept = CheckpointWithoutOutput(fp8=None)
    output = product(kept.checkpoint(activate, *inputs))
    kept.discard_output_and_register_recompute(output[0] if isinstance(output, tuple) else output)
    return output


class GatedMLP(MLP):
    """Maps `[..., hidden_size]` to the same shape, without bias; per_token_scale `[...]` float32: routing weights.

    A routed expert's weight for each token is applied inside the activation, in the same pass over memory.
    """

    ops: Ops
    recomputes_activation: bool

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        gate_up, _ = self.linear_fc1(hidden_states)
        if self.recomputes_activation:
            return recomputing(self._activation, self.linear_fc2, gate_up, per_token_scale)
        return self.linear_fc2(self._activation(gate_up, per_token_scale))

    def _activation(self, gate_up: torch.Tensor, row_weight: torch.Tensor | None) -> torch.Tensor:
        return self.ops.swiglu(gate_up, row_weight=row_weight, limit=self.config.activation_func_clamp_value)


class GatedSharedExpertMLP(SharedExpertMLP, GatedMLP):
    """The shared expert for every token: Megatron's gate around a GatedMLP."""


def is_swiglu(config: TransformerConfig) -> bool:
    """Whether the model's MLPs are what our operator computes; `model.megatron` may require another form."""
    is_gated = config.gated_linear_unit and config.activation_func is F.silu and not config.glu_linear_offset
    return is_gated and not (config.add_bias_linear or config.activation_func_fp8_input_store)


def gate(config: TransformerConfig, ops: Ops) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the activation of routed experts: gate and up `[R, 2F]`, routing weights `[R]` -> `[R, F]`."""
    limit = config.activation_func_clamp_value
    if is_swiglu(config):
        return lambda gate_up, weight: ops.swiglu(gate_up, row_weight=weight, limit=limit)

    def plain(gate_up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        result = config.activation_func(gate) * (up + config.glu_linear_offset)
        return (result * weight.unsqueeze(-1)).to(result.dtype)

    return plain


def use_ops(model: torch.nn.Module, config: TransformerConfig, ops: Ops, recomputes_activation: bool) -> bool:
    """Make the model's MLPs use these operators; return False if `model.megatron` requires another form.

    The class is changed after the model is built, because a layer spec cannot name it: Megatron's SequentialMLP builds
    each routed expert as `MLP`, and its TransformerLayer passes the tensor group only to a module that is `MLP` itself.
    Invariant: both subclasses add no parameter and no constructor, so that a built MLP is a valid instance of them.
    """
    if not is_swiglu(config):
        return False
    for module in model.modules():
        if type(module) is MLP:
            module.__class__ = GatedMLP
        elif type(module) is SharedExpertMLP:
            module.__class__ = GatedSharedExpertMLP
        if isinstance(module, GatedMLP):
            module.ops, module.recomputes_activation = ops, recomputes_activation
    return True


def join_residuals(model: torch.nn.Module, config: TransformerConfig) -> bool:
    """Join each layer's sum after attention with the norm of its MLP; return False if `model.megatron` prevents it.

    This follows the build, because a layer spec builds the sum before the norm and without access to it. It calls the
    norm as a module, so that hooks on modules, which wait for gathered weights, see the call.
    """
    if config.hidden_dropout > 0 or config.add_bias_linear:
        return False
    for layer in model.modules():
        if isinstance(layer, TransformerLayer):
            norm, add = layer.pre_mlp_layernorm, layer.self_attn_bda
            layer.self_attn_bda = AddForNorm(norm, add.norm if isinstance(add, NormThenAdd) else None)
            # Megatron records the sum's gradient even in passes without gradients; here this would keep every layer's
            # sum, which the norm's backward needs, until the end of such a pass.
            layer.bias_dropout_add_exec_handler = nullcontext
    return True
