"""Validates the layout of a run before any process starts, and splits layers over the pipeline.

`check` raises a UserError that names the keys and the remedy. For a composition that passes, the numbers are proven
to match one rank (docs/parallelism.md).
"""

from megamm.common.errors import UserError
from megamm.config import ModelConfig, MoEConfig, RunConfig
from megamm.model import attention_limits, flops

FP8_MULTIPLE = 16
"""The axes of an FP8 product on a GPU are multiples of this; numbers of tokens are rounded up to it."""


def check(config: RunConfig, world_size: int) -> None:
    """Raise UserError if the config cannot run on world_size ranks."""
    m, p, t = config.model, config.parallel, config.train
    product = p.tensor * p.pipeline * p.context
    _divisible("world size", world_size, "tensor x pipeline x context", product, "start a multiple of that many ranks")
    _divisible("model.num_attention_heads", m.num_attention_heads, "parallel.tensor", p.tensor)
    if p.tensor % m.num_query_groups:
        _divisible("model.num_query_groups", m.num_query_groups, "parallel.tensor", p.tensor)
    else:  # several ranks share a group, and the rows of its keys and values
        rows = 2 * m.num_query_groups * m.head_dim
        _divisible("rows of keys and values, 2 x num_query_groups x head_dim", rows, "parallel.tensor", p.tensor)
    _divisible("model.num_attention_heads", m.num_attention_heads, "model.num_query_groups", m.num_query_groups)
    _divisible("model.ffn_hidden_size", m.ffn_hidden_size, "parallel.tensor", p.tensor)
    if m.mtp.num_layers:  # their projections of hidden states are split over tensor ranks
        _divisible("model.hidden_size with multi-token prediction", m.hidden_size, "parallel.tensor", p.tensor)
    data_parallel = config.data_parallel(world_size)
    rows = t.micro_batch_size * data_parallel
    _divisible("train.global_batch_size", t.global_batch_size, "micro_batch_size x data parallel", rows)
    if p.sequence and p.tensor == 1:
        raise UserError("parallel.sequence needs parallel.tensor > 1", remedy="set parallel.sequence=false")
    _check_sequence(config)
    _check_pipeline(config, data_parallel)
    if m.rope_axes == 3 and m.head_dim < 6:
        raise UserError(
            f"model.rope_axes = 3 with model.head_dim = {m.head_dim}", remedy="set model.head_dim to at least 6"
        )
    _check_latent_attention(m, p.tensor)
    attention_limits.check(config)
    _check_spans(config)
    _check_window(m)
    _check_experts(config, data_parallel)
    _check_recompute(config)
    _check_schedule(config)
    if config.engine == "deepspeed":
        _check_deepspeed(config)
    if t.precision == "fp8":
        _check_fp8(config)


def _check_sequence(config: RunConfig) -> None:
    m, p = config.model, config.parallel
    # Every context rank holds an early and a late chunk of the row, so that all have the same work under a causal mask.
    chunks = 2 * p.context if p.context > 1 else 1
    parts = chunks * (p.tensor if p.sequence else 1)
    _divisible("data.seq_length", config.data.seq_length, "parts of a row over tensor and context ranks", parts)
    if p.context > 1 and p.cp_comm_type == "alltoall":
        heads = m.num_attention_heads // p.tensor
        _divisible("attention heads of a tensor rank", heads, "parallel.context (alltoall)", p.context)


def _check_pipeline(config: RunConfig, data_parallel: int) -> None:
    m, p, t = config.model, config.parallel, config.train
    chunks = p.pipeline * p.virtual_pipeline
    if p.virtual_pipeline > 1 and p.pipeline == 1:
        raise UserError("parallel.virtual_pipeline needs parallel.pipeline > 1", remedy="set virtual_pipeline=1")
    if m.num_layers < chunks:
        raise UserError(
            f"model.num_layers = {m.num_layers} is less than the {chunks} chunks of the pipeline",
            remedy="lower parallel.pipeline or parallel.virtual_pipeline",
        )
    if m.tie_embeddings and m.mtp.num_layers and p.pipeline > 1:
        raise UserError(
            "Megatron-core cannot save tied embeddings with multi-token prediction over a pipeline",
            remedy="set model.tie_embeddings=false, or parallel.pipeline=1",
        )
    given = p.layers_per_chunk
    if given and (len(given) != chunks or sum(given) != m.num_layers):
        raise UserError(
            f"parallel.layers_per_chunk = {given} does not split {m.num_layers} layers into {chunks} chunks",
            remedy="give one number per chunk (pipeline x virtual_pipeline), with this sum",
        )
    microbatches = t.global_batch_size // (t.micro_batch_size * data_parallel)
    if p.virtual_pipeline > 1:
        remedy = "change train.global_batch_size or set parallel.virtual_pipeline=1"
        _divisible("microbatches of a step", microbatches, "parallel.pipeline", p.pipeline, remedy)


def _check_latent_attention(m: ModelConfig, tensor: int) -> None:
    if m.mla.kv_lora_rank == 0:
        return
    for key in ("qk_head_dim", "qk_rope_head_dim", "v_head_dim"):
        if getattr(m.mla, key) == 0:
            raise UserError(f"model.mla.{key} is not set", remedy="set it, or kv_lora_rank=0 for grouped queries")
    # The projections down to the latents are also split over tensor ranks.
    latent = m.mla.kv_lora_rank + m.mla.qk_rope_head_dim
    _divisible("model.mla.kv_lora_rank + qk_rope_head_dim", latent, "parallel.tensor", tensor)
    _divisible("model.mla.q_lora_rank", m.mla.q_lora_rank or tensor, "parallel.tensor", tensor)
    if m.num_query_groups != m.num_attention_heads:
        raise UserError(
            "latent attention has no query groups", remedy="set model.num_query_groups = model.num_attention_heads"
        )
    inside = "MLA applies RoPE inside Megatron with 1-D positions"
    if m.rope_axes == 3 or m.rope_scaling.kind not in ("none", "yarn"):
        raise UserError(inside, remedy="set model.rope_axes=1, model.rope_scaling.kind=none or yarn")
    if m.rope_scaling.attention_factor or not m.rope_scaling.truncate:
        what = "latent attention does not support model.rope_scaling.attention_factor and truncate"
        raise UserError(what, remedy="remove them")
    if m.qkv_bias:
        raise UserError("latent attention has no biases", remedy="set model.qkv_bias=false")


def _check_spans(config: RunConfig) -> None:
    for name in sorted(config.spans):
        key = f"modalities.{name}.attention = span"
        if name == "text":
            raise UserError(f"{key}: text is generated token by token", remedy=f"remove modalities.{name}.attention")
        if name in config.loss_weights:
            what = f"loss_weights.{name} with {key}: the tokens of a span count in no loss"
            raise UserError(what, remedy=f"remove loss_weights.{name}, or set modalities.{name}.attention=causal")
        if config.model.mtp.num_layers:
            # A module of depth k reads the token k further on, which may be behind the span that would see it.
            what = f"multi-token prediction does not support {key}"
            raise UserError(what, remedy=f"set model.mtp.num_layers=0, or modalities.{name}.attention=causal")


def _check_window(m: ModelConfig) -> None:
    window = m.window
    if window.size == 0 and (window.full_layers or window.rope_base):
        raise UserError("model.window needs a size", remedy="set model.window.size, or remove its other keys")
    if any(layer >= m.num_layers for layer in window.full_layers):
        raise UserError(
            f"model.window.full_layers = {window.full_layers} is not within layers 0 to {m.num_layers - 1}",
            remedy="remove the layers that the model does not have",
        )
    if window.size and m.mtp.num_layers:
        raise UserError("multi-token prediction does not support windows", remedy="set model.mtp.num_layers=0")
    if m.mla.kv_lora_rank:
        for key in ("window.size", "query_pre_attn_scalar", "attention_softcap"):
            section, _, last = key.rpartition(".")
            if getattr(getattr(m, section) if section else m, last):
                raise UserError(f"latent attention does not support model.{key}", remedy="set it to 0")


def _check_experts(config: RunConfig, data_parallel: int) -> None:
    moe, p = config.model.moe, config.parallel
    if moe.num_experts == 0:
        if p.expert > 1 or p.expert_tensor > 1:
            raise UserError("parallel.expert > 1 needs a model with experts", remedy="set model.moe.num_experts")
        return
    if moe.ffn_hidden_size == 0:
        raise UserError("model.moe.ffn_hidden_size is not set", remedy="set it to the hidden size of one expert")
    _divisible("model.moe.num_experts", moe.num_experts, "parallel.expert", p.expert)
    expert_ranks = p.expert * p.expert_tensor
    ranks = data_parallel * p.tensor * p.context
    _divisible("data x context x tensor", ranks, "parallel.expert x expert_tensor", expert_ranks)
    _divisible("model.moe.ffn_hidden_size", moe.ffn_hidden_size, "parallel.expert_tensor", p.expert_tensor)
    _divisible("model.moe.shared_ffn_hidden_size", moe.shared_ffn_hidden_size or p.tensor, "parallel.tensor", p.tensor)
    if moe.top_k > moe.num_experts:
        raise UserError("model.moe.top_k > model.moe.num_experts", remedy="choose a smaller top_k")
    if moe.dense_layers >= config.model.num_layers:
        raise UserError("model.moe.dense_layers leaves no layer with experts", remedy="lower it, or set num_experts=0")
    _check_expert_groups(moe)
    if moe.bias_update_rate and moe.score != "sigmoid":
        raise UserError("model.moe.bias_update_rate needs independent scores", remedy="set model.moe.score=sigmoid")
    if not moe.norm_top_k and moe.score == "sigmoid":
        raise UserError("Megatron-core normalises sigmoid scores", remedy="set model.moe.norm_top_k=true")
    if moe.top_k == 1 and moe.score == "softmax" and moe.norm_top_k:
        raise UserError(
            "model.moe.top_k = 1: a softmax over one score gives the router no gradient",
            remedy="set model.moe.score=sigmoid or top_k=2",
        )
    if p.tensor > 1 and not p.sequence:
        raise UserError("MoE with parallel.tensor > 1 needs sequence parallel", remedy="set parallel.sequence=true")


def _check_expert_groups(moe: MoEConfig) -> None:
    if moe.num_groups == 1 and moe.group_top_k == 1:
        return
    _divisible("model.moe.num_experts", moe.num_experts, "model.moe.num_groups", moe.num_groups)
    _divisible("model.moe.top_k", moe.top_k, "model.moe.group_top_k", moe.group_top_k)
    if moe.group_top_k > moe.num_groups or moe.top_k // moe.group_top_k > moe.num_experts // moe.num_groups:
        raise UserError(
            f"model.moe: cannot choose {moe.top_k} experts from {moe.group_top_k} of {moe.num_groups} groups",
            remedy="lower top_k or group_top_k",
        )


def _check_recompute(config: RunConfig) -> None:
    m, recompute = config.model, config.train.recompute
    if isinstance(recompute, str):
        return
    has_experts, has_mlp = m.moe.num_experts > 0, m.moe.num_experts == 0 or m.moe.dense_layers > 0
    missing = {"moe": not has_experts, "mlp": not has_mlp, "activation": m.activation != "silu"}
    for module in recompute.modules:
        if missing.get(module):
            what = "is for SwiGLU" if module == "activation" else "is in no layer of the model"
            raise UserError(f"train.recompute: {module} {what}", remedy=f"remove {module} from its modules")
    if config.engine == "deepspeed":
        raise UserError("engine=deepspeed recomputes whole layers only", remedy="set train.recompute=none or full")


def _check_schedule(config: RunConfig) -> None:
    o, t = config.optimizer, config.train
    if o.warmup_steps >= t.steps:
        raise UserError(
            f"optimizer.warmup_steps={o.warmup_steps} must be less than train.steps={t.steps}",
            remedy="lower optimizer.warmup_steps",
        )
    if o.schedule == "wsd" and not 0 < o.decay_steps <= t.steps - o.warmup_steps:
        raise UserError("optimizer.schedule=wsd needs decay_steps", remedy="set 0 < decay_steps <= steps - warmup")
    if o.schedule == "cosine" and o.decay_steps:
        raise UserError("optimizer.decay_steps is only for schedule=wsd", remedy="remove it, cosine decays to the end")
    if o.moments == "bf16" and o.beta2 > 0.99:
        what = f"optimizer.moments=bf16 with beta2 = {o.beta2:g}: a step changes the moment by less than rounding does"
        raise UserError(what, remedy="set optimizer.beta2 to at most 0.99, or optimizer.moments=fp32")
    if o.min_lr > o.lr:
        raise UserError("optimizer.min_lr > optimizer.lr", remedy="choose a smaller min_lr")


def _check_deepspeed(config: RunConfig) -> None:
    p = config.parallel
    for key in ("tensor", "pipeline", "context", "expert", "expert_tensor"):
        if getattr(p, key) > 1:
            raise UserError(
                f"engine=deepspeed supports only data parallelism, but parallel.{key} = {getattr(p, key)}",
                remedy=f"set parallel.{key}=1 or engine=native",
            )
    if config.train.precision == "fp8":
        raise UserError(
            "engine=deepspeed does not support train.precision=fp8", remedy="set train.precision=bf16 or engine=native"
        )
    if config.spans:
        what = f"engine=deepspeed does not support modalities.{min(config.spans)}.attention=span"
        raise UserError(what, remedy="set it to causal, or engine=native")
    if config.optimizer.moments != "fp32" or config.optimizer.offload_moments:
        remedy = "set optimizer.moments=fp32 and deepspeed.offload_optimizer, or engine=native"
        raise UserError("engine=deepspeed does not support optimizer.moments and offload_moments", remedy=remedy)
    if config.resilience.loss_guard.action == "skip":
        raise UserError(
            "resilience.loss_guard.action=skip: engine=deepspeed updates weights in its backward pass",
            remedy="set the action to rollback, stop or auto, or engine=native",
        )
    if config.model.megatron.get("gradient_accumulation_fusion"):
        raise UserError(
            "model.megatron.gradient_accumulation_fusion needs Megatron's gradient buffers: not with engine=deepspeed",
            remedy="remove it or set engine=native",
        )


def fp8_layers(config: RunConfig) -> range:
    """Return the model's layers that compute in FP8, counted from 0."""
    if config.train.precision != "fp8":
        return range(0)
    settings = config.train.fp8
    return range(settings.first_layers_bf16, config.model.num_layers - settings.last_layers_bf16)


def _check_fp8(config: RunConfig) -> None:
    m, p = config.model, config.parallel
    if not fp8_layers(config):
        raise UserError(
            f"train.fp8: first_layers_bf16 and last_layers_bf16 leave none of {m.num_layers} layers in FP8",
            remedy="lower them, or set train.precision=bf16",
        )
    heads, sizes = m.num_attention_heads // p.tensor, {"model.hidden_size": m.hidden_size}
    if m.mla.kv_lora_rank:
        a, qk = m.mla, m.mla.qk_head_dim + m.mla.qk_rope_head_dim
        latent = a.kv_lora_rank + a.qk_rope_head_dim
        sizes |= {"channels of a tensor rank's queries (model.mla)": heads * qk}
        sizes |= {"channels of a tensor rank's keys and values (model.mla)": heads * (a.qk_head_dim + a.v_head_dim)}
        sizes |= {"channels of a tensor rank's heads (model.mla.v_head_dim)": heads * a.v_head_dim}
        sizes |= {"model.mla.kv_lora_rank": a.kv_lora_rank, "model.mla.q_lora_rank": a.q_lora_rank}
        sizes |= {"a tensor rank's part of model.mla.kv_lora_rank + qk_rope_head_dim": latent // p.tensor}
        sizes |= {"a tensor rank's part of model.mla.q_lora_rank": a.q_lora_rank // p.tensor}
    else:
        rows = m.head_dim * (m.num_attention_heads + 2 * m.num_query_groups)
        sizes |= {"channels of a tensor rank's heads (model.head_dim)": heads * m.head_dim}
        sizes |= {"channels of a tensor rank's queries, keys and values (model.head_dim)": rows // p.tensor}
    if m.moe.num_experts:
        sizes |= {"a rank's part of model.moe.ffn_hidden_size": m.moe.ffn_hidden_size // p.expert_tensor}
        sizes |= {"a rank's part of model.moe.shared_ffn_hidden_size": m.moe.shared_ffn_hidden_size // p.tensor}
    if not m.moe.num_experts or m.moe.dense_layers:
        sizes |= {"a tensor rank's part of model.ffn_hidden_size": m.ffn_hidden_size // p.tensor}
    for what, size in sizes.items():
        if size % FP8_MULTIPLE:
            raise UserError(
                f"train.precision=fp8: {what} is {size}, and FP8 products need a multiple of {FP8_MULTIPLE}",
                remedy="change it or the number of tensor ranks, or set train.precision=bf16",
            )


def _divisible(what: str, value: int, by: str, divisor: int, remedy: str = "") -> None:
    if value % divisor or value < divisor:
        remedy = remedy or f"make {what} a multiple of {divisor}, or lower {by}"
        raise UserError(f"{what} = {value} is not divisible by {by} = {divisor}", remedy=remedy)


def padded_vocabulary(size: int, tensor_parallel: int) -> int:
    """Return the rows of the embedding table at run time: rounded up so that every tensor rank gets the same number."""
    return -(-size // tensor_parallel) * tensor_parallel


def layers_per_chunk(config: RunConfig, vocabulary_size: int) -> list[int]:
    """Return the number of layers of every pipeline chunk in model order, as configured or balanced.

    Balanced: the slowest stage is as fast as possible; the head (and the multi-token-prediction modules before it)
    count as work of the last stage. Among equal splits, the largest stage has the fewest parameters, where the
    embedding table counts for the first stage. A stage's layers are spread over its chunks; the remainder goes to
    earlier chunks.
    """
    p, m = config.parallel, config.model
    if p.layers_per_chunk:
        return list(p.layers_per_chunk)
    if p.pipeline == 1:
        return [m.num_layers]
    # A token's time in a layer is proportional to the number of weights it is multiplied with.
    layer, table = flops.layer_parameters(m, active=True), vocabulary_size * m.hidden_size
    tail = table + m.mtp.num_layers * (flops.mtp_parameters(m, active=True) + table)

    def badness(stages: list[int]) -> tuple[int, int, list[int]]:
        # The slowest stage sets the pace; among equals the least memory, then more layers on earlier stages.
        work = [n * layer for n in stages]
        work[-1] += tail
        held = [work[0] + table, *work[1:]]
        return max(work), max(held), [-n for n in stages]

    stages = min(_candidates(m.num_layers, p.pipeline, p.virtual_pipeline), key=badness)
    chunks = range(p.virtual_pipeline)
    return [n // len(chunks) + (chunk < n % len(chunks)) for chunk in chunks for n in stages]


def _candidates(layers: int, stages: int, least: int) -> list[list[int]]:
    """Return all splits by size of the first and last stage, at least `least`, with the rest spread evenly between."""
    if stages == 2:
        return [[layers - last, last] for last in range(least, layers - least + 1)]
    found, between = [], stages - 2
    for first in range(least, layers - least * (stages - 1) + 1):
        for last in range(least, layers - first - least * between + 1):
            each, more = divmod(layers - first - last, between)
            found.append([first, *(each + (i < more) for i in range(between)), last])
    return found
