"""Fixes for Megatron-core 0.16 and 0.19 without Transformer Engine and apex, needed on every device."""

import importlib
import importlib.util
from typing import Any

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils


def apply() -> None:
    """Patch the imported modules; safe to call again."""
    # 0.16.1 tests this name against None but defines it only when Transformer Engine imports.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # In 0.19, latent attention without a query latent normalises its queries in Transformer Engine's fused layer, or
    # not at all: use the projection of the layer spec, as 0.16 does.
    if importlib.util.find_spec("megatron.core.transformer.mla_qk_norm_config"):
        resolver = importlib.import_module("megatron.core.transformer.mla_qk_norm_config").QKNormConfigResolver
        resolver._mla_fused_linear_or_default = resolver._non_fused_or_default
    # 0.16.1 mistakes its placeholder classes for Transformer Engine and queries their version.
    multi_latent_attention.HAVE_TE = transformer_engine.HAVE_TE


def prime_adam(optimizer: DistributedOptimizer, step: int) -> None:
    """Create the Adam state (moments 0) of every parameter shard at this step count, before tensors are loaded into it.

    Megatron's own load path shares one `step` tensor between all parameters of a torch Adam, so that the next update
    increments it once per parameter. Here every parameter has its own.
    """
    inner = optimizer.optimizer
    for group in inner.param_groups:
        if not isinstance(inner, torch.optim.Adam):  # other fused Adams count steps in the group; AdamW is an Adam
            group["step"] = step
        for parameter in group["params"]:
            state: dict[str, Any] = inner.state[parameter]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter.data)
                state["exp_avg_sq"] = torch.zeros_like(parameter.data)
            if isinstance(inner, torch.optim.Adam):
                # On the parameter's device, as the fused kernel requires.
                state["step"] = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)
