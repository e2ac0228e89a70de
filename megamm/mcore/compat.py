"""Repairs of Megatron-core 0.16 and 0.19 that any device needs when Transformer Engine and apex are absent."""

import importlib
import importlib.util
from typing import Any

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils


def apply() -> None:
    """Mend the imported modules; safe to call again."""
    # 0.16.1 tests this name against None but defines it only when Transformer Engine imports.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # 0.19 has latent attention without a query latent norm its queries in Transformer Engine's fused layer, or not at
    # all: take the projection that the layer spec names, as 0.16 does.
    if importlib.util.find_spec("megatron.core.transformer.mla_qk_norm_config"):
        resolver = importlib.import_module("megatron.core.transformer.mla_qk_norm_config").QKNormConfigResolver
        resolver._mla_fused_linear_or_default = resolver._non_fused_or_default
    # 0.16.1 takes its stand-in classes for Transformer Engine and asks them for a version.
    multi_latent_attention.HAVE_TE = transformer_engine.HAVE_TE


def prime_adam(optimizer: DistributedOptimizer, step: int) -> None:
    """Give every parameter shard its Adam state (moments 0) at this step count, before tensors are loaded into it.

    Megatron's own load path shares one `step` tensor between all parameters of a torch Adam, so that the
    next update moves it once for each: here every parameter owns its own.
    """
    inner = optimizer.optimizer
    for group in inner.param_groups:
        if not isinstance(inner, torch.optim.Adam):  # fused Adams count in the group; AdamW is an Adam
            group["step"] = step
        for parameter in group["params"]:
            state: dict[str, Any] = inner.state[parameter]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter.data)
                state["exp_avg_sq"] = torch.zeros_like(parameter.data)
            if isinstance(inner, torch.optim.Adam):
                # On the parameter's device, as the fused kernel wants it.
                state["step"] = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)
