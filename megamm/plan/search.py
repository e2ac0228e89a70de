"""Enumerates the layouts of a config on a number of GPUs, keeps those that fit, and orders them by predicted speed.

Which layouts are valid is decided by `layout.check` alone. The search space: tensor and expert-tensor parallelism
within a node, always with sequence parallelism; powers of two and divisors for the rest. The model, the data and the
global batch stay as configured. A layout gets the cheapest kind of recomputation with which it fits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megamm.common.errors import UserError
from megamm.common.gpu_constants import GpuConstants
from megamm.config import (
    ParallelConfig,
    Recompute,
    RecomputeConfig,
    RecomputedModule,
    RunConfig,
    recompute_override,
)
from megamm.model import layout
from megamm.plan import job as jobs
from megamm.plan import memory, step_time
from megamm.plan.job import Documents, Job
from megamm.plan.memory import Memory
from megamm.plan.step_time import StepTime

MOST_CHUNKS = 8
"""Interleaved chunks of a stage: more shorten the bubble little and send more."""
MOST_ROWS = 16
"""Rows of a microbatch."""
KEYS = ("tensor", "sequence", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
"""Keys of `parallel` that a plan sets."""
KEPT = ("cp_comm_type", "overlap_param_gather")
"""Keys of `parallel` that a plan leaves as configured."""


@dataclass(frozen=True)
class Plan:
    """A layout that fits, with its prediction. stage: the pipeline stage that needs most memory."""

    config: RunConfig
    job: Job
    stage: int
    memory: Memory
    time: StepTime

    @property
    def tokens_per_second(self) -> float:
        """Tokens of a second on one GPU."""
        job = self.job
        return job.global_batch_size * job.seq_length / (self.time.total * job.world_size)

    @property
    def overrides(self) -> list[str]:
        """The layout as `key=value`, for `megamm train CONFIG`."""
        p, t = self.config.parallel, self.config.train
        lines = [f"parallel.{key}={str(getattr(p, key)).lower()}" for key in KEYS]
        lines.append("parallel.layers_per_chunk=[]")
        return [*lines, f"train.micro_batch_size={t.micro_batch_size}", recompute_override(t.recompute)]


def without_variants(plans: Sequence[Plan]) -> list[Plan]:
    """Return the fastest of the plans that differ only in the number of interleaved chunks."""
    found: dict[tuple[int, ...], Plan] = {}
    for plan in plans:
        p = plan.config.parallel
        key = (p.tensor, p.context, p.pipeline, p.expert, p.expert_tensor, plan.job.micro_batch_size)
        found.setdefault(key, plan)
    return list(found.values())


@dataclass(frozen=True)
class Search:
    """Result of a search: plans from the fastest to the slowest, and how many layouts were considered."""

    plans: list[Plan]
    valid: int
    """Layouts that the product accepts."""
    smallest: float
    """Least memory in bytes that one of them needs."""


def search(
    gpu: GpuConstants,
    config: RunConfig,
    world_size: int,
    vocabulary_size: int,
    documents: Documents,
    gpus_per_node: int,
) -> Search:
    """Return all plans that fit. UserError if no layout is valid, and for a precision or engine that is not planned."""
    if config.train.precision == "fp32":
        raise UserError("megamm plan needs train.precision=bf16 or fp8", remedy="add train.precision=bf16")
    if config.train.precision == "fp8" and gpu.peak_flops_fp8 <= gpu.peak_flops:
        raise UserError(
            f"train.precision=fp8: {gpu.name} has no FP8 products", remedy="set train.precision=bf16, or another --gpu"
        )
    if config.engine != "native":
        raise UserError(f"megamm plan does not support engine={config.engine}", remedy="set engine=native")
    splits: dict[tuple[int, int], list[int]] = {}
    plans, valid, smallest = list[Plan](), 0, float("inf")
    refused: UserError | None = None
    for one in layouts(config, world_size, gpus_per_node):
        try:
            layout.check(one, world_size)
        except UserError as error:
            refused = refused or error
            continue
        valid += 1
        key = (one.parallel.pipeline, one.parallel.virtual_pipeline)
        if key not in splits:
            splits[key] = layout.layers_per_chunk(one, vocabulary_size)
        for recompute in recomputations(one):
            tried = one.model_copy(update={"train": one.train.model_copy(update={"recompute": recompute})})
            job = jobs.of_config(tried, world_size, vocabulary_size, documents, splits[key], gpus_per_node)
            stage, needed = memory.peak(job)
            smallest = min(smallest, needed.total)
            if needed.total <= memory.usable(gpu, job):
                plans.append(Plan(tried, job, stage, needed, step_time.predict(gpu, job)))
                break
    if not valid:
        assert refused is not None, "one GPU a model is always a layout"
        raise UserError(f"no layout of {world_size} GPUs is valid: {refused.what}", remedy=refused.remedy)
    plans.sort(key=lambda plan: plan.time.total)
    return Search(plans, valid, smallest)


def recomputations(config: RunConfig) -> list[Recompute]:
    """Return the values of train.recompute to try, from the least to the most recomputation."""
    m = config.model
    cheap: list[RecomputedModule] = ["norms", "activation"] if m.activation == "silu" else ["norms"]
    whole: list[RecomputedModule] = ["norms"]
    if m.moe.num_experts == 0 or m.moe.dense_layers:
        whole.append("mlp")
    if m.moe.num_experts:
        whole.append("moe")
    return ["none", RecomputeConfig(modules=cheap), RecomputeConfig(modules=whole), "full"]


def layouts(config: RunConfig, world_size: int, gpus_per_node: int) -> Iterator[RunConfig]:
    """Yield configs with the layouts of the search space, valid or not."""
    m, t = config.model, config.train
    experts = _divisors(m.moe.num_experts) if m.moe.num_experts else [1]
    for tensor in _divisors(world_size, gpus_per_node):
        for pipeline in _divisors(world_size // tensor, m.num_layers):
            for context in _divisors(world_size // (tensor * pipeline)):
                data = world_size // (tensor * pipeline * context)
                sizes = dict(tensor=tensor, sequence=tensor > 1, pipeline=pipeline, context=context)
                for chunks in range(1, 1 + (min(MOST_CHUNKS, m.num_layers // pipeline) if pipeline > 1 else 1)):
                    for rows in _powers(min(MOST_ROWS, t.global_batch_size // data)):
                        train = t.model_copy(update={"micro_batch_size": rows})
                        for expert in experts:
                            for split in sorted({1, tensor}) if m.moe.num_experts else [1]:
                                more = dict(virtual_pipeline=chunks, expert=expert, expert_tensor=split)
                                kept = {key: getattr(config.parallel, key) for key in KEPT}
                                parallel = ParallelConfig(**sizes, **more, **kept)
                                yield config.model_copy(update={"parallel": parallel, "train": train})


def _divisors(n: int, most: int | None = None) -> list[int]:
    return [d for d in range(1, min(n, most or n) + 1) if n % d == 0]


def _powers(most: int) -> list[int]:
    return [2**i for i in range(max(most, 0).bit_length())]
