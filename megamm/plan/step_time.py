"""Predicted time of a training step: all microbatches through the pipeline, reductions, the update.

The slowest stage sets the pace: step = microbatches x its time + one pass of the other stages, divided by the chunks
of a stage (the bubble) + what the reduction of gradients, the update and the gather of parameters add.
Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2 (interleaved schedule).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from megamm.common.gpu_constants import GpuConstants
from megamm.model.flops import flops_of_row
from megamm.plan import kernels, layer_time, network, rank_parameters
from megamm.plan.job import Job, LayerKind
from megamm.plan.layer_time import WIDTH, LayerTime, Seconds, beside
from megamm.plan.network import Group
from megamm.plan.rank_parameters import RankParameters

LOSS_CHUNKS, LOSS_ROWS = 24, 340
"""Most chunks of rows of the output layer, and their fewest rows (megamm/ops/cross_entropy.py)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest stage, by cause."""

    product: float
    attention: float
    elementwise: float
    launch: float
    """The device waits for the host."""
    tensor: float
    context: float
    expert: float
    recompute: float
    pipeline: float
    """Sends between stages, as far as they are exposed."""
    bubble: float
    gradients: float
    """Reduction over data-parallel ranks, as far as it is exposed."""
    update: float
    """Optimizer, gradient norm, zeroing of gradients."""
    parameters: float
    """Gather of the updated parameters, as far as it is exposed."""

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


def predict(gpu: GpuConstants, job: Job) -> StepTime:
    """Return the predicted time of a step."""
    p, s = job.parallel, job.software
    layers = {kind: layer_time.of_layer(gpu, job, kind) for kind in job.kinds}
    stages = [_stage(gpu, job, stage, layers) for stage in range(p.pipeline)]
    slowest = max(stages, key=lambda one: one.total)
    sends = _sends(gpu, job)
    rest = sum(one.total + sends for one in stages) - slowest.total - sends
    work, n = slowest.work.times(job.microbatches), job.microbatches
    parameters = [rank_parameters.of_stage(job, stage) for stage in range(p.pipeline)]
    gradients, gathers, update = (
        max(column) for column in zip(*(_finish(gpu, job, x) for x in parameters), strict=True)
    )
    if s.gradient_overlap:  # beside the backward pass of the last microbatch; the last bucket comes after it
        gradients = gradients / 16 + beside(gpu, gradients * 15 / 16, 0.6 * slowest.total)
    if s.parameter_overlap:
        gathers = gathers / 16 + beside(gpu, gathers * 15 / 16, 0.3 * slowest.total)
    if s.sharded_parameters:
        gradients, gathers = _sharded(gpu, job, slowest), 0.0
    return StepTime(
        *work,
        recompute=slowest.recompute * n,
        pipeline=sends * n,
        bubble=rest / p.virtual_pipeline,
        gradients=gradients,
        update=update,
        parameters=gathers,
    )


@dataclass(frozen=True)
class _Stage:
    """One microbatch on a stage, forward and backward."""

    work: Seconds
    recompute: float

    @property
    def total(self) -> float:
        return self.work.total + self.recompute


def _stage(gpu: GpuConstants, job: Job, stage: int, layers: Mapping[LayerKind, LayerTime]) -> _Stage:
    work, repeated = Seconds(), 0.0
    is_last = stage == job.parallel.pipeline - 1
    share = job.software.recomputed_share
    for kind, one in layers.items():
        count = sum(chunk.get(kind, 0) for chunk in job.chunks_of(stage))
        count += job.model.mtp.num_layers if is_last and kind == job.last_kind else 0
        work = work.plus(one.forward.plus(one.backward).times(count))
        repeated += count * (share * one.forward.total if share >= 0 else one.repeated(job).total)
    if stage == 0:
        work = work.plus(_embedding(gpu, job))
    if is_last:
        work = work.plus(_head(gpu, job).times(1 + job.model.mtp.num_layers))
    return _Stage(work, repeated)


def _embedding(gpu: GpuConstants, job: Job) -> Seconds:
    hidden = job.model.hidden_size * WIDTH
    passes = kernels.memory(gpu, 6 * job.tokens * hidden)
    group = Group.of(job.parallel.tensor, 1, job.gpus_per_node)
    return Seconds(elementwise=passes, tensor=2 * network.ring(gpu, group, job.tokens * hidden))


def _head(gpu: GpuConstants, job: Job) -> Seconds:
    """Return the time of the output layer and the loss, with the final norm."""
    m, p, s = job.model, job.parallel, job.software
    columns, tokens = job.vocabulary_size / p.tensor, job.tokens
    group = Group.of(p.tensor, 1, job.gpus_per_node)
    # The input is gathered and its gradient scattered; without the fused loss the input is gathered again.
    exchange = (2 if s.fused_loss else 3) * network.ring(gpu, group, tokens * m.hidden_size * WIDTH)
    if not s.fused_loss:
        product = kernels.product(gpu, tokens, columns, m.hidden_size)
        product += kernels.product(gpu, tokens, m.hidden_size, columns) + kernels.product(
            gpu, columns, m.hidden_size, tokens
        )
        # Logits in float32: written, read for maximum, sum and gradient.
        return Seconds(product=product, elementwise=kernels.memory(gpu, 24 * tokens * columns), tensor=exchange)
    chunks = max(1, min(LOSS_CHUNKS, tokens // LOSS_ROWS))
    rows = tokens / chunks
    product = kernels.product(gpu, rows, columns, m.hidden_size) + kernels.product(gpu, rows, m.hidden_size, columns)
    product += kernels.product(gpu, columns, m.hidden_size, rows, output_bytes=8)
    # The gradient of the weights is scaled, rounded and added to the buffer once.
    passes = kernels.memory(gpu, 8 * tokens * columns + 26 * columns * m.hidden_size)
    return Seconds(product=chunks * product, elementwise=passes, tensor=exchange)


def _sends(gpu: GpuConstants, job: Job) -> float:
    """Return the exposed seconds in which a microbatch's activations and gradients pass from stage to stage."""
    p = job.parallel
    if p.pipeline == 1:
        return 0.0
    moved = job.tokens * job.model.hidden_size * WIDTH / p.tensor  # tensor ranks send parts
    is_within = job.world_size <= job.gpus_per_node
    seconds = 2 * p.virtual_pipeline * network.send(gpu, moved, is_within)
    # Only the interleaved schedule sends beside computation.
    is_hidden = job.software.pipeline_overlap and p.virtual_pipeline > 1
    return gpu.overlap_cost * seconds if is_hidden else seconds


def _groups(job: Job) -> tuple[Group, Group]:
    """Return the groups over which gradients are reduced: of dense parameters and of experts."""
    p = job.parallel
    dense = Group.of(job.data * p.context, p.tensor, job.gpus_per_node)
    replicas = job.world_size // (p.pipeline * p.expert * p.expert_tensor)
    return dense, Group.of(replicas, p.expert * p.expert_tensor, job.gpus_per_node)


def _finish(gpu: GpuConstants, job: Job, parameters: RankParameters) -> tuple[float, float, float]:
    """Return the seconds that reduce gradients, gather parameters and update them on a rank, one after another."""
    s, reduced, gathered, owned = job.software, 0.0, 0.0, 0.0
    for held, group in zip(parameters, _groups(job), strict=True):
        if s.sharded_optimizer:
            reduced += network.ring(gpu, group, held * s.gradient_bytes)
            gathered += network.ring(gpu, group, held * WIDTH)
            owned += held / group.size
        else:
            reduced += network.all_reduce(gpu, group, held * s.gradient_bytes)
            owned += held
    # Zeroing and scaling of all gradients; norm, clipping and Adam (weights, two moments, 16-bit copy) of the own.
    update = kernels.memory(gpu, 12 * parameters.total + (42 + _moment_bytes(job)) * owned)
    if job.offloads_moments:  # to the device and back, not beside each other (mcore/adam.py)
        update += 2 * 2 * job.moment_bytes * owned / gpu.host_bandwidth
    return reduced, gathered, update


def _moment_bytes(job: Job) -> int:
    """Return the bytes that conversions of a parameter's two moments to float32 and back move on the device."""
    return 2 * 2 * (4 + job.moment_bytes) if job.moment_bytes < 4 else 0


def _sharded(gpu: GpuConstants, job: Job, stage: _Stage) -> float:
    """Return the exposed seconds of FSDP: each microbatch gathers all parameters twice; the last reduces gradients."""
    held = rank_parameters.of_stage(job, 0).total
    group = Group.of(job.data, 1, job.gpus_per_node)
    each = 2 * network.ring(gpu, group, held * WIDTH)
    layers = job.model.num_layers
    exposed = each / layers + beside(gpu, each, stage.total)
    reduced = network.ring(gpu, group, held * job.software.gradient_bytes)
    return exposed * job.microbatches + reduced / layers + beside(gpu, reduced, 0.6 * stage.total)


def flops(job: Job) -> float:
    """Return the model's FLOPs of a step, without recomputation; attention inside documents, half of it masked."""
    documents = job.documents
    row = flops_of_row(job.model, job.vocabulary_size, job.seq_length, documents.lengths)
    if documents.rows > 1:
        rest = flops_of_row(job.model, job.vocabulary_size, job.seq_length, ())
        row = rest + (row - rest) / documents.rows
    return row * job.global_batch_size


def utilization(gpu: GpuConstants, job: Job, seconds: float) -> float:
    """Return the share of the GPUs' peak that a step of this time reaches (MFU): in fp8 of that of FP8 products."""
    peak = gpu.peak_flops_fp8 if job.software.precision == "fp8" else gpu.peak_flops
    return flops(job) / (seconds * job.world_size * peak)
