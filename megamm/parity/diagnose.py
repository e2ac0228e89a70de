"""Finds the cause when the numbers of a case differ from its reference.

It checks in this order: the inputs of attention; gradients that lack a sum over a group (replicas differ, and their sum
is the reference); parts of the loss whose gradient has a wrong factor (found by running each part alone); parts that
are normalised over less than the job (found by computing the result of that error).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from megamm.parity.case import Extent, RankReport, Run, TensorDifference
from megamm.parity.rows import MODALITIES

if TYPE_CHECKING:
    from megamm.parity.harness import Harness

Array = npt.NDArray[Any]
Fault = Callable[[], None] | None
_SAME = 1e-4  # relative distance at which an explanation holds
_DENSE_AXES = ("tensor", "context", "data", "pipeline")
_EXPERT_AXES = ("expert tensor", "expert", "expert data", "pipeline")


def explain(harness: "Harness", run: Run, reports: Sequence[RankReport], fault: Fault) -> list[str]:
    """Return the causes found, most likely first, or a line that says that none was found."""
    if any(r.strange for r in reports):
        return []  # already reported by the ranks; all other differences follow from it
    valued = harness.compute(run, fault, with_values=True, first_step_only=True)
    reference = _Reference(harness, run)
    found = _missing_sums(valued, reference)
    if not found:
        for name, part in _parts(run):
            found += _wrong_part(harness, name, part, fault)
    return found or ["no known cause explains the difference"]


class _Reference:
    """Gradients of the first step of a run's reference, by extent."""

    def __init__(self, harness: "Harness", run: Run) -> None:
        harness.reference(run.reference())
        with safe_open(harness.path(run.reference()), framework="numpy") as file:
            names = [name for name in file.keys() if name.startswith("gradient/")]  # noqa: SIM118 - not a mapping
            self.tensors = {name.removeprefix("gradient/"): file.get_tensor(name) for name in names}

    def block(self, extent: Extent) -> Array:
        return self.tensors[extent.key][extent.box()]


def _missing_sums(reports: Sequence[RankReport], reference: _Reference) -> list[str]:
    """Find tensors whose replicas along some axes of the device mesh differ and sum to the reference."""
    blocks: dict[tuple[str, tuple[int, ...]], dict[int, TensorDifference]] = defaultdict(dict)
    for rank, report in enumerate(reports):
        for d in report.differences:
            if d.what == "gradient":
                blocks[d.extent.key, d.extent.offset][rank] = d
    tensors = defaultdict(set)
    for wrong in blocks.values():
        extent = next(iter(wrong.values())).extent
        theirs = reference.block(extent)
        # A rank that reports no difference has the reference's values.
        held = {r: theirs for r, report in enumerate(reports) for e in report.extents if _is_replica(e, extent)}
        held |= {rank: d.values for rank, d in wrong.items() if d.values is not None}
        for axes in _axes(reports, is_expert=".experts." in extent.key):
            if _sums_to(theirs, held, reports, axes):
                tensors[axes].add(extent.key)
                break
    return [
        f"a sum over the {' x '.join(axes)} parallel group is missing: gradient of {', '.join(sorted(keys))}"
        for axes, keys in tensors.items()
    ]


def _is_replica(one: Extent, other: Extent) -> bool:
    return (one.key, one.offset, one.size) == (other.key, other.offset, other.size)


def _axes(reports: Sequence[RankReport], is_expert: bool) -> list[tuple[str, ...]]:
    """Return the axes along which replicas may exist, smallest groups first."""
    if is_expert:
        candidates: list[tuple[str, ...]] = [("expert data",), ("expert tensor",), ("expert",)]
    else:
        candidates = [("data",), ("context",), ("tensor",), ("pipeline",), ("data", "context")]
    return [axes for axes in candidates if all(reports[0].sizes[a] > 1 for a in axes)]


def _sums_to(theirs: Array, held: dict[int, Array], reports: Sequence[RankReport], axes: tuple[str, ...]) -> bool:
    mesh_axes = _EXPERT_AXES if axes[0].startswith("expert") else _DENSE_AXES
    groups = defaultdict(list)
    for rank, values in held.items():
        groups[tuple(reports[rank].coordinates[a] for a in mesh_axes if a not in axes)].append(values)
    # Replicas that another sum has made equal count once.
    partial = [_distinct(values) for values in groups.values()]
    return all(len(values) > 1 and _near(np.sum(values, axis=0), theirs) for values in partial)


def _distinct(values: list[Array]) -> list[Array]:
    kept: list[Array] = []
    for value in values:
        if not any(_near(value, other) for other in kept):
            kept.append(value)
    return kept


def _near(ours: Array, theirs: Array) -> bool:
    return bool(np.linalg.norm(ours - theirs) <= _SAME * np.linalg.norm(theirs))


def _parts(run: Run) -> Iterator[tuple[str, Run]]:
    """Yield each part of the loss: its name and a run with only this part."""
    settings = dict(run.settings)
    has_aux, has_mtp = bool(settings.get("model.moe.aux_loss_coeff")), bool(settings.get("model.mtp.num_layers"))
    bare = {k: v for k, v in settings.items() if k != "model.moe.aux_loss_coeff"}
    if has_mtp:
        bare["model.mtp.loss_weight"] = 0.0
    for i, name in enumerate(MODALITIES):
        weights = tuple(w if j == i else 0.0 for j, w in enumerate(run.weights))
        if any(any(kind[i] for kind in rows) for rows in run.rows[:1]):
            yield f"modality {name}", replace(run, weights=weights, settings=_frozen(bare))
    if has_aux:
        aux = bare | {"model.moe.aux_loss_coeff": settings["model.moe.aux_loss_coeff"]}
        yield "the experts' auxiliary loss", replace(run, weights=(0.0,) * len(MODALITIES), settings=_frozen(aux))
    if has_mtp:
        # The weight is so large that the next token's loss is lost in rounding.
        heavy = bare | {"model.mtp.loss_weight": 1e6}
        yield "multi-token prediction", replace(run, settings=_frozen(heavy))


def _frozen(settings: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(settings.items()))


def _wrong_part(harness: "Harness", name: str, part: Run, fault: Fault) -> list[str]:
    """Return what is wrong with the gradient of one part of the loss, run alone: at most one line.

    A gradient is linear in the parts of the loss, so an error of one part shows alone in a run with only this part. The
    explanations are tried from the most to the least specific.
    """
    reports = harness.compute(part, fault, with_values=True, first_step_only=True)
    # The ratio is NaN where the reference is 0: a factor cannot explain such a block.
    wrong = [d for r in reports for d in r.differences if d.what == "gradient" and not np.isnan(d.ratio)]
    if not wrong:
        return []
    return [
        _common_factor(harness, name, part, wrong, reports[0])
        or _wrong_normalisation(harness, name, part, wrong)
        or _largest_error(name, wrong)
    ]


def _common_factor(
    harness: "Harness", name: str, part: Run, wrong: Sequence[TensorDifference], report: RankReport
) -> str | None:
    """Explain the differences by one factor: all wrong blocks are the same multiple of the reference."""
    ratios = [d.ratio for d in wrong]
    if not (max(d.residual for d in wrong) < _SAME and max(ratios) - min(ratios) < _SAME):
        return None
    keys = {d.extent.key for d in wrong}
    every = {key for key, gradient in _Reference(harness, part).tensors.items() if gradient.any()}
    where = "" if every <= keys else f" in {', '.join(sorted(keys))}"
    return f"gradient of {name} is multiplied by {ratios[0]:.4g}{_size_named(ratios[0], report)}{where}"


def _wrong_normalisation(harness: "Harness", name: str, part: Run, wrong: Sequence[TensorDifference]) -> str | None:
    """Explain the differences by a mean over each rank or microbatch instead of one over the job."""
    for over, parts in _row_parts(part):
        factor = _normalised_over(harness, part, parts, wrong)
        if factor is not None:
            return f"loss of {name} is normalised per {over}, not over the whole job (sum over them x {factor:.4g})"
    return None


def _largest_error(name: str, wrong: Sequence[TensorDifference]) -> str:
    worst = max(wrong, key=lambda d: d.error)
    return f"gradient of {name} is wrong, not by a factor: {worst.extent.key} by {worst.error:.1e}"


def _size_named(ratio: float, report: RankReport) -> str:
    """Return " (= data parallel size)" if the ratio, or its inverse, is the size of one axis."""
    named = [f"{axis} parallel size" for axis, n in report.sizes.items() if n > 1 and abs(ratio - n) < _SAME * n]
    named += [f"1 / {axis} parallel size" for axis, n in report.sizes.items() if n > 1 and abs(ratio * n - 1) < _SAME]
    return f" (= {' = '.join(named)})" if named else ""


def _row_parts(run: Run) -> Iterator[tuple[str, list[set[int]]]]:
    """Yield partitions of a step's rows over which a wrong loss may be normalised."""
    config = run.config
    micro, data = config.train.micro_batch_size, config.data_parallel(run.world)
    rows = range(config.train.global_batch_size)
    yield "data-parallel rank", [{i for i in rows if i // micro % data == r} for r in range(data)]
    yield "microbatch", [{i for i in rows if i // micro == m} for m in range(len(rows) // micro)]


def _normalised_over(
    harness: "Harness", run: Run, parts: list[set[int]], wrong: Sequence[TensorDifference]
) -> float | None:
    """Return the factor c for which c x (sum of the parts' own mean losses) gives the wrong gradients, or None."""
    # A run with all other rows muted gives the gradient of one part's own mean. The wrong normalisation computes a
    # multiple of the sum of these; least squares finds which.
    everything = frozenset(range(run.config.train.global_batch_size))
    references = [_Reference(harness, replace(run, muted=everything - part)) for part in parts]
    expected = np.concatenate([np.sum([r.block(d.extent) for r in references], axis=0).ravel() for d in wrong])
    ours = np.concatenate([d.values.ravel() for d in wrong if d.values is not None])
    factor = float(ours @ expected / (expected @ expected))
    return factor if _near(ours, factor * expected) else None
