"""Tables of plans: layout, memory and speed; where the time of a step goes; what was assumed."""

from dataclasses import fields
from typing import TYPE_CHECKING

from megamm.common.gpu_constants import GIB, GpuConstants
from megamm.config import Recompute
from megamm.plan import memory, step_time
from megamm.plan.search import Plan, Search

if TYPE_CHECKING:
    from rich.table import Table

SECONDS_PER_DAY = 86400
CAUSES = {
    "product": "products",
    "attention": "attention",
    "elementwise": "elementwise",
    "launch": "host",
    "tensor": "TP",
    "context": "CP",
    "expert": "EP",
    "recompute": "recompute",
    "pipeline": "PP sends",
    "bubble": "bubble",
    "gradients": "gradients",
    "update": "optimizer",
    "parameters": "gather",
}
"""Column of each field of StepTime."""


def layouts(gpu: GpuConstants, plans: list[Plan], tokens: float) -> "Table":
    """Return one row per plan; tokens: of the whole run, for its days."""
    table = _table("layout", "TP", "CP", "PP", "DP", "EP", "ETP", "microbatch", "recompute", "GiB", "s/step")
    for name in ("tokens/s/GPU", "MFU %", f"days for {tokens:.3g} tokens"):
        table.add_column(name, justify="right")
    for number, plan in enumerate(plans, 1):
        p, job, seconds = plan.config.parallel, plan.job, plan.time.total
        days = tokens / (job.global_batch_size * job.seq_length) * seconds / SECONDS_PER_DAY
        pipeline = f"{p.pipeline}x{p.virtual_pipeline}" if p.virtual_pipeline > 1 else str(p.pipeline)
        row = [number, p.tensor, p.context, pipeline, job.data, p.expert, p.expert_tensor]
        row += [
            f"{job.micro_batch_size} x {job.microbatches}",
            _recomputed(job.recompute),
            f"{plan.memory.total / GIB:.1f}",
        ]
        row += [f"{seconds:.2f}", f"{plan.tokens_per_second:,.0f}"]
        row += [f"{100 * step_time.utilization(gpu, job, seconds):.1f}", f"{days:.1f}"]
        table.add_row(*map(str, row))
    return table


def _recomputed(recompute: Recompute) -> str:
    return recompute if isinstance(recompute, str) else "+".join(recompute.modules)


def breakdown(plans: list[Plan]) -> "Table":
    """Return the share of each cause in the time of a step, in percent; causes without time have no column."""
    used = [f.name for f in fields(plans[0].time) if any(getattr(plan.time, f.name) for plan in plans)]
    table = _table("% of step", *(CAUSES[name] for name in used))
    for number, plan in enumerate(plans, 1):
        shares = [f"{100 * getattr(plan.time, name) / plan.time.total:.1f}" for name in used]
        table.add_row(str(number), *shares)
    return table


def summary(gpu: GpuConstants, found: Search, shown: int) -> list[str]:
    """Return lines on the search and on what the numbers assume."""
    plan = found.plans[0]
    documents, name = plan.job.documents, gpu.name
    lengths = f"{documents.mean_length:,.0f} tokens on average, from the run's data"
    if not documents.are_measured:
        lengths = f"{documents.mean_length:,.0f} tokens, as long as a row: the data were not read"
    fitted = sum("fitted" in source or source.startswith("that of") for source in gpu.sources.values())
    assumed = sum(source.startswith("assumed") for source in gpu.sources.values())
    left = memory.usable(gpu, plan.job) / GIB
    lines = [
        f"{found.valid:,} layouts are valid, {len(found.plans):,} fit; the fastest {shown} are shown",
        f"memory of {name}: {gpu.memory / GIB:.1f} GiB, of which layout 1 leaves {left:.1f} GiB for tensors; "
        "the context, NCCL and fragmentation take the rest",
        f"documents: {lengths}",
        f"constants of {name}: {len(gpu.sources)}, of them {fitted} fitted to published runs and {assumed} assumed; "
        "predictions, not measurements (docs/planning.md)",
    ]
    if plan.job.model.moe.num_experts:
        what = "experts: published runs took 0.8 to 1.4 times as long as predicted, those of one program 2.8 times"
        lines.append(f"{what} (docs/planning.md)")
    return lines


def _table(*columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right")
    return table
