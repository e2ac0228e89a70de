"""Forward and backward time of one layer on one rank for one microbatch, by what takes it.

Collectives count as far as they are exposed: what runs beside products or attention takes no time of its own. The host
counts as far as it is slower than the device. Imbalance between experts and between context ranks is not modelled.
Sources: Narayanan et al. 2021, arXiv:2104.04473 (tensor and pipeline parallelism); Korthikanti et al. 2022,
arXiv:2205.05198 (sequence parallelism); Liu et al. 2025, arXiv:2504.14960 (expert parallelism).
"""

from functools import lru_cache
from typing import NamedTuple

from megamm.plan import kernels, network
from megamm.plan.gpu import GpuConstants
from megamm.plan.job import Job, LayerKind, Software
from megamm.plan.network import Group, Routing

WIDTH = 2
"""Bytes of an activation."""
LAUNCHES = {"torch": 130, "fused": 70, "2021": 90}
"""Kernel launches of the host in forward and backward of a dense layer, by `Software.elementwise`; torch: counted."""
EXPERT_LAUNCHES = 55
"""The same of one expert, if experts run one after another: 0.5 ms."""
ROUTING_LAUNCHES = 150
"""The same of router, permutation and exchange."""
HOST_WAITS = 3
"""Waits of the host for token counts of a layer with experts."""


class Seconds(NamedTuple):
    """Time of one pass by cause. launch: the host is slower; tensor, context, expert: exposed collectives."""

    product: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    launch: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0

    def plus(self, other: "Seconds") -> "Seconds":
        return Seconds(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, n: float) -> "Seconds":
        return Seconds(*(a * n for a in self))

    @property
    def device(self) -> float:
        return self.product + self.attention + self.elementwise

    @property
    def total(self) -> float:
        return sum(self)


class LayerTime(NamedTuple):
    forward: Seconds
    backward: Seconds
    """Without recomputation."""
    recomputed: Seconds
    """Part of forward that selective recomputation repeats."""


def beside(gpu: GpuConstants, collective: float, computation: float) -> float:
    """Return what a collective adds to a computation beside it: its end alone, and a slower computation until then."""
    return max(0.0, collective - computation) + gpu.overlap_cost * min(collective, computation)


def of_layer(gpu: GpuConstants, job: Job, kind: LayerKind) -> LayerTime:
    """Return the time of a layer."""
    return _layer(gpu, _LayerJob(job), kind)


class _LayerJob:
    """A job as a key of the cache: by what determines the time of a layer, which many layouts share."""

    def __init__(self, job: Job) -> None:
        self.job = job
        p = job.parallel
        self.key = (
            *(p.tensor, p.sequence, p.context, p.cp_comm_type, p.expert, p.expert_tensor, job.micro_batch_size),
            *(job.seq_length, job.documents, job.software, job.gpus_per_node, id(job.model)),
        )
        self.hash = hash(self.key)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _LayerJob) and self.key == other.key


@lru_cache(maxsize=4096)
def _layer(gpu: GpuConstants, key: _LayerJob, kind: LayerKind) -> LayerTime:
    job, (window, has_experts) = key.job, kind
    attention = _attention(gpu, job, window)
    mlp = _experts(gpu, job) if has_experts else _mlp(gpu, job, job.model.ffn_hidden_size)
    forward, backward = attention.forward.plus(mlp.forward), attention.backward.plus(mlp.backward)
    host, more = LAUNCHES[job.software.elementwise] * gpu.launch, 0.0
    if has_experts:
        each = 0.0 if job.software.grouped_experts else job.model.moe.num_experts / job.parallel.expert
        more = (ROUTING_LAUNCHES + each * EXPERT_LAUNCHES) * gpu.launch
    # A third of the launches are forward's, where the host waits for the counts of tokens: it cannot run ahead from the
    # rest of the layer to the experts. In backward it can.
    late = max(0.0, host / 3 - attention.forward.total) if has_experts else max(0.0, host / 3 - forward.total)
    late += max(0.0, more / 3 - mlp.forward.total) + (HOST_WAITS * gpu.host_wait if has_experts else 0.0)
    forward = forward._replace(launch=late)
    backward = backward._replace(launch=max(0.0, (host + more) * 2 / 3 - backward.total))
    return LayerTime(forward, backward, attention.recomputed)


class _Linear(NamedTuple):
    """A layer's linear map of `tokens` rows from k to n channels."""

    tokens: float
    n: float
    k: float


def _linears(
    gpu: GpuConstants, software: Software, maps: list[_Linear], count: float = 1
) -> tuple[float, float, float, float]:
    """Return the seconds of products (forward, backward) and of passes over memory (forward, backward)."""
    forward = backward = passes = later = 0.0
    for tokens, n, k in maps:
        precision = software.precision
        forward += kernels.product(gpu, tokens, n, k, count=count, precision=precision)
        backward += kernels.product(gpu, tokens, k, n, count=count, precision=precision)
        is_fused = software.fused_weight_gradients
        backward += kernels.product(
            gpu, n, k, tokens, count=count, precision=precision, output_bytes=8 if is_fused else 2
        )
        if not is_fused:  # the product's gradient is read, the buffer read and written
            later += kernels.memory(gpu, count * n * k * 10)
        if precision == "fp8":  # inputs and gradients are read and written as they are and transposed
            passes += kernels.memory(gpu, count * tokens * k * 4)
            later += kernels.memory(gpu, count * tokens * n * 4)
    return forward, backward, passes, later


def _attention(gpu: GpuConstants, job: Job, window: int) -> LayerTime:
    m, p, s = job.model, job.parallel, job.software
    heads, tokens = m.num_attention_heads / p.tensor, job.tokens
    query, value = m.head_dim, m.head_dim
    groups = max(m.num_query_groups / p.tensor, 1.0)
    maps = [_Linear(tokens, heads * m.head_dim + 2 * groups * m.head_dim, m.hidden_size)]
    if m.mla.kv_lora_rank:
        a, groups = m.mla, heads
        query, value = a.qk_head_dim + a.qk_rope_head_dim, a.v_head_dim
        latent = a.kv_lora_rank + a.qk_rope_head_dim
        maps = [_Linear(job.scattered_tokens, latent, m.hidden_size)]
        maps.append(_Linear(tokens, heads * (a.qk_head_dim + value), a.kv_lora_rank))
        if a.q_lora_rank:
            maps.append(_Linear(job.scattered_tokens, a.q_lora_rank, m.hidden_size))
        maps.append(_Linear(tokens, heads * query, a.q_lora_rank or m.hidden_size))
    maps.append(_Linear(tokens, m.hidden_size, heads * value))
    product, product_back, passes, passes_back = _linears(gpu, s, maps)
    if s.attention == "unfused":
        core, core_back = kernels.unfused_attention(gpu, job.micro_batch_size, heads, job.seq_length, m.head_dim)
    else:
        pairs = job.micro_batch_size * job.documents.pairs(window) / p.context
        core, core_back = kernels.attention(gpu, s, pairs, heads, query + value)
    moved, moved_back = _attention_bytes(job, heads, groups, query)
    passes, passes_back = passes + kernels.memory(gpu, moved), passes_back + kernels.memory(gpu, moved_back)
    context, context_back = _context(gpu, job, groups * (query + value), heads * (query + value))
    if s.context_overlap:
        context, context_back = beside(gpu, context, core), beside(gpu, context_back, core_back)
    tensor, tensor_back = _tensor(gpu, job, product)
    forward = Seconds(product, core, passes, 0.0, tensor, context)
    backward = Seconds(product_back, core_back, passes_back, 0.0, tensor_back, context_back)
    return LayerTime(forward, backward, Seconds(attention=core, context=context))


def _attention_bytes(job: Job, heads: float, groups: float, query: int) -> tuple[float, float]:
    """Return the bytes that passes without products move around attention, with half of the residual stream's."""
    residual = job.scattered_tokens * job.model.hidden_size * WIDTH
    q, k = job.tokens * heads * query * WIDTH, job.tokens * groups * query * WIDTH
    if job.software.elementwise == "2021":
        return 5.5 * residual + 8 * q, 8.5 * residual + 12 * q
    # Norm: read, write; sum with the residual: read twice, write. Backward: norm 3, sum of two gradients 3.
    if job.software.elementwise == "fused":
        return 5 * residual + 2 * (q + k), 6 * residual + 2 * (q + k)
    # Copy of the queries out of the joint product 2, norms 2, RoPE 8, copy of the result 2, and their gradients.
    return 5 * residual + 14 * q + 10 * k, 6 * residual + 21 * q + 17 * k


def _context(gpu: GpuConstants, job: Job, key_values: float, all_channels: float) -> tuple[float, float]:
    """Return the seconds in which context ranks exchange keys and values, in forward and backward."""
    p = job.parallel
    if p.context == 1:
        return 0.0, 0.0
    group = Group.of(p.context, p.tensor, job.gpus_per_node)
    row = job.tokens * p.context * WIDTH
    if p.cp_comm_type == "alltoall":  # queries, keys and values to heads, results back
        own = job.tokens * WIDTH * (key_values + all_channels)
        seconds = network.all_to_all(gpu, group, own)
        return seconds, seconds
    seconds = network.ring(gpu, group, row * key_values)
    return seconds, seconds


def _tensor(gpu: GpuConstants, job: Job, product: float) -> tuple[float, float]:
    """Return the exposed seconds of the tensor-parallel collectives of an attention or an MLP.

    With sequence parallelism forward gathers the input and scatters the output; backward gathers the output's
    gradient and the input again and scatters the input's gradient. Otherwise both sum over all ranks.
    """
    p, overlap = job.parallel, job.software.tensor_overlap
    if p.tensor == 1:
        return 0.0, 0.0
    group = Group.of(p.tensor, 1, job.gpus_per_node)
    whole = job.tokens * job.model.hidden_size * WIDTH
    if not p.sequence:
        seconds = network.all_reduce(gpu, group, whole)
        return seconds, beside(gpu, seconds, product) if overlap != "none" else seconds
    one = network.ring(gpu, group, whole)
    if overlap == "none":
        return 2 * one, 3 * one
    hidden = beside(gpu, one, product / 2)  # each beside one of the two products of the sub-layer
    if overlap == "backward":
        return 2 * one, one + 2 * hidden
    # In chunks beside the products: the first chunk is exposed.
    chunked = max(one / p.tensor, hidden)
    return 2 * chunked, chunked + 2 * hidden


def _mlp(gpu: GpuConstants, job: Job, width: int) -> LayerTime:
    m, p, s = job.model, job.parallel, job.software
    matrices = 2 if s.is_gated else 1
    maps = [
        _Linear(job.tokens, matrices * width / p.tensor, m.hidden_size),
        _Linear(job.tokens, m.hidden_size, width / p.tensor),
    ]
    product, product_back, passes, passes_back = _linears(gpu, s, maps)
    moved, moved_back = _mlp_bytes(job, job.tokens * width / p.tensor)
    tensor, tensor_back = _tensor(gpu, job, product)
    forward = Seconds(product, 0.0, passes + kernels.memory(gpu, moved), 0.0, tensor)
    backward = Seconds(product_back, 0.0, passes_back + kernels.memory(gpu, moved_back), 0.0, tensor_back)
    return LayerTime(forward, backward, Seconds())


def _mlp_bytes(job: Job, activations: float) -> tuple[float, float]:
    """Return the bytes of activation function, norm and residual; activations: elements of the hidden layer."""
    residual = job.scattered_tokens * job.model.hidden_size * WIDTH
    hidden = activations * WIDTH
    if job.software.elementwise == "2021":
        return 5.5 * residual + 2 * hidden, 8.5 * residual + 3 * hidden
    return 5 * residual + 3 * hidden, 6 * residual + 5 * hidden


def _experts(gpu: GpuConstants, job: Job) -> LayerTime:
    """Return the time of the router, the exchange of tokens, a rank's experts and the shared expert."""
    m, p, s, moe = job.model, job.parallel, job.software, job.model.moe
    tokens = job.scattered_tokens
    copies = tokens * moe.top_k * p.expert_tensor
    local = moe.num_experts / p.expert
    matrices, width = (2 if s.is_gated else 1), moe.ffn_hidden_size / p.expert_tensor
    each = copies / local
    maps = [_Linear(each, matrices * width, m.hidden_size), _Linear(each, m.hidden_size, width)]
    if s.grouped_experts:
        product, product_back, passes, passes_back = _linears(gpu, s, maps, count=local)
    else:
        product, product_back, passes, passes_back = (local * x for x in _linears(gpu, s, maps))
    router = kernels.product(gpu, tokens, moe.num_experts, m.hidden_size)
    moved, moved_back = _mlp_bytes(job, copies * width)
    moves = 2 + (4 if s.elementwise == "fused" else 6) * moe.top_k  # permutations of tokens, there and back
    moved += tokens * (m.hidden_size * WIDTH * moves + moe.num_experts * 48)
    moved_back += tokens * (m.hidden_size * WIDTH * moves + moe.num_experts * 48)
    exchange = _exchange(gpu, job, tokens)
    device = product + passes
    exposed = beside(gpu, exchange, device) if s.expert_overlap else exchange
    exposed_back = beside(gpu, exchange, product_back) if s.expert_overlap else exchange
    forward = Seconds(product + router, 0.0, passes + kernels.memory(gpu, moved), 0.0, 0.0, 0.0, exposed)
    back = passes_back + kernels.memory(gpu, moved_back)
    backward = Seconds(product_back + 2 * router, 0.0, back, 0.0, 0.0, 0.0, exposed_back)
    if moe.shared_ffn_hidden_size:
        shared = _mlp(gpu, job, moe.shared_ffn_hidden_size)
        forward, backward = forward.plus(shared.forward), backward.plus(shared.backward)
    return LayerTime(forward, backward, Seconds())


def _exchange(gpu: GpuConstants, job: Job, tokens: float) -> float:
    """Return the seconds in which a rank's tokens reach their experts and come back."""
    m, p, moe = job.model, job.parallel, job.model.moe
    group = Group.of(p.expert, p.expert_tensor, job.gpus_per_node)
    if moe.dispatcher == "allgather":
        everyone = Group.of(p.expert * p.expert_tensor, 1, job.gpus_per_node)
        return 2 * network.ring(gpu, everyone, tokens * everyone.size * m.hidden_size * WIDTH)
    own = tokens * moe.top_k * m.hidden_size * WIDTH
    routing = Routing(moe.top_k, job.software.deduplicated_dispatch, moe.group_top_k / moe.num_groups)
    one_way = network.all_to_all(gpu, group, own, routing)
    split = Group.of(p.expert_tensor, 1, job.gpus_per_node)
    return 2 * (one_way + network.ring(gpu, split, own * p.expert_tensor))
