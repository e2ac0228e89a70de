"""What a run reports: TensorBoard, one JSON object a line, and a console line; written by rank 0 only.

Units: losses in nats per token, learning rate per step, tokens/s over the whole job, time left in seconds. Of rank 0
alone: data_wait_share, the share of the time that went by waiting for data.
"""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
STARVED = 0.1
"""Share of a step's time spent on waiting for data from which on the console says so."""


class Metrics:
    """Writer of one run. Opened at a step, it drops what an earlier, killed attempt wrote from that step on."""

    def __init__(self, run: Path, start_step: int, total_steps: int) -> None:
        # Imported here: TensorBoard takes a second that `megamm --help` need not pay.
        from torch.utils.tensorboard import SummaryWriter

        run.mkdir(parents=True, exist_ok=True)
        self.path, self.total_steps = run / METRICS, total_steps
        kept = [line for line in read_lines(run) if line["step"] <= start_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, self.path)
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)
        self.clock, self.since, self.waited = time.monotonic(), start_step, 0.0
        self.is_first_report, self.told_starved = True, False

    def report(self, step: int, values: dict[str, Any], tokens_per_step: float, peak_flops: float | None) -> None:
        """Record values after `step`; adds throughput and time left since the last call.

        "data_wait" is the time in seconds that the run has waited for data so far, recorded as a share.
        """
        now = time.monotonic()
        seconds, steps = max(now - self.clock, 1e-9), max(step - self.since, 1)
        self.clock, self.since = now, step
        values = values | {
            "tokens_per_s": tokens_per_step * steps / seconds,
            "seconds_left": seconds / steps * (self.total_steps - step),
        }
        flops = values.pop("flops_per_token", None)
        if peak_flops is not None and flops is not None:
            values["mfu"] = values["tokens_per_s"] * flops / peak_flops
        waited = values.pop("data_wait")
        values["data_wait_share"], self.waited = min((waited - self.waited) / seconds, 1.0), waited
        self._write({"step": step} | values)
        losses = " ".join(f"{k[5:]} {v:.4f}" for k, v in values.items() if k.startswith("loss/") and v is not None)
        mfu = f"  mfu {values['mfu']:.1%}" if "mfu" in values else ""
        is_starved = values["data_wait_share"] > STARVED
        mfu += f"  waited for data {values['data_wait_share']:.0%}" if is_starved else ""
        print(
            f"step {step}/{self.total_steps}  loss {losses}  grad norm {values['grad_norm']:.3f}  "
            f"lr {values['lr']:.2e}  {values['tokens_per_s']:,.0f} tokens/s{mfu}  "
            f"{values['seconds_left']:.0f} s left",
            flush=True,
        )
        if is_starved and not self.is_first_report and not self.told_starved:
            self.told_starved = True
            log.warning(
                "starved: %.0f %% of the time of steps goes by waiting for data; raise data.workers, or data.prefetch "
                "if reading is uneven (said once; metrics have data_wait_share)",
                100 * values["data_wait_share"],
            )
        self.is_first_report = False  # whose steps also wait for the workers to start

    def report_heldout(self, step: int, losses: dict[str, float | None]) -> None:
        """Record held-out losses."""
        self._write({"step": step} | losses)
        shown = " ".join(f"{k.split('/')[1]} {v:.4f}" for k, v in losses.items() if v is not None)
        print(f"step {step}/{self.total_steps}  held-out loss {shown}", flush=True)

    def leave_out(self, seconds: float) -> None:
        """Time that was no step's: held-out losses and checkpoints are no part of the throughput."""
        self.clock += seconds

    def _write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for key, value in line.items():
            if key != "step" and value is not None:
                self.board.add_scalar(key, value, line["step"])

    def close(self) -> None:
        self.board.close()
        self.file.close()


def read_lines(run: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics; a line cut off by a kill is left out."""
    path = run / METRICS
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN: a modality without tokens in a step has no loss."""
    return value if math.isfinite(value) else None
