"""The backbone: Megatron-core's GPTModel with our norm, packed attention, exact losses and fused operators.

It has RMSNorm, SwiGLU, grouped-query attention with or without q/k norm (or latent attention), RoPE, and optionally
mixture of experts, multi-token prediction, sliding windows, and Gemma's variants. Its architectures match Llama, Qwen,
Gemma and DeepSeek models, so that an export runs in standard inference engines. Sources: DeepSeek-AI 2024, DeepSeek-V3
(latent attention, multi-token prediction); Gemma Team 2024, Gemma 2.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megamm import ops
from megamm.common.device import Device
from megamm.common.errors import UserError
from megamm.common.sample import IGNORE_LABEL
from megamm.config import RunConfig, accelerators
from megamm.mcore import compat, experts, fp8_linear, layers, weight_gradients
from megamm.mcore.attention import Attend, PackedAttention, ScoreForm, attend_by
from megamm.mcore.layers import NormThenAdd, ResidualNorm, RMSNorm
from megamm.mcore.process_groups import ProcessGroups
from megamm.mcore.transformer_config import transformer_config
from megamm.model import attention_kernel
from megamm.model.layout import padded_vocabulary
from megamm.model.rope import Rope
from megamm.ops.proof import AGAIN, UNPROVEN, Proven

log = logging.getLogger(__name__)


class Backbone(GPTModel):
    """GPTModel with the run's loss over all prediction depths; the loss excludes the vocabulary's run-time padding.

    forward(input_ids `[B, S/cp]`, None, packed_seq_metadata `[B, 5, S]`, labels `[1 + K, B, S/cp]`, loss_mask float32
    of labels' shape) returns, on the last stage, the sum over all tokens of loss_mask * cross entropy, and the detached
    cross entropy of each token `[1 + K, B, S/cp]`: of the next token, then of K = mtp.num_layers tokens further ahead.
    Without labels it returns logits `[B, S/cp, V/tp]`; before the last stage hidden states `[S/cp, B, H]`.
    """

    def __init__(
        self,
        *args: Any,
        true_vocab_size: int,
        cross_entropy: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        logit_softcap: float = 0.0,
        embedding_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """cross_entropy: the `linear_cross_entropy` of an implementation (megamm/ops); it also applies the cap."""
        super().__init__(*args, **kwargs)
        self.true_vocab_size, self.cross_entropy, self.logit_softcap = true_vocab_size, cross_entropy, logit_softcap
        self.before_use: Callable[[torch.Tensor], None] = lambda weight: None
        """Called with a weight that is used without its module, which would wait until it is gathered (`wrap`)."""
        self.embedding_scale = embedding_scale
        if embedding_scale != 1.0 and hasattr(self, "embedding"):
            self.embedding.register_forward_hook(lambda _, __, output: self.scaled(output))

    def scaled(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Multiply by the scale, rounded to the weights' precision first, as in the models that use a scale."""
        return embeddings * torch.tensor(self.embedding_scale, dtype=embeddings.dtype).item()

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor,
        attention_mask: torch.Tensor,
        mtp_in_postprocess: bool,
        **_: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Compute loss or logits; Megatron's own averages a depth's loss per microbatch and across documents."""
        if mtp_in_postprocess:
            # position_ids are rolled too but have no effect: attention computes positions itself.
            hidden_states = self.mtp(
                input_ids=input_ids,
                position_ids=input_ids,
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                embedding=self.embedding,
            )
        if not self.post_process:
            return hidden_states
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if labels is None:
            depths = hidden_states.chunk(1 + (self.config.mtp_num_layers or 0), dim=0)
            logits = self.output_layer(depths[0], weight=tied)[0].transpose(0, 1).contiguous()
            cap = self.logit_softcap
            return cap * torch.tanh(logits / cap) if cap else logits
        return self._loss(hidden_states, self.output_layer.weight if tied is None else tied, labels, loss_mask)

    def _loss(
        self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `forward`'s result; hidden `[(1 + K) * S, B, H]`, with S / tp tokens under sequence parallelism."""
        self.before_use(weight)
        group, parts = self.pg_collection.tp, 1
        # As the output layer does before its product: every rank's gradient is a part of hidden's gradient.
        if self.output_layer.sequence_parallel:
            hidden, parts = gather_from_sequence_parallel_region(hidden, group=group), group.size()
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        depths, rows, length = labels.shape

        def as_hidden(values_KBS: torch.Tensor) -> torch.Tensor:
            """Reorder to hidden's token order, in which a rank's tokens of all depths are contiguous."""
            return values_KBS.view(depths, rows, parts, length // parts).permute(2, 0, 3, 1).flatten()

        loss, token_loss = self.cross_entropy(
            hidden.flatten(0, 1),
            weight,
            as_hidden(labels),
            as_hidden(factor),
            vocabulary_size=self.true_vocab_size,
            ignore_index=IGNORE_LABEL,
            group=group,
        )
        by_part = token_loss.view(parts, depths, length // parts, rows)
        return loss, by_part.permute(1, 3, 0, 2).reshape(labels.shape)


def layer_spec(
    config: TransformerConfig, attention: dict[str, Any], norm: ModuleSpec, sandwich: bool, dense: bool
) -> ModuleSpec:
    """Return Megatron's local layer spec with our norm and core attention, which gets these additional arguments.

    sandwich: with norms after attention and MLP; dense: without experts, even if the model has them.
    """
    latent = config.multi_latent_attention
    layer = get_gpt_layer_local_spec(
        num_experts=None if dense else config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=latent or config.qk_layernorm,
        multi_latent_attention=latent,
        normalization="RMSNorm",
    )
    own = layer.submodules.self_attention
    core = ModuleSpec(PackedAttention, attention)
    norms = {}
    if latent:
        norms = {"kv_layernorm": norm, "q_layernorm": IdentityOp if config.q_lora_rank is None else norm}
    elif config.qk_layernorm:
        norms = {"k_layernorm": norm, "q_layernorm": norm}
    parts = replace(
        layer.submodules,
        input_layernorm=norm,
        pre_mlp_layernorm=replace(norm, module=ResidualNorm),
        self_attention=replace(own, submodules=replace(own.submodules, core_attention=core, **norms)),
    )
    if sandwich:
        add = ModuleSpec(NormThenAdd, {"config": config} | norm.params)
        parts = replace(parts, self_attn_bda=add, mlp_bda=add)
    return replace(layer, submodules=parts)


def _mtp_spec(config: TransformerConfig, layer: ModuleSpec, norm: ModuleSpec, vp_stage: int | None) -> Any:
    """Return the spec of this chunk's multi-token-prediction modules, None if it has none."""
    if not config.mtp_num_layers:
        return None
    block = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False, vp_stage=vp_stage)
    if block is None:
        return None
    modules = [
        replace(spec, submodules=replace(spec.submodules, enorm=norm, hnorm=norm, layer_norm=norm))
        for spec in block.layer_specs
    ]
    return replace(block, layer_specs=modules)


@dataclass(frozen=True)
class _Plan:
    """The run's choices for its chunks, and why they were made."""

    megatron_config: TransformerConfig
    ops: ops.Ops
    attend: Attend
    cross_entropy: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    reasons: list[str]
    """One line for the log of each choice."""


def build_chunks(
    config: RunConfig, vocabulary_size: int, groups: ProcessGroups, device: Device, proven: Proven = UNPROVEN
) -> list[Backbone]:
    """Build this rank's pipeline chunks (one unless interleaved) on the device, in the run's precision.

    proven: what is known of the kernels, the same on all ranks (kernel_proofs.py).
    """
    compat.apply()
    plan = _plan(config, vocabulary_size, device, proven)
    norm = ModuleSpec(RMSNorm, {"ops": plan.ops})
    specs = [_spec_of(config, number, plan, norm) for number in range(config.model.num_layers)]
    chunks = []
    for chunk in range(config.parallel.virtual_pipeline):
        model = _build_chunk(config, vocabulary_size, plan, specs, norm, groups, chunk).to(device.torch_device)
        chunks.append(model.bfloat16() if plan.megatron_config.bf16 else model)
    if config.train.precision == "fp8":
        for model in chunks:
            fp8_linear.use_fp8(model, config)
    recomputed = [] if isinstance(config.train.recompute, str) else config.train.recompute.modules
    is_fused = [
        layers.use_ops(chunk, plan.megatron_config, plan.ops, recomputes_activation="activation" in recomputed)
        for chunk in chunks
    ]
    if config.model.moe.num_experts:
        plan.reasons.append(_use_experts(config, chunks, plan, groups, device, "activation" in recomputed, proven))
    # Megatron recomputes a norm as a function of its input, so such a norm cannot also compute the sum before it.
    is_joined = ["norms" not in recomputed and layers.join_residuals(chunk, plan.megatron_config) for chunk in chunks]
    if config.parallel.expert == 1 and config.parallel.expert_tensor != config.parallel.tensor:
        _reduce_experts_apart(chunks)
    if groups.rank == 0:
        for reason in plan.reasons:
            log.info(reason)
        if not all(is_fused):
            log.info("using Megatron-core's MLP: fused SwiGLU needs no bias and no fp8")
        if not all(is_joined):
            log.info(
                "residual: added apart from the norm; joining them needs no bias, no dropout and no recomputed norms"
            )
    return chunks


def _use_experts(
    config: RunConfig,
    chunks: list[Backbone],
    plan: _Plan,
    groups: ProcessGroups,
    device: Device,
    recomputes_activation: bool,
    proven: Proven,
) -> str:
    """Give the chunks the run's form of experts; return the line for the log. UserError if it is not possible."""
    form, why = experts.choose(config, plan.megatron_config, device, proven)
    if form == "grouped":
        activate = layers.gate(plan.megatron_config, plan.ops)
        one_by_one = [experts.use_grouped(chunk, groups, activate, recomputes_activation, proven) for chunk in chunks]
        why = "one product for all experts of a rank"
        if any(one_by_one):
            why = f"one product after another: {max(one_by_one)}"
    return f"experts: {form}, {why}"


def _plan(config: RunConfig, vocabulary_size: int, device: Device, proven: Proven) -> _Plan:
    """Choose kernels and operators for the device. UserError if it cannot run what the config requires."""
    found = accelerators.installed()
    kernel, why_kernel = attention_kernel.choose(config, device, found, proven)
    attend = attend_by(kernel, device, found)
    chosen, why_ops = ops.choose(config.ops, device.torch_device, proven)
    reasons = [f"attention: {kernel}, {why_kernel}", f"ops: {chosen.name}, {why_ops}"]
    for op in ops.OPS:
        of_op = "csrc" if getattr(chosen, op) is ops.OPS[op].csrc else "torch"
        _, agreement = proven.choose(op, [of_op])
        if agreement:
            reasons.append(f"{op}: {of_op}, {agreement}")
    if config.train.precision == "fp8":
        reasons.append(_fp8_reason(config, device, proven))
    accumulated, why_accumulated = weight_gradients.choose(config, device, proven)
    if accumulated == "torch":
        weight_gradients.use_own()
    reasons.append(f"weight gradients: {why_accumulated}")
    cross_entropy, cap = chosen.linear_cross_entropy, config.model.logit_softcap
    if cap:  # the memory-saving implementation, which never holds all logits, does not support a cap
        cross_entropy = partial(ops.TORCH.linear_cross_entropy, softcap=cap)
        reasons.append(f"cross entropy: torch, because model.logit_softcap = {cap} needs all logits at once")
    return _Plan(transformer_config(config, vocabulary_size, device, proven), chosen, attend, cross_entropy, reasons)


def _fp8_reason(config: RunConfig, device: Device, proven: Proven) -> str:
    """Return the line for the log. UserError if the device has no products in FP8, or they are wrong."""
    if device.why_no_fp8:
        raise UserError(
            f"train.precision=fp8: {device.why_no_fp8}", remedy="set train.precision=bf16", on_all_ranks=True
        )
    if problem := proven.problem("fp8", "torch"):
        what = f"train.precision=fp8: torch's products disagree with plain torch on {device.name}: {problem}"
        raise UserError(what, remedy=f"set train.precision=bf16; {AGAIN}", on_all_ranks=True)
    settings = config.train.fp8
    kept = f"not of the first {settings.first_layers_bf16} and last {settings.last_layers_bf16} layers"
    emulated = "" if device.is_gpu else "; a CPU emulates it, which is slow"
    return f"fp8: {settings.recipe} scales, {kept}{emulated}"


def _build_chunk(
    config: RunConfig,
    vocabulary_size: int,
    plan: _Plan,
    specs: list[ModuleSpec],
    norm: ModuleSpec,
    groups: ProcessGroups,
    chunk: int,
) -> Backbone:
    """Build one chunk from the specs of all the model's layers, in float32."""
    megatron_config, last = plan.megatron_config, config.parallel.virtual_pipeline - 1
    stage = chunk if last > 0 else None  # Megatron's number of a chunk, None without interleaving
    first = get_transformer_layer_offset(megatron_config, stage, groups.pipeline_rank)
    own_specs = specs[first : first + get_num_layers_to_build(megatron_config, stage, groups.pipeline_rank)]
    with warnings.catch_warnings():
        # Megatron warns of every fusion that it would get from Transformer Engine; the log names what is used.
        warnings.simplefilter("ignore")
        logging.getLogger("megatron.core").setLevel(logging.ERROR)
        return Backbone(
            config=megatron_config,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=own_specs, layer_norm=norm),
            mtp_block_spec=_mtp_spec(megatron_config, specs[-1], norm, stage),
            vocab_size=padded_vocabulary(vocabulary_size, config.parallel.tensor),
            true_vocab_size=vocabulary_size,
            cross_entropy=plan.cross_entropy,
            logit_softcap=config.model.logit_softcap,
            embedding_scale=config.model.hidden_size**0.5 if config.model.scale_embeddings else 1.0,
            max_sequence_length=config.data.seq_length,
            pre_process=groups.pipeline_rank == 0 and chunk == 0,
            post_process=groups.is_last_stage and chunk == last,
            parallel_output=True,
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            position_embedding_type="none",  # PackedAttention applies RoPE
            pg_collection=groups.collection,
            vp_stage=stage,
        )


def _spec_of(config: RunConfig, number: int, plan: _Plan, norm: ModuleSpec) -> ModuleSpec:
    """Return the spec of one layer; `number` counts the model's layers from 0."""
    m, window = config.model, config.model.window
    has_window = window.size > 0 and number not in window.full_layers
    rope = Rope(m.rope_base, m.rope_axes, m.rope_scaling)
    if has_window and window.rope_base:
        rope = Rope(window.rope_base, m.rope_axes)
    scale = m.query_pre_attn_scalar**-0.5 if m.query_pre_attn_scalar else 0.0
    attention = dict(
        ops=plan.ops,
        rope=None if m.mla.kv_lora_rank else rope,
        exchange=config.parallel.cp_comm_type,
        attend=plan.attend,
        form=ScoreForm(scale, m.attention_softcap, window.size if has_window else 0, bool(config.spans)),
    )
    return layer_spec(plan.megatron_config, attention, norm, m.sandwich_norm, dense=number < m.moe.dense_layers)


def _reduce_experts_apart(chunks: list[Backbone]) -> None:
    """Sum gradients of experts over the experts' own data-parallel group, which differs from the dense one.

    Megatron does this itself only if parallel.expert > 1; otherwise it omits the sum over tensor ranks.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:
                parameter.allreduce = False


def wrap(
    chunks: list[Backbone], groups: ProcessGroups, device: Device, gathers_ahead: bool = False
) -> list[DistributedDataParallel]:
    """Wrap the chunks with gradient buffers that are reduced over data and context parallel ranks.

    gathers_ahead: an update returns while its parameters are being gathered (optimizer.py), and each module waits for
    its own before it runs.
    """
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=device.is_gpu,
        overlap_param_gather=gathers_ahead,
        align_param_gather=gathers_ahead,  # a module that waits does not start the next gather: all have started
        check_for_nan_in_grad=False,
    )
    wrapped = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=settings,
            module=chunk,
            pg_collection=groups.collection,
            # Gradients of later chunks come first, when there is nothing to overlap their reduction with.
            disable_bucketing=i > 0,
        )
        for i, chunk in enumerate(chunks)
    ]
    if gathers_ahead:
        for chunk, parallel in zip(chunks, wrapped, strict=True):
            chunk.before_use = partial(_finish_gather, parallel)
    return wrapped


def _finish_gather(parallel: DistributedDataParallel, weight: torch.Tensor) -> None:
    parallel.param_to_bucket_group[weight].finish_param_sync(skip_next_bucket_dispatch=True)
