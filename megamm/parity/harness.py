"""Proves a case: runs N gloo ranks and one rank from the same weights and batches, and compares every number.

The one-rank reference of a model, mix and batch is computed once and used for every layout.
"""

import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
from safetensors import safe_open

from megamm.common.errors import UserError
from megamm.parity import diagnose
from megamm.parity.case import BOUNDS, Case, CaseOutcome, ParityJob, RankReport, Run
from megamm.parity.rows import MODALITIES
from megamm.parity.worlds import WorldFailure, Worlds

TIE = 1e-5
"""Routing scores closer than this could be ordered differently because of rounding: such a draw is not used."""
_DRAWS = 8


class RunFailed(Exception):
    """A world crashed or hung."""

    def __init__(self, failure: WorldFailure) -> None:
        self.failure = failure
        super().__init__(failure.kind)


class Harness:
    """A server of worlds and the references computed so far; it is a context manager."""

    def __init__(self, worlds: Worlds | None = None, timeout: float = 120.0) -> None:
        """worlds: a server that the caller stops; without it, one is started and stopped here.

        timeout: seconds after which a run counts as hanging.
        """
        self._own, self._timeout = ExitStack(), timeout
        self._worlds = worlds or self._own.enter_context(Worlds())
        self._folder = Path(self._own.enter_context(tempfile.TemporaryDirectory(prefix="megamm-parity-")))
        self._references: dict[str, RankReport] = {}

    def __enter__(self) -> "Harness":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._own.close()

    def prove(self, case: Case, fault: Callable[[], None] | None = None, explain: bool = True) -> CaseOutcome:
        """Compare the case with its reference; on a mismatch report the cause (if explain) and the errors.

        fault: called first in every rank (for tests of the harness).
        """
        begin = time.monotonic()
        outcome = CaseOutcome(case.line(), "proven")
        try:
            run, one = self._drawn(case.run())
            reports = self.compute(run, fault)
            outcome.findings = compare(reports, one, self.shapes(run.reference()))
            outcome.coordinates = [r.coordinates for r in reports]
            for report in reports:
                outcome.worst |= {k: max(v, outcome.worst.get(k, 0.0)) for k, v in report.worst.items()}
            if outcome.findings:
                outcome.verdict = "mismatch"
                if explain:
                    outcome.findings = diagnose.explain(self, run, reports, fault) + outcome.findings
        except UserError as error:
            outcome.verdict, outcome.findings = "refused", [error.what]
        except RunFailed as failed:
            outcome.verdict, outcome.findings = failed.failure.kind, failed.failure.lines()
        outcome.seconds = time.monotonic() - begin
        return outcome

    def compute(
        self,
        run: Run,
        fault: Callable[[], None] | None = None,
        with_values: bool = False,
        first_step_only: bool = False,
    ) -> list[RankReport]:
        """Run the ranks and compare them with the reference. RunFailed if a world fails."""
        self.reference(run.reference())
        # The ranks compare their own tensors with the file, so that only differences travel to this process.
        path = self.path(run.reference())
        job = ParityJob(run, path, fault=fault, with_values=with_values, first_step_only=first_step_only)
        return self._work(run.world, job)

    def reference(self, run: Run) -> RankReport:
        """Return the report of a one-rank run, computed if not yet known. RunFailed if its world fails."""
        name = run.name()
        if name not in self._references:
            self._references[name] = self._work(1, ParityJob(run, self.path(run), makes_reference=True))[0]
        return self._references[name]

    def path(self, run: Run) -> Path:
        """Return the file of a reference's tensors."""
        return self._folder / f"{run.name()}.safetensors"

    def shapes(self, run: Run) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a reference's whole tensors."""
        with safe_open(self.path(run), framework="numpy") as file:
            names = [name for name in file.keys() if name.startswith("start/")]  # noqa: SIM118 - not a mapping
            return {name.removeprefix("start/"): tuple(file.get_slice(name).get_shape()) for name in names}

    def _drawn(self, run: Run) -> tuple[Run, RankReport]:
        """Return the run with a seed whose routing has no near ties, and its reference."""
        for draw in range(_DRAWS):
            candidate = replace(run, seed=run.seed + 1000 * draw)
            report = self.reference(candidate.reference())
            if report.margin > TIE:
                return candidate, report
        raise AssertionError(f"near ties in the routing of {_DRAWS} draws: {run}")

    def _work(self, size: int, job: ParityJob) -> list[RankReport]:
        answer = self._worlds.run(size, _compute, job, timeout=self._timeout)
        if isinstance(answer, WorldFailure):
            raise RunFailed(answer)
        return answer


def _compute(job: ParityJob) -> RankReport:
    """Run the job in a rank. Megatron-core may only be imported there, because only there it is adapted."""
    from megamm.parity import rank

    return rank.compute(job)


def compare(reports: Sequence[RankReport], one: RankReport, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Return the differences from the reference, one line for each kind and tensor."""
    found = sorted({text for r in reports for text in r.strange})
    found += _scalars(reports, one) + _coverage(reports, shapes)
    # Each token is routed by one rank: the ranks' counts add up to the reference's.
    routed = sum((Counter(r.routed) for r in reports), Counter())
    for layer_and_expert in sorted(one.routed.keys() | routed.keys()):
        if routed[layer_and_expert] != one.routed.get(layer_and_expert, 0):
            layer, expert = layer_and_expert
            wanted = one.routed.get(layer_and_expert, 0)
            found.append(f"{layer}: expert {expert} got {routed[layer_and_expert]} tokens instead of {wanted}")
    by_tensor = defaultdict(list)
    for number, report in enumerate(reports):
        for d in report.differences:
            by_tensor[d.what, d.step, d.extent.key].append((d.error, number, d.ratio))
    for (what, step, key), errors in by_tensor.items():
        worst, _, ratio = max(errors)
        ranks = sorted({number for _, number, _ in errors})
        found.append(
            f"{what} of {key} after step {step}: relative error {worst:.1e}, ratio {ratio:.4g}, on ranks {ranks}"
        )
    return found


def _scalars(reports: Sequence[RankReport], one: RankReport) -> list[str]:
    found = {}
    for number, report in enumerate(reports):
        for step, (loss, count, norm) in enumerate(zip(report.loss, report.count, report.grad_norm, strict=True)):
            for name, ours, theirs in zip(MODALITIES, count, one.count[step], strict=True):
                if ours != theirs:
                    what = f"token count of modality {name}"
                    found[what] = f"{what} at step {step + 1}: {ours:g} instead of {theirs:g} (rank {number})"
            for name, ours, theirs in zip(MODALITIES, loss, one.loss[step], strict=True):
                what = f"loss of modality {name}"
                _bound(found, report, "loss", f"{what} at step {step + 1}", ours, theirs, number)
            _bound(
                found, report, "gradient norm", f"gradient norm at step {step + 1}", norm, one.grad_norm[step], number
            )
    return list(found.values())


def _bound(
    found: dict[str, str], report: RankReport, kind: str, what: str, ours: float, theirs: float, rank: int
) -> None:
    if np.isnan(ours) and np.isnan(theirs):
        return
    error = abs(ours - theirs) / max(abs(theirs), 1e-30) if ours != theirs else 0.0
    report.worst[kind] = max(report.worst.get(kind, 0.0), error)
    if not error <= BOUNDS[kind]:
        found[what] = f"{what}: {ours:.8g} instead of {theirs:.8g}, relative error {error:.1e} (rank {rank})"


def _coverage(reports: Sequence[RankReport], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Check that main replicas cover every element of every whole tensor once, so that all of it was compared."""
    owned = {key: np.zeros(shape, np.int32) for key, shape in shapes.items()}
    found = []
    for report in reports:
        for e in report.extents:
            if e.key not in owned:
                found.append(f"{e.key} is not a tensor of the reference")
            elif e.is_main:
                owned[e.key][e.box()] += 1
    wrong = [key for key, count in owned.items() if not (count == 1).all()]
    return sorted(set(found)) + [f"elements of {key} are owned by no rank, or by several" for key in wrong]
