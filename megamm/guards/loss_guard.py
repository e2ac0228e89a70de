"""The loss guard: a step with a bad loss or gradient is run again, then skipped, rolled back, or ends the run.

It judges a step between its gradients and its update, by numbers that are the same on every rank. So all ranks make the
same decision without communication:

    good                         apply the update
    bad, good in the rerun       a transient hardware fault: apply the update of the rerun
    bad again: skip              no update; the rows count as consumed; the schedule and the moments do not advance
    bad again: rollback          return to a checkpoint from before the rows [bad row - margin, end of the bad rows);
                                 when the run reaches these rows again, it skips them
    bad too often, or stop       UserError: the run ends and is not restarted

All its state is in `state`, a part of each checkpoint: a resumed run makes the same decisions as an uninterrupted one.
Source: Chowdhery et al. 2022, PaLM, section 5.1 (roll back and skip the batches around the spike).

`SpikeDetector` finds bad steps. A rerun from the same state is compared with the first run (`compare`), which finds
the rank with faulty hardware. Megatron-core's rerun state machine has the same purpose. It is not used, because it only
logs its result, reduces a flag over the job in every step, judges values that are not yet summed (so that ranks can
disagree) and updates the routers' balancing bias twice; its documentation calls it experimental.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch

from megamm.common import events
from megamm.common.collectives import Gather
from megamm.common.errors import UserError
from megamm.config import RunConfig
from megamm.elastic.rank import NodeFault
from megamm.engine.api import StepResult

log = logging.getLogger(__name__)
LEAST_DEVIATION = 0.01
"""Smallest deviation for a spike, as a share of the median."""
SAME = 1e-3
"""Relative difference up to which two runs are equal: kernels that add in any order differ by less (as in Megatron)."""
NEAR = 0.1
"""A rank is also suspect if it deviates by at least this share of the largest deviation."""


@dataclass(frozen=True)
class SkippedWindow:
    """Rows [first, end) that changed no weights: read in a step without update ("skip"), or not read ("rollback")."""

    how: str
    first: int
    end: int
    step: int
    why: str


class SpikeDetector:
    """Finds values of a step that are not finite, or far above the last good ones.

    The values are the losses (nats per token) and the gradient norm. A value x is a spike if
    (x - median) / deviation > threshold, over a window of good values, with
    deviation = 1.4826 * median(|value - median|), which is the standard deviation of normally distributed values
    (Hampel 1974). The deviation is at least a hundredth of the median, since steps can be almost equal. Spikes inside
    the window hardly change median and deviation.
    """

    def __init__(self, threshold: float, window: int) -> None:
        """threshold: in deviations; with 0 only values that are not finite are bad. window: in good steps.

        Spikes are detected once the window is half full.
        """
        self.threshold, self.window = threshold, window
        self._good: dict[str, deque[float]] = {}

    def why_bad(self, values: Mapping[str, float]) -> str:
        """Return what is wrong with a step's values, in words; empty if nothing is."""
        for name, value in values.items():
            if not math.isfinite(value):
                return f"{name} {value}"
        for name, value in values.items():
            good = self._good.get(name, ())
            if self.threshold and 2 * len(good) >= self.window:
                median = statistics.median(good)
                spread = 1.4826 * statistics.median(abs(x - median) for x in good)
                deviations = (value - median) / max(spread, LEAST_DEVIATION * abs(median), 1e-30)
                if deviations > self.threshold:
                    return f"{name} {value:.4g} is {deviations:.1f} deviations above the median {median:.4g}"
        return ""

    def note_good(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._good.setdefault(name, deque(maxlen=self.window)).append(value)

    def state(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self._good.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self._good = {name: deque(values, maxlen=self.window) for name, values in state.items()}


@dataclass(frozen=True)
class Comparison:
    """Result of the comparison of a rerun with the first run.

    deviation: largest relative difference of a value, 0 if all have the same bits, inf if only one of the two is
    finite. suspects: the ranks whose own part of the gradient deviates most. If ranks compute one replica together
    (tensor, pipeline, context or expert parallel), a wrong value spreads, and all ranks that it reached are listed.
    """

    deviation: float
    suspects: list[int]

    @property
    def is_same(self) -> bool:
        return self.deviation <= SAME


def compare(
    first: Mapping[str, float],
    rerun: Mapping[str, float],
    own_first: torch.Tensor,
    own_rerun: torch.Tensor,
    gather: Gather,
) -> Comparison:
    """Compare a rerun of a step, from the same state, with the first run.

    first, rerun: values of the job, the same on every rank. own_first, own_rerun: norms of this rank's own gradient,
    float32 `[buckets]`.
    """
    # The values of the job show whether the runs differ; each rank's own gradient shows where.
    deviation = max(_difference(first[name], rerun[name]) for name in first)
    own = max(_difference(a, b) for a, b in zip(own_first.tolist(), own_rerun.tolist(), strict=True))
    ranks = [float(part) for part in gather(torch.tensor(own, dtype=torch.float64, device=own_first.device))]
    return Comparison(deviation, suspects(ranks))


def suspects(deviations: Sequence[float]) -> list[int]:
    """Return the ranks that deviate most, from the deviations of all ranks; none if no rank deviates."""
    most = max(deviations)
    return [rank for rank, value in enumerate(deviations) if most > 0 and (value == most or value >= NEAR * most)]


def _difference(a: float, b: float) -> float:
    """Return the relative difference; two values that are not finite count as equal."""
    if not math.isfinite(a) or not math.isfinite(b):
        return 0.0 if math.isfinite(a) == math.isfinite(b) else math.inf
    return abs(a - b) / max(abs(a), abs(b), 1e-30) if a != b else 0.0


class LossGuard:
    """The loss guard of a run; every rank has one and gives it the result of every step."""

    def __init__(self, config: RunConfig, modalities: Sequence[str], rank: int, gather: Gather) -> None:
        """gather: called only after a rerun."""
        c = self.config = config.resilience.loss_guard
        self.run, self.modalities, self.rank, self.gather = config.output, list(modalities), rank, gather
        self.action = c.action
        if c.action == "auto":
            self.action = "skip" if config.engine == "native" else "stop"
            if rank == 0:
                log.info("loss guard: action %s, because the engine is %s", self.action, config.engine)
        self.spikes = SpikeDetector(c.spike, c.window)
        self.skipped: list[SkippedWindow] = []
        self.updates_skipped = self.skips_in_a_row = self.rollbacks = self.last_bad_step = 0
        self.wanted_rollback: SkippedWindow | None = None
        """Set when the last judged step must be undone."""
        self.fault: NodeFault | None = None
        """Set when a rank's hardware failed and the run should continue without it."""

    def check(
        self,
        step: int,
        first_row: int,
        rows: int,
        result: StepResult,
        recompute: Callable[[], StepResult] | None = None,
    ) -> tuple[StepResult, bool]:
        """Judge the gradients of step `step` (counted from 1), of rows [first_row, first_row + rows).

        Return the result that counts and whether its update may be made. recompute: computes the gradients again; None
        where the engine cannot.
        """
        why = self.spikes.why_bad(self._values(result))
        verdict = "not run again"
        if why and recompute is not None and self.config.rerun:
            first, result = result, recompute()
            comparison = self._compare(first, result)
            why_again, verdict = self.spikes.why_bad(self._values(result)), _verdict(comparison)
            # The same computation gave another result: the hardware is at fault, whether or not the rerun is good.
            if not why_again or not comparison.is_same:
                self._note_fault(step, "unstable" if why_again else "transient", why, comparison)
            why = why_again
        if not why:
            self._note_good(step, result)
            return result, True
        self._act(step, f"{why} ({verdict})", first_row, rows)
        return result, False

    def next_row(self, row: int, rows: int) -> int:
        """Return the first row, from `row` on, from which `rows` rows can be read without a skipped one."""
        # Behind one window the rows may meet another.
        while met := [w for w in self.skipped if w.how == "rollback" and w.first < row + rows and row < w.end]:
            row = max(w.end for w in met)
        return row

    def rolled_back(self, window: SkippedWindow) -> None:
        """Note the skipped rows of a roll-back; call it after `restore` of the earlier checkpoint's state."""
        self.skipped.append(window)
        self.last_bad_step = window.step
        self.wanted_rollback = None

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON."""
        return {
            "values": self.spikes.state(),
            # The key is that of old checkpoints.
            "left_out": [asdict(window) for window in self.skipped],
            "updates_skipped": self.updates_skipped,
            "skips_in_a_row": self.skips_in_a_row,
            "rollbacks": self.rollbacks,
            "last_bad_step": self.last_bad_step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; {} (a checkpoint without a loss guard) starts with empty state.

        The count of roll-backs never decreases here: a roll-back restores a state from before itself.
        """
        self.spikes.restore(state.get("values", {}))
        self.skipped = [SkippedWindow(**window) for window in state.get("left_out", [])]
        self.updates_skipped = state.get("updates_skipped", 0)
        self.skips_in_a_row = state.get("skips_in_a_row", 0)
        self.rollbacks = max(self.rollbacks, state.get("rollbacks", 0))
        self.last_bad_step = state.get("last_bad_step", 0)

    def stop(self, step: int, why: str, remedy: str) -> NoReturn:
        """Raise the UserError that ends the run."""
        self._record(step, "stop", why)
        raise UserError(
            f"training diverged: {why} at step {step}",
            where=self.run,
            remedy=f"{remedy}; existing checkpoints are unchanged",
            on_all_ranks=True,
        )

    def _act(self, step: int, why: str, first_row: int, rows: int) -> None:
        """Apply the configured action to a bad step, or stop if it was applied too often."""
        remedy = "lower optimizer.lr or lengthen the warm-up"
        if self.action == "skip" and self.skips_in_a_row < self.config.max_skips:
            self.skips_in_a_row += 1
            self.updates_skipped += 1
            self.last_bad_step = step
            self.skipped.append(SkippedWindow("skip", first_row, first_row + rows, step, why))
            self._record(step, "skip", why, rows=[first_row, first_row + rows], in_a_row=self.skips_in_a_row)
        elif self.action == "rollback" and self.rollbacks < self.config.max_rollbacks:
            self.rollbacks += 1
            first = max(0, first_row - self.config.margin * rows)
            self.wanted_rollback = SkippedWindow("rollback", first, first_row + rows, step, why)
            self._record(step, "rollback", why, rows=[first, first_row + rows], in_a_row=self.rollbacks)
        elif self.action == "stop":
            self.stop(step, why, remedy)
        else:
            skips = f"{self.skips_in_a_row} updates skipped in a row"
            limit = skips if self.action == "skip" else f"{self.rollbacks} roll-backs"
            self.stop(step, f"{why}, after {limit}", remedy + ", or inspect the rows named in events.jsonl")

    def _note_good(self, step: int, result: StepResult) -> None:
        self.spikes.note_good(self._values(result))
        self.skips_in_a_row = 0
        # The limit is on roll-backs without a window of good steps in between.
        if step >= self.last_bad_step + self.config.window:
            self.rollbacks = 0

    def _note_fault(self, step: int, action: str, why: str, comparison: Comparison) -> None:
        where = f"rank {', '.join(map(str, comparison.suspects))}" if comparison.suspects else "the sum over ranks"
        self._record(step, action, f"{why}; {_verdict(comparison)}, in {where}", ranks=comparison.suspects)
        if self.config.evict and comparison.suspects:
            self.fault = NodeFault(comparison.suspects, f"{action} fault at step {step}: {why}")

    def _compare(self, first: StepResult, rerun: StepResult) -> Comparison:
        assert first.local_grad_norms is not None and rerun.local_grad_norms is not None, (
            "the engine cannot run a step again"
        )
        values = self._values(first), self._values(rerun)
        return compare(*values, first.local_grad_norms, rerun.local_grad_norms, self.gather)

    def _values(self, result: StepResult) -> dict[str, float]:
        """Return the judged values: the gradient norm and the loss of each modality in the step."""
        means = zip(self.modalities, result.loss.mean.tolist(), result.loss.count.tolist(), strict=True)
        return {"grad_norm": result.grad_norm} | {f"loss/{name}": mean for name, mean, count in means if count > 0}

    def _record(self, step: int, action: str, why: str, **fields: Any) -> None:
        if self.rank == 0:
            log.warning("loss guard, step %d: %s: %s", step, action, why)
            events.record(self.run, "loss_guard", step=step, action=action, why=why, **fields)


def _verdict(comparison: Comparison) -> str:
    if comparison.deviation == 0:
        return "identical when run again: deterministic"
    if comparison.is_same:
        return f"equal within {comparison.deviation:.0e} when run again"
    return "different when run again: hardware fault"
