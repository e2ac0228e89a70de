"""Forward and backward time of one layer on one rank for one microbatch, by what takes it.

Collectives count as far as they are exposed: what runs beside products or attention takes no time of its own. The host
counts as far as it is slower than the device. Imbalance between experts and between context ranks is not modelled.
Sources: Narayanan et al. 2021, arXiv:2104.04473 (tensor and pipeline parallelism); Korthikanti et al. 2022,
arXiv:2205.05198 (sequence parallelism); Liu et al. 2025, arXiv:2504.14960 (expert parallelism).
"""

from collections.abc import Mapping
from functools import lru_cache, reduce
from typing import NamedTuple

from megamm.common.gpu_constants import GpuConstants
from megamm.model.layout import FP8_MULTIPLE
from megamm.plan import kernels, network
from megamm.plan.job import Job, LayerKind, Software
from megamm.plan.network import Group, Routing

WIDTH = 2
"""Bytes of an activation."""
LAUNCHES = {"ops": 121, "torch": 140, "fused": 70, "2021": 90}
"""Operators that the host starts in forward and backward of a dense layer, by `Software.elementwise`; those of this
package are counted, views included (tests/test_plan_layer.py)."""
CONVERSION_LAUNCHES = {"fused": 0, "tensorwise": 63, "rowwise": 91}
"""More of a linear layer in FP8, by `Software.conversion`."""
GROUPED_CONVERSION_LAUNCHES = {"fused": 0, "tensorwise": 106, "rowwise": 144}
"""The same of a product of all experts."""
EXPERT_LAUNCHES = 55
"""The same of one expert, if experts run one after another: 0.5 ms."""
ROUTING_LAUNCHES = 70
"""The same of router and permutation."""
EXCHANGE_LAUNCHES = 80
"""The same of the exchange of tokens, with the permutation after it."""


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
    parts: Mapping[str, Seconds]
    """Forward time of what the backward pass can repeat, by its name in train.recompute."""

    def repeated(self, job: Job) -> Seconds:
        """Return the time of what the job's backward pass computes again."""
        if isinstance(job.recompute, str):
            return self.forward if job.recompute == "full" else Seconds()
        modules = set(job.recompute.modules) & set(self.parts)
        if modules & {"mlp", "moe"}:  # the activation is a part of it
            modules.discard("activation")
        return reduce(Seconds.plus, (self.parts[module] for module in sorted(modules)), Seconds())


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
    job, (window, has_experts, in_fp8) = key.job, kind
    attention = _attention(gpu, job, window, in_fp8)
    mlp = _experts(gpu, job, in_fp8) if has_experts else _mlp(gpu, job, job.model.ffn_hidden_size, in_fp8)
    forward, backward = attention.forward.plus(mlp.forward), attention.backward.plus(mlp.backward)
    host, more = (number * gpu.launch for number in _launches(job, kind))
    # A third of the launches are forward's, where the host waits for the counts of tokens: it cannot run ahead from the
    # rest of the layer to the experts. In backward it can.
    late = max(0.0, host / 3 - attention.forward.total) if has_experts else max(0.0, host / 3 - forward.total)
    late += max(0.0, more / 3 - mlp.forward.total) + (job.software.expert_waits * gpu.host_wait if has_experts else 0.0)
    forward = forward._replace(launch=late)
    backward = backward._replace(launch=max(0.0, (host + more) * 2 / 3 - backward.total))
    # Two norms, each read and written; gate and up are read, the activation is written.
    residual = job.scattered_tokens * job.model.hidden_size * WIDTH
    parts = {"norms": Seconds(elementwise=kernels.memory(gpu, 4 * residual))}
    parts["activation"] = Seconds(elementwise=kernels.memory(gpu, 3 * _activations(job, kind) * WIDTH))
    parts["moe" if has_experts else "mlp"] = mlp.forward._replace(launch=late if has_experts else 0.0)
    return LayerTime(forward, backward, parts)


def launches(job: Job, kind: LayerKind) -> float:
    """Return how many operators the host starts in forward and backward of a layer."""
    return sum(_launches(job, kind))


def _launches(job: Job, kind: LayerKind) -> tuple[float, float]:
    """Return the operators of a layer, and the further ones of its experts."""
    s, moe, p = job.software, job.model.moe, job.parallel
    conversions = CONVERSION_LAUNCHES[s.conversion] if kind.in_fp8 else 0
    if not kind.has_experts:
        return LAUNCHES[s.elementwise] + 4 * conversions, 0.0
    exchange = EXCHANGE_LAUNCHES if p.expert * p.expert_tensor > 1 else 0
    each = 0.0 if s.grouped_experts else moe.num_experts / p.expert
    experts = ROUTING_LAUNCHES + exchange + each * (EXPERT_LAUNCHES + 2 * conversions)
    if s.grouped_experts and kind.in_fp8:
        experts += 2 * GROUPED_CONVERSION_LAUNCHES[s.conversion]
    return LAUNCHES[s.elementwise] + 2 * conversions, experts


def _activations(job: Job, kind: LayerKind) -> float:
    """Return the elements of the hidden layer of a layer's MLPs on a rank."""
    m, p, moe = job.model, job.parallel, job.model.moe
    if not kind.has_experts:
        return job.tokens * m.ffn_hidden_size / p.tensor
    copies = job.scattered_tokens * moe.top_k * p.expert_tensor
    return copies * moe.ffn_hidden_size / p.expert_tensor + job.tokens * moe.shared_ffn_hidden_size / p.tensor


class _Linear(NamedTuple):
    """A layer's linear map of `tokens` rows from k to n channels."""

    tokens: float
    n: float
    k: float
    is_gathered: bool = False
    """The tokens come from all tensor ranks, in both passes."""


def _linears(
    gpu: GpuConstants, software: Software, maps: list[_Linear], in_fp8: bool, *, experts: float = 0
) -> tuple[float, float, float, float]:
    """Return the seconds of products (forward, backward) and of passes over memory (forward, backward).

    experts: so many maps, each with its own matrix, in one product; 0: a map of every token.
    """
    forward = backward = passes = later = 0.0
    count, precision = experts or 1, "fp8" if in_fp8 else "16-bit"
    is_fused = software.fused_expert_gradients if experts else software.fused_weight_gradients
    for one in maps:
        tokens, n, k, _ = one
        by_torch = in_fp8 and software.conversion != "fused"
        # Bytes that the product moves of an element of the weights' gradient: 8 if it adds to the buffer itself.
        written = (4 if by_torch else 8) if is_fused else 2
        forward += kernels.product(gpu, tokens, n, k, count=count, precision=precision)
        backward += kernels.product(gpu, tokens, k, n, count=count, precision=precision)
        backward += kernels.product(gpu, n, k, tokens, count=count, precision=precision, output_bytes=written)
        if written < 8:  # the product's gradient is read, the buffer read and written
            later += kernels.memory(gpu, count * n * k * (written + 8))
        if experts > 1 and not is_fused and software.elementwise == "ops":
            # The gradients of experts without tokens are set to 0.
            later += kernels.memory(gpu, count * n * k * 4)
        if in_fp8:
            of_group = experts and software.grouped_experts and by_torch
            converted, converted_later = (_grouped_conversions if of_group else _conversions)(software, one)
            passes += kernels.memory(gpu, count * converted)
            later += kernels.memory(gpu, count * converted_later)
    return forward, backward, passes, later


def _conversions(software: Software, one: _Linear) -> tuple[float, float]:
    """Return the bytes that conversions of a map's factors to FP8 move, forward and backward (ops/fp8.py).

    Torch reads an element for the scale (2), reads and writes its quotient (4), and converts it (3); a transposed copy
    moves 2 more. With one scale for a matrix the transpose is a copy; scales of rows and of columns differ.
    """
    tokens, n, k, is_gathered = one
    if software.conversion == "fused":  # inputs and gradients are read, and written as they are and transposed
        return tokens * k * 4, tokens * n * 4
    as_it_is, transposed = 9, 11
    both = transposed if software.conversion == "tensorwise" else as_it_is + transposed
    forward = tokens * k * (as_it_is if is_gathered else both) + n * k * as_it_is
    backward = tokens * n * both + n * k * transposed
    return forward, backward + (tokens * k * transposed if is_gathered else 0.0)


def _grouped_conversions(software: Software, one: _Linear) -> tuple[float, float]:
    """Return the same bytes of one expert's part of a grouped product (ops/grouped_fp8.py).

    Rows in FP8 are copied into a matrix of zeros, whose groups have up to 15 rows more, and results are taken out of
    it. With rowwise scales, the largest magnitudes of a group's columns are found in a pass of their own.
    """
    tokens, n, k, _ = one
    padded = tokens + (FP8_MULTIPLE - 1)
    as_it_is, transposed = 9, 11
    each = 10 * tokens + 5 * padded if software.conversion == "tensorwise" else 28 * tokens + 8 * padded
    taken = 2 * (tokens + padded)
    forward = k * each + n * k * as_it_is + n * taken
    return forward, n * each + n * k * transposed + k * taken


def _attention(gpu: GpuConstants, job: Job, window: int, in_fp8: bool) -> LayerTime:
    m, p, s = job.model, job.parallel, job.software
    gathers = p.sequence and p.tensor > 1
    heads, tokens = m.num_attention_heads / p.tensor, job.tokens
    query, value = m.head_dim, m.head_dim
    groups = max(m.num_query_groups / p.tensor, 1.0)
    maps = [_Linear(tokens, heads * m.head_dim + 2 * groups * m.head_dim, m.hidden_size, gathers)]
    if m.mla.kv_lora_rank:
        a, groups = m.mla, heads
        query, value = a.qk_head_dim + a.qk_rope_head_dim, a.v_head_dim
        latent = a.kv_lora_rank + a.qk_rope_head_dim
        maps = [_Linear(job.scattered_tokens, latent, m.hidden_size)]
        maps.append(_Linear(tokens, heads * (a.qk_head_dim + value), a.kv_lora_rank, gathers))
        if a.q_lora_rank:
            maps.append(_Linear(job.scattered_tokens, a.q_lora_rank, m.hidden_size))
        maps.append(_Linear(tokens, heads * query, a.q_lora_rank or m.hidden_size, gathers))
    maps.append(_Linear(tokens, m.hidden_size, heads * value))
    product, product_back, passes, passes_back = _linears(gpu, s, maps, in_fp8)
    if s.attention == "unfused":
        core, core_back = kernels.unfused_attention(gpu, job.micro_batch_size, heads, job.seq_length, m.head_dim)
    else:
        pairs = job.micro_batch_size * job.documents.pairs(window, job.attention_by_lengths) / p.context
        core, core_back = kernels.attention(gpu, s, pairs, heads, query + value)
    moved, moved_back = _attention_bytes(job, heads, groups, query)
    passes, passes_back = passes + kernels.memory(gpu, moved), passes_back + kernels.memory(gpu, moved_back)
    context, context_back = _context(gpu, job, groups * (query + value), heads * (query + value))
    if s.context_overlap:
        context, context_back = beside(gpu, context, core), beside(gpu, context_back, core_back)
    tensor, tensor_back = _tensor(gpu, job, product)
    forward = Seconds(product, core, passes, 0.0, tensor, context)
    backward = Seconds(product_back, core_back, passes_back, 0.0, tensor_back, context_back)
    return LayerTime(forward, backward, {})


def _attention_bytes(job: Job, heads: float, groups: float, query: int) -> tuple[float, float]:
    """Return the bytes that passes without products move around attention, with half of the residual stream's."""
    m, s, residual = job.model, job.software, job.scattered_tokens * job.model.hidden_size * WIDTH
    q, k = job.tokens * heads * query * WIDTH, job.tokens * groups * query * WIDTH
    if s.elementwise == "2021":
        return 5.5 * residual + 8 * q, 8.5 * residual + 12 * q
    # Norm: read, write; sum with the residual: read twice, write. Backward: norm 3, sum of two gradients 3.
    if s.elementwise == "fused":
        return 5 * residual + 2 * (q + k), 6 * residual + 2 * (q + k)
    forward, backward = 5 * residual, 6 * residual
    if s.elementwise == "ops":  # the norm before the MLP adds: its input is not read again, nor gradients summed apart
        forward, backward = 4 * residual, 4 * residual
    # Copy of the queries out of the joint product 2; gradients of queries, keys and values are put together 2, 4.
    forward, backward = forward + (2 * q if 1 < groups < heads else 0.0), backward + 2 * q + 4 * k
    if m.qk_norm and not m.mla.kv_lora_rank:
        forward, backward = forward + 2 * (q + k), backward + 3 * (q + k)
    # Latent attention rotates a part of the channels by torch, and copies the rest.
    is_op = s.elementwise == "ops" and not m.mla.kv_lora_rank
    rotation = 2 * (q + k) if is_op else 8 * (q + k)
    forward, backward = forward + rotation, backward + rotation
    is_copied = s.attention == "flex" or job.micro_batch_size > 1
    if is_copied:  # of the result
        forward, backward = forward + 2 * q, backward + 2 * q
    if s.attention == "varlen" and groups < heads:  # each head has its own gradient of keys and values, then summed
        backward += 2 * q + 2 * k
    return forward, backward


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


def _mlp(gpu: GpuConstants, job: Job, width: int, in_fp8: bool) -> LayerTime:
    m, p, s = job.model, job.parallel, job.software
    matrices = 2 if s.is_gated else 1
    maps = [
        _Linear(job.tokens, matrices * width / p.tensor, m.hidden_size, p.sequence and p.tensor > 1),
        _Linear(job.tokens, m.hidden_size, width / p.tensor),
    ]
    product, product_back, passes, passes_back = _linears(gpu, s, maps, in_fp8)
    moved, moved_back = _mlp_bytes(job, job.tokens * width / p.tensor)
    tensor, tensor_back = _tensor(gpu, job, product)
    forward = Seconds(product, 0.0, passes + kernels.memory(gpu, moved), 0.0, tensor)
    backward = Seconds(product_back, 0.0, passes_back + kernels.memory(gpu, moved_back), 0.0, tensor_back)
    return LayerTime(forward, backward, {})


def _mlp_bytes(job: Job, activations: float) -> tuple[float, float]:
    """Return the bytes of activation function, norm and residual; activations: elements of the hidden layer."""
    residual = job.scattered_tokens * job.model.hidden_size * WIDTH
    hidden = activations * WIDTH
    if job.software.elementwise == "2021":
        return 5.5 * residual + 2 * hidden, 8.5 * residual + 3 * hidden
    if job.software.elementwise == "torch":  # SwiGLU: silu and a product; backward three, and their halves put together
        return 5 * residual + 5 * hidden, 6 * residual + 13 * hidden
    return 5 * residual + 3 * hidden, 6 * residual + 5 * hidden


def _experts(gpu: GpuConstants, job: Job, in_fp8: bool) -> LayerTime:
    """Return the time of the router, the exchange of tokens, a rank's experts and the shared expert."""
    m, p, s, moe = job.model, job.parallel, job.software, job.model.moe
    tokens = job.scattered_tokens
    copies = tokens * moe.top_k * p.expert_tensor
    local = moe.num_experts / p.expert
    matrices, width = (2 if s.is_gated else 1), moe.ffn_hidden_size / p.expert_tensor
    each = copies / local
    maps = [_Linear(each, matrices * width, m.hidden_size), _Linear(each, m.hidden_size, width)]
    if s.grouped_experts:
        product, product_back, passes, passes_back = _linears(gpu, s, maps, in_fp8, experts=local)
    else:
        product, product_back, passes, passes_back = (local * x for x in _linears(gpu, s, maps, in_fp8, experts=1))
    router = kernels.product(gpu, tokens, moe.num_experts, m.hidden_size)
    moved, moved_back = _mlp_bytes(job, copies * width)
    moves = 2 + _moves_of_a_copy(job) * moe.top_k
    moved += tokens * (m.hidden_size * WIDTH * moves + moe.num_experts * 48)
    # Two gradients of the norm's result, of the router and of the copies, are summed.
    moves_back = moves + (3 if s.elementwise == "ops" else 0)
    moved_back += tokens * (m.hidden_size * WIDTH * moves_back + moe.num_experts * 48)
    exchange = _exchange(gpu, job, tokens)
    device = product + passes
    exposed = beside(gpu, exchange, device) if s.expert_overlap else exchange
    exposed_back = beside(gpu, exchange, product_back) if s.expert_overlap else exchange
    forward = Seconds(product + router, 0.0, passes + kernels.memory(gpu, moved), 0.0, 0.0, 0.0, exposed)
    back = passes_back + kernels.memory(gpu, moved_back)
    backward = Seconds(product_back + 2 * router, 0.0, back, 0.0, 0.0, 0.0, exposed_back)
    if moe.shared_ffn_hidden_size:
        shared = _mlp(gpu, job, moe.shared_ffn_hidden_size, in_fp8)
        forward, backward = forward.plus(shared.forward), backward.plus(shared.backward)
    return LayerTime(forward, backward, {})


def _moves_of_a_copy(job: Job) -> int:
    """Return how often permutations read or write a token's copy for an expert, on the way there and back.

    Copies are gathered, sorted by the expert after the exchange, sorted back, and summed. Fused kernels find the token
    of a copy, or its sum, in the cache; an exchange that sends a token once sorts copies while it makes them.
    """
    s = job.software
    if s.deduplicated_dispatch:
        return 4
    if s.grouped_experts and job.parallel.expert * job.parallel.expert_tensor == 1 and s.elementwise == "ops":
        return 2  # nothing is exchanged: copies are gathered in their last order
    return 6 if s.elementwise == "fused" or (s.elementwise == "ops" and s.grouped_experts) else 8


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
