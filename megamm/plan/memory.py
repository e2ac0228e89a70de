"""Peak memory of a rank by formula: what is stored for the whole run, saved activations, and what one operator needs.

The first is exact (rank_parameters). Activations are the tensors that this package's layers save for the backward pass,
counted from the code: of each layer, times the passes that the pipeline schedule has in flight. Routing is assumed to
be balanced. Sources: Korthikanti et al. 2022, arXiv:2205.05198; Narayanan et al. 2021, arXiv:2104.04473.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megamm.common.gpu_constants import GpuConstants
from megamm.plan import rank_parameters
from megamm.plan.job import Job, LayerKind

WIDTH = 2
"""Bytes of an activation."""
FP8_SHARE = 0.5
"""Of them, those of one in FP8."""
INPUT_BYTES, ID_BYTES, TARGET_BYTES = 60, 8, 20
"""Of a token of a step's microbatches (common/sample.py); of its id on a context rank, and of its targets there for
each depth of prediction (model/loss.py)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank of a pipeline stage at the peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    temporaries: float
    """Of the largest operator: the output layer with the loss, or a layer in its backward pass."""
    inputs: float
    """All microbatches of the step: they are on the device from its start."""

    @property
    def total(self) -> float:
        stored = self.weights + self.gradients + self.optimizer
        return stored + self.activations + self.temporaries + self.inputs


def of_stage(job: Job, stage: int) -> Memory:
    """Return the peak of the ranks of a stage."""
    return _of_stage(job, stage, {kind: (saved(job, kind), _backward(job, kind)) for kind in job.kinds})


def _of_stage(job: Job, stage: int, layer: Mapping[LayerKind, tuple[float, float]]) -> Memory:
    """layer: bytes that a layer saves and needs in its backward pass, by kind."""
    m, p = job.model, job.parallel
    chunks = job.chunks_of(stage)
    parameters = rank_parameters.of_stage(job, stage)
    dense_replicas = job.data * p.context
    expert_replicas = job.world_size // (p.pipeline * p.expert * p.expert_tensor)
    weight, gradient, state = job.bytes_per_parameter
    owned = parameters.dense / dense_replicas + parameters.expert / expert_replicas
    layers = [sum(count * layer[kind][0] for kind, count in chunk.items()) for chunk in chunks]
    flights = in_flight(job, stage)
    activations = sum(n * bytes_ for n, bytes_ in zip(flights, layers, strict=True))
    is_last = stage == p.pipeline - 1
    if is_last:  # the final norm's input and result, and the result over all tokens of the tensor ranks
        activations += (2 * job.scattered_tokens + job.tokens) * m.hidden_size * WIDTH
        activations += m.mtp.num_layers * (layer[job.last_kind][0] + 4 * job.tokens * m.hidden_size * WIDTH)
    temporaries = max(_head(job) if is_last else 0.0, *(layer[kind][1] for chunk in chunks for kind in chunk))
    return Memory(
        weights=parameters.total * weight,
        gradients=parameters.total * gradient,
        optimizer=owned * state,
        activations=activations,
        temporaries=temporaries,
        inputs=_inputs(job),
    )


def _inputs(job: Job) -> float:
    own = ID_BYTES + (1 + job.model.mtp.num_layers) * TARGET_BYTES
    return job.microbatches * job.micro_batch_size * job.seq_length * (INPUT_BYTES + own / job.parallel.context)


def peak(job: Job) -> tuple[int, Memory]:
    """Return the stage that needs most, and its memory."""
    layer = {kind: (saved(job, kind), _backward(job, kind)) for kind in job.kinds}
    return max(
        ((stage, _of_stage(job, stage, layer)) for stage in range(job.parallel.pipeline)), key=lambda x: x[1].total
    )


def usable(gpu: GpuConstants, job: Job) -> float:
    """Return the bytes that tensors can take."""
    return gpu.memory - gpu.reserved(*communicators(job))


def communicators(job: Job) -> tuple[int, int]:
    """Return in how many groups a rank communicates, and with how many ranks of its node it exchanges tokens."""
    p, moe = job.parallel, job.model.moe
    sizes = [job.world_size, p.tensor, p.context, p.pipeline, job.data * p.context]
    exchanges = []
    if moe.num_experts:
        experts = p.expert * p.expert_tensor
        sizes += [p.expert, p.tensor * p.context, job.world_size // (p.pipeline * experts)]
        sizes.append(experts)  # token counts
        exchanges.append(p.expert if moe.dispatcher == "alltoall" else 1)
    if p.cp_comm_type == "alltoall":
        exchanges.append(p.context)
    return sum(size > 1 for size in sizes), sum(min(size, job.gpus_per_node) - 1 for size in exchanges)


def in_flight(job: Job, stage: int) -> list[int]:
    """Return for each chunk of a stage how many microbatches have passed it forward and not yet backward, at most.

    One chunk a stage: as many as there are stages from this one on. Interleaved: a stage runs the forward passes of
    each group of `pipeline` microbatches chunk by chunk, and two for each later stage before its first backward.
    """
    p, microbatches = job.parallel, job.microbatches
    if p.virtual_pipeline == 1:
        return [min(microbatches, p.pipeline - stage)]
    passes = (p.pipeline - stage - 1) * 2 + (p.virtual_pipeline - 1) * p.pipeline + 1
    passes = min(passes, microbatches * p.virtual_pipeline)
    counts = [0] * p.virtual_pipeline
    for i in range(passes):
        counts[i // p.pipeline % p.virtual_pipeline] += 1
    return counts


def saved(job: Job, kind: LayerKind) -> float:
    """Return the bytes that a layer saves in its forward pass."""
    if job.recompute == "full":
        return job.scattered_tokens * job.model.hidden_size * WIDTH
    mlp = 0.0 if job.recomputes(_mlp_module(kind)) else _mlp_saved(job, kind)
    return (_residual_saved(job, kind) + mlp + _attention_saved(job, kind)) * WIDTH


def _mlp_module(kind: LayerKind) -> str:
    """Return the name of a layer's MLP in train.recompute."""
    return "moe" if kind.has_experts else "mlp"


def _residual_saved(job: Job, kind: LayerKind) -> float:
    # Two norms: the residual stream before each, and its result, the input of a product.
    tensors = 2.0 if job.recomputes("norms") else 4.0
    if kind.in_fp8 and not _gathers(job):  # a product keeps its input in FP8; a router keeps it in bf16 too
        kept_by_router = kind.has_experts and not job.recomputes("norms")
        tensors = 2 + FP8_SHARE * (1 if kind.has_experts else 2) + (1 if kept_by_router else 0)
        tensors += FP8_SHARE if kind.has_experts and job.model.moe.shared_ffn_hidden_size else 0
    return (tensors + (2 if job.model.sandwich_norm else 0)) * job.scattered_tokens * job.model.hidden_size


def _gathers(job: Job) -> bool:
    """Whether products get their tokens from all tensor ranks: then they keep the rank's part of them, in bf16."""
    return job.parallel.sequence and job.parallel.tensor > 1


def _mlp_saved(job: Job, kind: LayerKind) -> float:
    m, p, moe = job.model, job.parallel, job.model.moe
    each = 2.0 if job.recomputes("activation") else 3.0  # gate and up, activation
    if kind.in_fp8:
        each = 2 + FP8_SHARE
    if not kind.has_experts:
        return each * job.tokens * m.ffn_hidden_size / p.tensor
    copies = job.scattered_tokens * moe.top_k * p.expert_tensor
    saved = copies * ((FP8_SHARE if kind.in_fp8 else 1) * m.hidden_size + each * moe.ffn_hidden_size / p.expert_tensor)
    saved += job.scattered_tokens * moe.num_experts * 6  # probabilities in float32, masks
    return saved + each * job.tokens * moe.shared_ffn_hidden_size / p.tensor


def _attention_saved(job: Job, kind: LayerKind) -> float:
    """Return the elements that attention saves between its two products, each counted once per storage."""
    m, p, tokens = job.model, job.parallel, job.tokens
    heads, groups = m.num_attention_heads / p.tensor, max(m.num_query_groups / p.tensor, 1.0)
    if m.mla.kv_lora_rank:
        a = m.mla
        query, value = a.qk_head_dim + a.qk_rope_head_dim, a.v_head_dim
        latents = 2 * job.scattered_tokens * (a.q_lora_rank + a.kv_lora_rank) + tokens * (
            a.q_lora_rank + a.kv_lora_rank
        )
        q, k, v = tokens * heads * query, tokens * heads * query, tokens * heads * value
        joint = latents + tokens * heads * (a.qk_head_dim + value)
    else:
        value = m.head_dim
        q, k, v = tokens * heads * value, tokens * groups * value, tokens * groups * value
        joint = q + k + v  # of the product; the values are a view of it
        if m.qk_norm and groups > 1:  # a copy of the queries before their norm; of one group they are a view
            joint += q
    result = tokens * heads * value
    in_fp8 = FP8_SHARE * result if kind.in_fp8 else 0.0  # as the input of the next product
    gathers = p.context > 1 and p.cp_comm_type == "allgather"
    # One row and one call of the kernel: its result has the layout that the next product reads, and is saved once.
    if job.attention_by_lengths and (job.micro_batch_size > 1 or gathers):
        result *= 2  # its results are put together for that product
    gathered = (k + v) * p.context if gathers else k
    return joint + q + gathered + result + in_fp8 + tokens * heads * 2  # the last: a float32 for each query and head


def _head(job: Job) -> float:
    """Return the bytes of output layer and loss: gradients of the weights in float32, scaled, and rounded."""
    table = job.vocabulary_size / job.parallel.tensor * job.model.hidden_size
    return 10 * table + 2 * job.tokens * job.model.hidden_size * WIDTH


def _backward(job: Job, kind: LayerKind) -> float:
    """Return the bytes that a layer's backward pass needs at once beside what is saved."""
    m, p, moe = job.model, job.parallel, job.model.moe
    tokens, width = float(job.tokens), m.ffn_hidden_size / p.tensor
    weights = 2 * m.hidden_size * width
    if kind.has_experts:
        tokens = job.scattered_tokens * moe.top_k * p.expert_tensor
        width = moe.ffn_hidden_size / p.expert_tensor
        weights = 2 * m.hidden_size * width
    # Gradients of the activation (1), gate and up (2); input and its gradient over all tokens; a weight gradient.
    temporaries = (3 * tokens * width + 2 * tokens * m.hidden_size + weights) * WIDTH
    if kind.in_fp8:  # the gradient of gate and up twice in FP8, that of the weights in float32
        temporaries += (2 * tokens * width + weights) * WIDTH
    # What is computed again, one after the other: whole layers, an MLP, or single results.
    if job.recompute == "full":
        again = _residual_saved(job, kind) + _mlp_saved(job, kind) + _attention_saved(job, kind)
        return temporaries + again * WIDTH
    if job.recomputes(_mlp_module(kind)):
        temporaries += _mlp_saved(replace(job, recompute="none"), kind) * WIDTH
    elif job.recomputes("activation"):
        temporaries += tokens * width * WIDTH
    if job.recomputes("norms"):
        temporaries += job.scattered_tokens * m.hidden_size * WIDTH
    return temporaries
