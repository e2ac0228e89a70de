"""Fixes for Megatron-core 0.16 and 0.19 without Transformer Engine and apex, needed on every device."""

import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core import utils
from megatron.core.extensions import transformer_engine
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import random
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
    # A recomputed norm asks Transformer Engine for its FP8 state, although these layers have none.
    if not transformer_engine.HAVE_TE:
        random.FP8GlobalStateManager = _NoFp8
        random.activation_recompute_forward = random.fp8_autocast = _nothing
    # Its replacements for apex's kernels make the host wait for the norm of each parameter, and scale one at a time.
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm
    if clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _scale


class _NoFp8:
    """Transformer Engine's FP8GlobalStateManager where FP8 is off."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _nothing(**_: Any) -> AbstractContextManager[None]:
    return nullcontext()


def _l2_norm(
    chunk_size: int, overflow: torch.Tensor, lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Return the norm of all tensors, float32 `[1]`, as apex's amp_C.multi_tensor_l2norm."""
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(lists[0])])
    return torch.linalg.vector_norm(norms).view(1), None


def _scale(chunk_size: int, overflow: torch.Tensor, lists: list[list[torch.Tensor]], factor: float) -> None:
    """Write the first list's tensors times the factor to the second list's, as apex's amp_C.multi_tensor_scale."""
    source, target = lists
    if source is not target:
        torch._foreach_copy_(target, source)
    torch._foreach_mul_(target, factor)


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
