"""Translates the model, layout and precision config into Megatron's TransformerConfig; `model.megatron` adds fields."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megamm.common.device import DTYPES, Device
from megamm.common.errors import UserError
from megamm.config import RunConfig
from megamm.mcore import weight_gradients
from megamm.model.layout import layers_per_chunk
from megamm.ops.proof import UNPROVEN, Proven


def transformer_config(
    config: RunConfig, vocabulary_size: int, device: Device, proven: Proven = UNPROVEN
) -> TransformerConfig:
    """Build the config. UserError for a field in `model.megatron` that this version or machine lacks or rejects."""
    fields = _model_fields(config) | _parallel_fields(config, vocabulary_size) | _fusion_fields(config, device, proven)
    fields |= _moe_fields(config) | _latent_fields(config) | _recompute_fields(config)
    kind = MLATransformerConfig if config.model.mla.kv_lora_rank else TransformerConfig
    unknown = sorted(set(config.model.megatron) - set(kind.__dataclass_fields__))
    if unknown:
        raise UserError(
            f"model.megatron.{unknown[0]} is not a {kind.__name__} field", remedy="check its spelling and version"
        )
    try:
        return kind(**(fields | config.model.megatron))
    except (ValueError, AssertionError, TypeError) as error:
        if not config.model.megatron:
            raise
        raise UserError(f"Megatron-core rejects model.megatron: {error}", remedy="change those fields") from None


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in the tanh approximation of Hendrycks and Gimpel 2016."""
    return F.gelu(x, approximate="tanh")


def _model_fields(config: RunConfig) -> dict[str, Any]:
    m, dtype = config.model, DTYPES[config.train.precision]
    return dict(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups,
        kv_channels=m.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=m.norm_eps,
        layernorm_zero_centered_gamma=m.zero_centered_norm,
        gated_linear_unit=True,
        activation_func=F.silu if m.activation == "silu" else gelu_tanh,
        add_bias_linear=False,
        qk_layernorm=m.qk_norm or m.mla.kv_lora_rank > 0,
        add_qkv_bias=m.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=m.init_std,
        mtp_num_layers=m.mtp.num_layers or None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # The layers are Megatron's own, not Transformer Engine's: 0.19 needs to know which to use.
        transformer_impl="local",
    )


def _fusion_fields(config: RunConfig, device: Device, proven: Proven) -> dict[str, Any]:
    """Return the fusion fields: products add weight gradients to their float32 buffer where they can.

    UserError if the config requires this but it cannot run. Other fusions are for parts that we replace, or off, so
    that numbers are the same on every device.
    """
    how, _ = weight_gradients.choose(config, device, proven)
    off = ("masked_softmax_fusion", "bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion")
    return {weight_gradients.SWITCH: how != "separate"} | dict.fromkeys(off, False)


def _parallel_fields(config: RunConfig, vocabulary_size: int) -> dict[str, Any]:
    p = config.parallel
    fields: dict[str, Any] = dict(
        tensor_model_parallel_size=p.tensor,
        sequence_parallel=p.sequence,
        pipeline_model_parallel_size=p.pipeline,
        context_parallel_size=p.context,
        expert_model_parallel_size=p.expert,
        expert_tensor_parallel_size=p.expert_tensor,
    )
    if p.pipeline > 1:
        chunks = [["decoder"] * layers for layers in layers_per_chunk(config, vocabulary_size)]
        chunks[0].insert(0, "embedding")
        chunks[-1] += ["mtp"] * config.model.mtp.num_layers + ["loss"]
        fields["pipeline_model_parallel_layout"] = chunks
    if p.virtual_pipeline > 1:
        # The interleaved schedule overlaps sends with compute, which batched point-to-point calls do not allow.
        fields |= dict(overlap_p2p_comm=True, batch_p2p_comm=False)
        fields["virtual_pipeline_model_parallel_size"] = p.virtual_pipeline
    return fields


def _moe_fields(config: RunConfig) -> dict[str, Any]:
    moe, layers = config.model.moe, config.model.num_layers
    if moe.num_experts == 0:
        return {}
    fields: dict[str, Any] = {}
    if moe.dense_layers:
        fields["moe_layer_freq"] = [0] * moe.dense_layers + [1] * (layers - moe.dense_layers)
    if moe.num_groups > 1:
        fields |= dict(moe_router_num_groups=moe.num_groups, moe_router_group_topk=moe.group_top_k)
    return fields | dict(
        num_moe_experts=moe.num_experts,
        moe_router_topk=moe.top_k,
        moe_ffn_hidden_size=moe.ffn_hidden_size,
        moe_shared_expert_intermediate_size=moe.shared_ffn_hidden_size or None,
        moe_router_score_function=moe.score,
        moe_router_pre_softmax=moe.score == "softmax" and not moe.norm_top_k,
        moe_router_topk_scaling_factor=None if moe.routed_scaling_factor == 1.0 else moe.routed_scaling_factor,
        moe_router_load_balancing_type="aux_loss" if moe.aux_loss_coeff else "none",
        moe_aux_loss_coeff=moe.aux_loss_coeff,
        moe_router_enable_expert_bias=moe.bias_update_rate > 0,
        moe_router_bias_update_rate=moe.bias_update_rate,
        moe_token_dispatcher_type=moe.dispatcher,
        moe_grouped_gemm=False,
    )


def _latent_fields(config: RunConfig) -> dict[str, Any]:
    mla, scaling = config.model.mla, config.model.rope_scaling
    if mla.kv_lora_rank == 0:
        return {}
    turned = dict(rope_type="rope", rotary_scaling_factor=1.0)  # another factor would scale the softmax as YaRN does
    if scaling.kind == "yarn":
        turned = dict(
            rope_type="yarn",
            rotary_scaling_factor=scaling.factor,
            original_max_position_embeddings=scaling.original_length,
            beta_fast=scaling.beta_fast,
            beta_slow=scaling.beta_slow,
            mscale=scaling.mscale,
            mscale_all_dim=scaling.mscale_all_dim,
        )
    return turned | dict(
        multi_latent_attention=True,
        q_lora_rank=mla.q_lora_rank or None,
        kv_lora_rank=mla.kv_lora_rank,
        qk_head_dim=mla.qk_head_dim,
        qk_pos_emb_head_dim=mla.qk_rope_head_dim,
        v_head_dim=mla.v_head_dim,
        rotary_base=config.model.rope_base,
    )


def _recompute_fields(config: RunConfig) -> dict[str, Any]:
    recompute = config.train.recompute
    if recompute == "none":
        return {}
    if recompute == "full":
        return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    # The activation is recomputed by our own MLP (layers.py).
    names = {"norms": "layernorm", "mlp": "mlp", "moe": "moe"}
    modules = [names[module] for module in recompute.modules if module in names]
    return dict(recompute_granularity="selective", recompute_modules=modules)
