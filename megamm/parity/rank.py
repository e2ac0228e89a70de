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
from megamm.mcore import assemble, observe
from megamm.mcore import groups as grid
from megamm.mcore.assemble import Piece
from megamm.parity import positions
from megamm.parity.case import Run
from megamm.parity.report import BOUNDS, Difference, Extent, Job, RankReport
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches

Tensors = dict[str, torch.Tensor]


def compute(job: Job) -> RankReport:
    """Run the job; every rank of a world calls it."""
    if job.fault:
        job.fault()
    run, config = job.run, job.run.config
    groups = grid.build(config.parallel, seed=run.seed)
    engine: Any = build_engine(config, VOCABULARY, groups, choose("cpu"))
    pieces = assemble.pieces(engine.chunks, groups)
    compare = _Writer(job, pieces) if job.makes_reference else _Comparer(job, pieces)
    compare.start(run.seed)
    engine.optimizer.reload_model_params()
    report = RankReport(*assemble.coordinates(groups))
    report.extents = [Extent(p.key, p.offset, p.size, p.is_main) for p in pieces]
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
        report.strange += positions.strange(seen, batches, config, groups.context_rank)
    if not job.first_step_only:
        compare.see("final", len(run.rows))
    compare.finish(report)
    return report


def _rows(run: Run, step: int) -> list[Any]:
    rows = global_batch(run.seed, step, list(run.rows[step - 1]), run.config.data.seq_length)
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


def _value(what: str, piece: Piece) -> torch.Tensor | None:
    """Return the local tensor to compare, or None: a buffer has no gradient."""
    return getattr(piece.tensor, "main_grad", None) if what == "gradient" else piece.tensor


class _Writer:
    """Draws the initial weights, and keeps whole tensors for the file."""

    def __init__(self, job: Job, pieces: list[Piece]) -> None:
        self.job, self.pieces, self.tensors = job, pieces, Tensors()

    def start(self, seed: int) -> None:
        """Set weights without the symmetries of an initialisation: norm weights of 1 would hide swapped tensors."""
        generator = torch.Generator().manual_seed(seed)
        for piece in self.pieces:
            block = piece.cut(piece.tensor)
            if "norm" in piece.key:
                low = -0.5 if self.job.run.config.model.zero_centered_norm else 0.5
                piece.put(torch.empty_like(block).uniform_(low, low + 1.0, generator=generator))
            elif piece.key.endswith("router.weight"):
                piece.put(torch.empty_like(block).normal_(0, 0.3, generator=generator))
            elif piece.key.endswith("expert_bias"):
                piece.put(torch.empty_like(block).uniform_(-0.1, 0.1, generator=generator))
        self.see("start", 0)

    def see(self, what: str, step: int) -> None:
        for piece in self.pieces:
            value = _value(what, piece)
            if value is not None:
                whole = self.tensors.setdefault(f"{what}/{piece.key}", torch.zeros(piece.shape))
                whole[_box(piece)] = piece.cut(value).float()

    def finish(self, report: RankReport) -> None:
        save_file(self.tensors, self.job.reference)


class _Comparer:
    """Starts from the reference's weights, and records every block that differs from the reference."""

    def __init__(self, job: Job, pieces: list[Piece]) -> None:
        self.job, self.pieces, self.theirs = job, pieces, load_file(job.reference)
        self.differences: list[Difference] = []
        self.worst: dict[str, float] = {}

    def start(self, seed: int) -> None:
        for piece in self.pieces:
            piece.put(self.theirs[f"start/{piece.key}"][_box(piece)])

    def see(self, what: str, step: int) -> None:
        for piece in self.pieces:
            value = _value(what, piece)
            if value is not None:
                self._compare(what, step, piece, piece.cut(value).float())

    def _compare(self, what: str, step: int, piece: Piece, ours: torch.Tensor) -> None:
        whole = self.theirs[f"{what}/{piece.key}"]
        theirs = whole[_box(piece)]
        true = tuple(slice(n) for n in theirs.shape)
        padding = ours.clone()
        padding[true] = 0.0
        ours = ours[true]
        # A layer's or expert's own norm; if it is almost 0, rounding errors depend on its neighbours.
        own = whole[_box(piece)[: piece.stacked]].norm()
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
            extent = Extent(piece.key, piece.offset, piece.size, piece.is_main)
            values = ours.numpy().copy() if self.job.with_values else None
            self.differences.append(Difference(what, step, extent, error, ratio, residual, values))

    def finish(self, report: RankReport) -> None:
        report.differences, report.worst = self.differences, self.worst


def _box(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(start, start + n) for start, n in zip(piece.offset, piece.size, strict=True))
