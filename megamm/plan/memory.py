"""Peak memory of a rank by formula: what is stored for the whole run, saved activations, and what one operator needs.

The first is exact (rank_parameters). Activations are the tensors that this package's layers save for the backward pass,
counted from the code: of each layer, times the passes that the pipeline schedule has in flight. Routing is assumed to
be balanced. Sources: Korthikanti et al. 2022, arXiv:2205.05198; Narayanan et al. 2021, arXiv:2104.04473.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megamm.plan import rank_parameters
from megamm.plan.gpu import GpuConstants
from megamm.plan.job import Job, LayerKind

BYTES = {"fp32": (4, 4, 8), "bf16": (2, 4, 12)}
"""Of a parameter: weight, gradient, optimizer state (sharded)."""
WIDTH = 2
"""Bytes of an activation; plans are for bf16."""


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank of a pipeline stage at the peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    temporaries: float
    """Of the largest operator: the output layer with the loss, or a layer in its backward pass."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporaries


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
    weight, gradient, state = BYTES["bf16"]
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
    )


def peak(job: Job) -> tuple[int, Memory]:
    """Return the stage that needs most, and its memory."""
    layer = {kind: (saved(job, kind), _backward(job, kind)) for kind in job.kinds}
    return max(
        ((stage, _of_stage(job, stage, layer)) for stage in range(job.parallel.pipeline)), key=lambda x: x[1].total
    )


def usable(gpu: GpuConstants) -> float:
    """Return the bytes that tensors can take."""
    return gpu.memory - gpu.reserved


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
    return _everything_saved(job, kind, job.recompute == "selective")


def _everything_saved(job: Job, kind: LayerKind, recomputes_attention: bool) -> float:
    m, p = job.model, job.parallel
    # Two norms: the residual stream before each, and its result, the input of a product.
    residual = 4 * job.scattered_tokens * m.hidden_size
    if m.sandwich_norm:
        residual += 2 * job.scattered_tokens * m.hidden_size
    moe = m.moe
    if kind.has_experts:
        copies = job.scattered_tokens * moe.top_k * p.expert_tensor
        mlp = copies * (m.hidden_size + 3 * moe.ffn_hidden_size / p.expert_tensor)  # input, gate and up, activation
        mlp += job.scattered_tokens * moe.num_experts * 6  # probabilities in float32, masks
        mlp += 3 * job.tokens * moe.shared_ffn_hidden_size / p.tensor
    else:
        mlp = 3 * job.tokens * m.ffn_hidden_size / p.tensor
    return (residual + mlp + _attention_saved(job, recomputes_attention)) * WIDTH


def _attention_saved(job: Job, is_recomputed: bool) -> float:
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
    # The result has the layout that the next product reads: one tensor is saved for both.
    if is_recomputed:
        return joint + q + k + result
    gathered = (k + v) * p.context if p.context > 1 and p.cp_comm_type == "allgather" else k
    return joint + q + gathered + result + tokens * heads * 2  # the last: a float32 for each query and head


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
    if job.recompute == "full":
        return temporaries + _everything_saved(job, kind, False)
    if job.recompute == "selective":
        return max(temporaries, (_attention_saved(job, False) - _attention_saved(job, True)) * WIDTH)
    return temporaries
