"""The loss guard: a step with a bad loss or gradient is run again, then skipped, rolled back, or ends the run.

It judges a step between its gradients and its update, by numbers that are the same on every rank. So all ranks make the
same decision without communication:

    good                         apply the update
    bad, good when run again     a transient hardware fault: apply the update of the second run
    bad again: skip              no update; the rows count as consumed; the schedule and the moments do not advance
    bad again: rollback          return to a checkpoint from before the rows [bad row - margin, end of the bad rows);
                                 when the run reaches these rows again, it skips them
    bad too often, or stop       UserError: the run ends and is not restarted

All its state is in `state`, a part of each checkpoint: a resumed run makes the same decisions as an uninterrupted one.
Source: Chowdhery et al. 2022, PaLM, section 5.1 (roll back and skip the batches around the spike).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from megamm.common import events
from megamm.common.errors import UserError
from megamm.config import RunConfig
from megamm.elastic.node_fault import NodeFault
from megamm.engine.api import StepResult
from megamm.guards.rerun import Comparison, Gather, compare
from megamm.guards.spike_detector import Spikes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeftOut:
    """Rows [first, end) that changed no weights: read in a step without update ("skip"), or not read ("rollback")."""

    how: str
    first: int
    end: int
    step: int
    why: str


class LossGuard:
    """The loss guard of a run; every rank has one and gives it the result of every step."""

    def __init__(self, config: RunConfig, modalities: Sequence[str], rank: int, gather: Gather) -> None:
        """gather: called only after a step was run again."""
        c = self.config = config.resilience.loss_guard
        self.run, self.modalities, self.rank, self.gather = config.output, list(modalities), rank, gather
        self.action = c.action
        if c.action == "auto":
            self.action = "skip" if config.engine == "native" else "stop"
            if rank == 0:
                log.info("loss guard: action %s, because the engine is %s", self.action, config.engine)
        self.spikes = Spikes(c.spike, c.window)
        self.left_out: list[LeftOut] = []
        self.updates_skipped = self.skips_in_a_row = self.rollbacks = self.last_bad_step = 0
        self.wanted_rollback: LeftOut | None = None
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
            seen = self._compare(first, result)
            still, verdict = self.spikes.why_bad(self._values(result)), _verdict(seen)
            if not still or not seen.is_same:
                self._note_fault(step, "transient" if not still else "unstable", why, seen)
            why = still
        if not why:
            self._note_good(step, result)
            return result, True
        self._act(step, f"{why} ({verdict})", first_row, rows)
        return result, False

    def next_row(self, row: int, rows: int) -> int:
        """Return the first row, from `row` on, from which `rows` rows can be read without a skipped one."""
        while met := [w for w in self.left_out if w.how == "rollback" and w.first < row + rows and row < w.end]:
            row = max(w.end for w in met)
        return row

    def rolled_back(self, window: LeftOut) -> None:
        """Note the skipped rows of a roll-back; call it after `restore` of the earlier checkpoint's state."""
        self.left_out.append(window)
        self.last_bad_step = window.step
        self.wanted_rollback = None

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON."""
        return {
            "values": self.spikes.state(),
            "left_out": [asdict(window) for window in self.left_out],
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
        self.left_out = [LeftOut(**window) for window in state.get("left_out", [])]
        self.updates_skipped = state.get("updates_skipped", 0)
        self.skips_in_a_row = state.get("skips_in_a_row", 0)
        self.rollbacks = max(self.rollbacks, state.get("rollbacks", 0))
        self.last_bad_step = state.get("last_bad_step", 0)

    def stop(self, step: int, why: str, remedy: str) -> NoReturn:
        """Raise the UserError that ends the run."""
        self._tell(step, "stop", why)
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
            self.left_out.append(LeftOut("skip", first_row, first_row + rows, step, why))
            self._tell(step, "skip", why, rows=[first_row, first_row + rows], in_a_row=self.skips_in_a_row)
        elif self.action == "rollback" and self.rollbacks < self.config.max_rollbacks:
            self.rollbacks += 1
            first = max(0, first_row - self.config.margin * rows)
            self.wanted_rollback = LeftOut("rollback", first, first_row + rows, step, why)
            self._tell(step, "rollback", why, rows=[first, first_row + rows], in_a_row=self.rollbacks)
        elif self.action == "stop":
            self.stop(step, why, remedy)
        else:
            count, what = {"skip": (self.skips_in_a_row, "updates skipped in a row")}.get(
                self.action, (self.rollbacks, "roll-backs")
            )
            self.stop(step, f"{why}, after {count} {what}", remedy + ", or inspect the rows named in events.jsonl")

    def _note_good(self, step: int, result: StepResult) -> None:
        self.spikes.note_good(self._values(result))
        self.skips_in_a_row = 0
        if step >= self.last_bad_step + self.config.window:
            self.rollbacks = 0

    def _note_fault(self, step: int, action: str, why: str, seen: Comparison) -> None:
        where = f"rank {', '.join(map(str, seen.suspects))}" if seen.suspects else "the sum over ranks"
        self._tell(step, action, f"{why}; {_verdict(seen)}, in {where}", ranks=seen.suspects)
        if self.config.evict and seen.suspects:
            self.fault = NodeFault(seen.suspects, f"{action} fault at step {step}: {why}")

    def _compare(self, first: StepResult, second: StepResult) -> Comparison:
        assert first.local_grad_norms is not None and second.local_grad_norms is not None, (
            "the engine cannot run a step again"
        )
        values = self._values(first), self._values(second)
        return compare(*values, first.local_grad_norms, second.local_grad_norms, self.gather)

    def _values(self, result: StepResult) -> dict[str, float]:
        """Return the judged values: the gradient norm and the loss of each modality in the step."""
        means = zip(self.modalities, result.loss.mean.tolist(), result.loss.count.tolist(), strict=True)
        return {"grad_norm": result.grad_norm} | {f"loss/{name}": mean for name, mean, count in means if count > 0}

    def _tell(self, step: int, action: str, why: str, **fields: Any) -> None:
        if self.rank == 0:
            log.warning("loss guard, step %d: %s: %s", step, action, why)
            events.record(self.run, "loss_guard", step=step, action=action, why=why, **fields)


def _verdict(seen: Comparison) -> str:
    if seen.deviation == 0:
        return "identical when run again: deterministic"
    if seen.is_same:
        return f"equal within {seen.deviation:.0e} when run again"
    return "different when run again: hardware fault"
