"""The backbone: Megatron-core's GPTModel with our norm, packed attention and exact padded vocabulary.

RMSNorm, SwiGLU, grouped queries with q/k norm, RoPE, optional mixture of experts: the architecture
of Qwen3 / Qwen3-MoE (Yang et al. 2025), so that an export runs in stock engines.
"""

import logging
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megamm.config import RunConfig
from megamm.device import DTYPES, Device
from megamm.errors import UserError
from megamm.mcore import compat
from megamm.mcore.attention import PackedAttention
from megamm.mcore.groups import Groups
from megamm.mcore.norm import RMSNorm

log = logging.getLogger(__name__)


class Backbone(GPTModel):
    """GPTModel whose loss leaves the vocabulary's run-time padding out of the softmax.

    forward(input_ids `[B, S]`, None, segment `[B, S]`, labels `[B, S]`) -> loss per token `[B, S]`
    on the last stage (logits `[B, S, V/tp]` without labels), hidden states `[S, B, H]` before it.
    """

    def __init__(self, *args: Any, true_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.true_vocab_size = true_vocab_size

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Cross entropy over the true vocabulary; logits `[S, B, V/tp]`, labels `[B, S]`."""
        local = logits.shape[-1]
        start = self.pg_collection.tp.rank() * local
        padding_from = self.true_vocab_size - start
        if padding_from < local:
            is_padding = torch.arange(local, device=logits.device) >= padding_from
            logits = logits.masked_fill(is_padding, torch.finfo(logits.dtype).min)
        # IGNORE_LABEL has loss weight 0; any valid id keeps the cross entropy defined.
        return super().compute_language_model_loss(labels.clamp(min=0), logits)


def transformer_config(config: RunConfig) -> TransformerConfig:
    """Our backbone fields and the passed-through `model.megatron` as Megatron's TransformerConfig."""
    m, p, dtype = config.model, config.parallel, DTYPES[config.train.precision]
    fields: dict[str, Any] = dict(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups,
        kv_channels=m.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=m.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=m.init_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=p.tensor,
        pipeline_model_parallel_size=p.pipeline,
        context_parallel_size=p.context,
        expert_model_parallel_size=p.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=p.sequence,
        # Fusions that need apex or Transformer Engine are off: the numbers are the same on every device.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )
    fields |= _moe_fields(config) | _recompute_fields(config)
    unknown = sorted(set(m.megatron) - set(TransformerConfig.__dataclass_fields__))
    if unknown:
        raise UserError(
            f"model.megatron.{unknown[0]} is not a TransformerConfig field", remedy="check its spelling and version"
        )
    return TransformerConfig(**(fields | m.megatron))


def _moe_fields(config: RunConfig) -> dict[str, Any]:
    moe = config.model.moe
    if moe.num_experts == 0:
        return {}
    return dict(
        num_moe_experts=moe.num_experts,
        moe_router_topk=moe.top_k,
        moe_ffn_hidden_size=moe.ffn_hidden_size,
        moe_router_load_balancing_type="aux_loss" if moe.aux_loss_coeff else "none",
        moe_aux_loss_coeff=moe.aux_loss_coeff,
        moe_token_dispatcher_type=moe.dispatcher,
        moe_grouped_gemm=False,
    )


def _recompute_fields(config: RunConfig) -> dict[str, Any]:
    if config.train.recompute == "none":
        return {}
    if config.train.recompute == "selective":
        return dict(recompute_granularity="selective")
    return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def block_spec(config: TransformerConfig, rope_base: float) -> TransformerBlockSubmodules:
    """Megatron's local layer spec with our norm and core attention, for this stage's layers."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm"
    )
    attention = layer.submodules.self_attention
    attention_parts = replace(
        attention.submodules,
        core_attention=partial(PackedAttention, rope_base=rope_base),
        q_layernorm=RMSNorm,
        k_layernorm=RMSNorm,
    )
    layer_parts = replace(
        layer.submodules,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=replace(attention, submodules=attention_parts),
    )
    spec = replace(layer, submodules=layer_parts)
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=RMSNorm)


def build(config: RunConfig, vocabulary_size: int, groups: Groups, device: Device) -> DistributedDataParallel:
    """This rank's part of the model on the device, wrapped for data parallel training."""
    compat.apply()
    if groups.rank == 0:
        log.info("attention: torch's scaled_dot_product_attention with a document mask, the one implementation so far")
    megatron_config = transformer_config(config)
    padded = -(-vocabulary_size // config.parallel.tensor) * config.parallel.tensor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("megatron.core").setLevel(logging.ERROR)
        model = Backbone(
            config=megatron_config,
            transformer_layer_spec=block_spec(megatron_config, config.model.rope_base),
            vocab_size=padded,
            true_vocab_size=vocabulary_size,
            max_sequence_length=config.data.seq_length,
            pre_process=groups.pipeline_rank == 0,
            post_process=groups.is_last_stage,
            parallel_output=True,
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            position_embedding_type="none",  # PackedAttention turns queries and keys
            pg_collection=groups.collection,
        ).to(device.torch_device)
        if megatron_config.bf16:
            model = model.bfloat16()
        return DistributedDataParallel(
            config=megatron_config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=device.is_gpu,
                overlap_param_gather=False,
                check_for_nan_in_grad=False,
            ),
            module=model,
            pg_collection=groups.collection,
        )
