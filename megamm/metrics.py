"""What a run reports: TensorBoard, one JSON object a line, and a console line; written by rank 0 only.

Units: losses in nats per token, learning rate per step, tokens/s over the whole job, time left in seconds.
"""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


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
        self.clock, self.first, self.since = time.monotonic(), start_step, start_step

    def report(self, step: int, values: dict[str, Any], tokens_per_step: float, peak_flops: float | None) -> None:
        """Record values after `step`; adds throughput and time left since the last call."""
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
        self._write({"step": step} | values)
        losses = " ".join(f"{k[5:]} {v:.4f}" for k, v in values.items() if k.startswith("loss/") and v is not None)
        mfu = f"  mfu {values['mfu']:.1%}" if "mfu" in values else ""
        print(
            f"step {step}/{self.total_steps}  loss {losses}  grad norm {values['grad_norm']:.3f}  "
            f"lr {values['lr']:.2e}  {values['tokens_per_s']:,.0f} tokens/s{mfu}  "
            f"{values['seconds_left']:.0f} s left",
            flush=True,
        )

    def report_heldout(self, step: int, losses: dict[str, float | None]) -> None:
        """Record held-out losses, and leave the time they took out of the throughput."""
        self._write({"step": step} | losses)
        shown = " ".join(f"{k.split('/')[1]} {v:.4f}" for k, v in losses.items() if v is not None)
        print(f"step {step}/{self.total_steps}  held-out loss {shown}", flush=True)
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock = time.monotonic()

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
