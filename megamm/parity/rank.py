"""One rank's work for a case: builds the engine, loads the reference's weights, trains, and compares.

The reference is a one-rank run whose tensors are stored in a safetensors file as "<what>/<key>": `start` weights,
`gradient` of the first step, `parameter` after the first and `final` after the last step.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megamm.common.device import choose
from megamm.engine.build import build_engine
from megamm.mcore import observe, process_groups, shard_specs
from megamm.mcore.process_groups import ProcessGroups
from megamm.mcore.shard_specs import ShardSpec
from megamm.parity.case import BOUNDS, Extent, ParityJob, RankReport, Run, TensorDifference
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches, wrong_inputs

Tensors = dict[str, torch.Tensor]


def compute(job: ParityJob) -> RankReport:
    """Run the job; every rank of a world calls it."""
    if job.fault:
        job.fault()
    run, config = job.run, job.run.config
    groups = process_groups.build(config.parallel, seed=run.seed)
    engine: Any = build_engine(config, VOCABULARY, groups, choose("cpu"))
    # The same description as checkpoints use, so that what is compared is what would be stored.
    specs = [spec for chunk in engine.chunks for spec in shard_specs.of(chunk.module, groups)]
    compare = _Writer(job, specs) if job.makes_reference else _Comparer(job, specs)
    compare.start(run.seed)
    # The optimizer's main copies were made from the initial weights, before `start` has set others.
    engine.optimizer.reload_model_params()
    report = RankReport(*_coordinates(groups))
    report.extents = [Extent(p.key, p.offset, p.size, p.is_main) for p in specs]
    weights = torch.tensor(run.weights, dtype=torch.float64)
    restore = _reduce_everywhere(engine)
    for step in range(1, 2 if job.first_step_only else len(run.rows) + 1):
        batches = rank_batches(_rows(run, step), config.train.micro_batch_size, groups.data_rank, groups.data_size)
        with observe.watch(engine.chunks) as seen:
            result = engine.compute_gradients(batches, weights)
            if step == 1:
                compare.see("gradient", 1)
            engine.apply_update()
        if step == 1:
            restore()
            compare.see("parameter", 1)
        _note(report, result, seen, step)
        report.strange += wrong_inputs(seen, batches, config, groups.context_rank)
    if not job.first_step_only:
        compare.see("final", len(run.rows))
    compare.finish(report)
    return report


def _coordinates(groups: ProcessGroups) -> tuple[dict[str, int], dict[str, int]]:
    """Return this rank's coordinate along every axis of the device mesh, and the sizes of the axes."""
    c = groups.collection
    axes = {"tensor": c.tp, "context": c.cp, "data": c.dp, "pipeline": c.pp, "expert": c.ep, "expert tensor": c.expt_tp}
    axes["expert data"] = c.expt_dp
    return {name: g.rank() for name, g in axes.items()}, {name: g.size() for name, g in axes.items()}


def _rows(run: Run, step: int) -> list[Any]:
    config = run.config
    rows = global_batch(run.seed, step, list(run.rows[step - 1]), config.data.seq_length, spans=bool(config.spans))
    return [replace(r, loss_weight=r.loss_weight * 0) if i in run.muted else r for i, r in enumerate(rows)]


def _note(report: RankReport, result: Any, seen: observe.Seen, step: int) -> None:
    report.loss.append(result.loss.mean.tolist())
    report.count.append(result.loss.count.tolist())
    report.grad_norm.append(result.grad_norm)
    report.margin = min(report.margin, seen.margin)
    for (layer, expert), count in seen.routed.items():
        report.routed[f"step {step} layer {layer}", expert] = count


def _reduce_everywhere(engine: Any) -> Callable[[], None]:
    """Reduce all gradients on every rank, not only its ZeRO shard, so that all can be compared.

    Return a function that undoes this, so that later steps run as in training.
    """
    config = engine.chunks[0].config
    finalize = config.finalize_model_grads_func
    config.finalize_model_grads_func = lambda *a, **k: finalize(*a, **(k | {"force_all_reduce": True}))

    def restore() -> None:
        config.finalize_model_grads_func = finalize

    return restore


def _value(what: str, spec: ShardSpec) -> torch.Tensor | None:
    """Return the local tensor to compare, or None: a buffer has no gradient."""
    return getattr(spec.tensor, "main_grad", None) if what == "gradient" else spec.tensor


class _Writer:
    """Draws the initial weights, and keeps whole tensors for the file."""

    def __init__(self, job: ParityJob, specs: list[ShardSpec]) -> None:
        self.job, self.specs, self.tensors = job, specs, Tensors()

    def start(self, seed: int) -> None:
        """Set weights without the symmetries of an initialisation: norm weights of 1 would hide swapped tensors."""
        generator = torch.Generator().manual_seed(seed)
        for spec in self.specs:
            block = _cut(spec, spec.tensor)
            if "norm" in spec.key:
                low = -0.5 if self.job.run.config.model.zero_centered_norm else 0.5
                _put(spec, torch.empty_like(block).uniform_(low, low + 1.0, generator=generator))
            elif spec.key.endswith("router.weight"):
                _put(spec, torch.empty_like(block).normal_(0, 0.3, generator=generator))
            elif spec.key.endswith("expert_bias"):
                _put(spec, torch.empty_like(block).uniform_(-0.1, 0.1, generator=generator))
        self.see("start", 0)

    def see(self, what: str, step: int) -> None:
        for spec in self.specs:
            value = _value(what, spec)
            if value is not None:
                whole = self.tensors.setdefault(f"{what}/{spec.key}", torch.zeros(spec.shape))
                whole[_box(spec)] = _cut(spec, value).float()

    def finish(self, report: RankReport) -> None:
        save_file(self.tensors, self.job.reference)


class _Comparer:
    """Starts from the reference's weights, and records every block that differs from the reference."""

    def __init__(self, job: ParityJob, specs: list[ShardSpec]) -> None:
        self.job, self.specs, self.theirs = job, specs, load_file(job.reference)
        self.differences: list[TensorDifference] = []
        self.worst: dict[str, float] = {}

    def start(self, seed: int) -> None:
        for spec in self.specs:
            _put(spec, self.theirs[f"start/{spec.key}"][_box(spec)])

    def see(self, what: str, step: int) -> None:
        for spec in self.specs:
            value = _value(what, spec)
            if value is not None:
                self._compare(what, step, spec, _cut(spec, value).float())

    def _compare(self, what: str, step: int, spec: ShardSpec, ours: torch.Tensor) -> None:
        whole = self.theirs[f"{what}/{spec.key}"]
        theirs = whole[_box(spec)]
        # A table's padding differs between layouts: common rows are compared, a gradient of further rows must be 0.
        true = tuple(slice(n) for n in theirs.shape)
        padding = ours.clone()
        padding[true] = 0.0
        ours = ours[true]
        # A layer's or expert's own norm; if it is almost 0, rounding errors depend on its neighbours.
        own = whole[_box(spec)[: spec.stacked]].norm()
        scale = torch.maximum(own, 1e-3 * whole.norm()).clamp(min=1e-30)
        error = float((ours - theirs).norm() / scale)
        if what == "gradient":
            error += float(padding.norm())
        name = "gradient" if what == "gradient" else "parameter"
        self.worst[name] = max(self.worst.get(name, 0.0), error)
        if not error <= BOUNDS[name]:
            square = float(theirs.square().sum())
            ratio = float((ours * theirs).sum()) / square if square else float("nan")
            residual = float((ours - ratio * theirs).norm() / scale)
            extent = Extent(spec.key, spec.offset, spec.size, spec.is_main)
            values = ours.numpy().copy() if self.job.with_values else None
            self.differences.append(TensorDifference(what, step, extent, error, ratio, residual, values))

    def finish(self, report: RankReport) -> None:
        report.differences, report.worst = self.differences, self.worst


def _cut(spec: ShardSpec, local: torch.Tensor) -> torch.Tensor:
    """Return the spec's box `[*size]` of a tensor with the local parameter's shape: its value or gradient."""
    return local.detach().flatten()[spec.start : spec.stop].reshape(spec.size)


def _put(spec: ShardSpec, block: torch.Tensor) -> None:
    """Set the local tensor's elements; a block without the vocabulary's padding leaves the padding unchanged."""
    box = spec.tensor.data.view(-1)[spec.start : spec.stop].view(spec.size)
    box[tuple(slice(n) for n in block.shape)].copy_(block)


def _box(spec: ShardSpec) -> tuple[slice, ...]:
    return tuple(slice(start, start + n) for start, n in zip(spec.offset, spec.size, strict=True))
