"""What a run reports: TensorBoard, one JSON object a line, Prometheus and a console line; written by rank 0 only.

Units: losses in nats per token, learning rate per step, tokens/s over the whole job, time left in seconds. Of rank 0
alone: data_wait_share, the share of the time that went by waiting for data. docs/observability.md has every field.
"""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from megamm.config import MetricsConfig
from megamm.prometheus import Exporter
from megamm.resilience import events, goodput

log = logging.getLogger(__name__)

METRICS, DROPPED = "metrics.jsonl", "metrics_dropped.jsonl"
STARVED = 0.1
"""Share of a step's time spent on waiting for data from which on the console says so."""
LEFT_OUT = ("evaluation_seconds", "checkpoint_stall_seconds")


class Metrics:
    """Writer of one run. Opened at a step, it drops what an earlier, killed attempt wrote from that step on."""

    def __init__(self, run: Path, start_step: int, total_steps: int, config: MetricsConfig = MetricsConfig()) -> None:
        # Imported here: TensorBoard takes a second that `megamm --help` need not pay.
        from torch.utils.tensorboard import SummaryWriter

        run.mkdir(parents=True, exist_ok=True)
        self.run, self.total_steps = run, total_steps
        past = goodput.account(events.read(run), read_all_lines(run), going_on_from=start_step)
        self.restarts, self.first_launch = max(past.attempts - 1, 0), past.begin or time.time()
        self.productive = past.seconds["productive"]
        drop_after(run, start_step)
        self.file = (run / METRICS).open("a")
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)
        self.prometheus = Exporter(run, total_steps, start_step, self.restarts, config)
        # The same moment on both clocks: lines are placed on the time line without gaps between their parts.
        self.clock, self.time = time.monotonic(), time.time()
        self.since, self.waited = start_step, 0.0
        self.left_out = dict.fromkeys(LEFT_OUT, 0.0)
        self.is_first_report, self.told_starved = True, False

    def report(self, step: int, values: dict[str, Any], tokens_per_step: float, peak_flops: float | None) -> None:
        """Record values after `step`; adds throughput, time left and where the time went since the last call.

        "data_wait" is the time in seconds that the run has waited for data so far, recorded as a share.
        """
        now, self.time = time.monotonic(), time.time()
        seconds, steps = max(now - self.clock, 1e-9), max(step - self.since, 1)
        waited = values["data_wait"] - self.waited
        self.clock, self.since, self.waited = now, step, values["data_wait"]
        values = {key: value for key, value in values.items() if key != "data_wait"} | {
            "tokens_per_s": tokens_per_step * steps / seconds,
            "seconds_left": seconds / steps * (self.total_steps - step),
            "data_wait_share": min(waited / seconds, 1.0),
        }
        flops = values.pop("flops_per_token", None)
        if peak_flops is not None and flops is not None:
            values["mfu"] = values["tokens_per_s"] * flops / peak_flops
        self.productive += max(seconds - waited, 0.0)
        passed = max(self.time - self.first_launch, 1e-9)
        values |= {"steps": steps, "step_seconds": seconds, "data_wait_seconds": min(waited, seconds)}
        values |= {"restarts": self.restarts, "goodput": min(self.productive / passed, 1.0)}
        self._write({"step": step} | values | self.prometheus.heartbeat_age())
        self._tell(step, values)

    def _tell(self, step: int, values: dict[str, Any]) -> None:
        losses = " ".join(f"{k[5:]} {v:.4f}" for k, v in values.items() if k.startswith("loss/") and v is not None)
        mfu = f"  mfu {values['mfu']:.1%}" if "mfu" in values else ""
        grad_norm = "not finite" if values["grad_norm"] is None else f"{values['grad_norm']:.3f}"
        is_starved = values["data_wait_share"] > STARVED
        mfu += f"  waited for data {values['data_wait_share']:.0%}" if is_starved else ""
        print(
            f"step {step}/{self.total_steps}  loss {losses}  grad norm {grad_norm}  "
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

    def report_heldout(self, step: int, losses: dict[str, float | None], seconds: float) -> None:
        """Record held-out losses, which took that long."""
        self.leave_out("evaluation_seconds", seconds)
        self._write({"step": step} | losses)
        shown = " ".join(f"{k.split('/')[1]} {v:.4f}" for k, v in losses.items() if v is not None)
        print(f"step {step}/{self.total_steps}  held-out loss {shown}", flush=True)

    def leave_out(self, part: str, seconds: float) -> None:
        """Time that was no step's (part: one of LEFT_OUT) is no part of the throughput."""
        self.clock += seconds
        self.time += seconds
        self.left_out[part] += seconds

    def go_back(self, step: int) -> None:
        """The run goes on after an earlier step, without a restart: the lines from there on are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self.file.close()
        self.board.close()
        past = goodput.account(events.read(self.run), read_all_lines(self.run), going_on_from=step)
        self.productive, self.since = past.seconds["productive"], step
        drop_after(self.run, step)
        self.file = (self.run / METRICS).open("a")
        self.board = SummaryWriter(str(self.run / "tensorboard"), purge_step=step + 1)

    def _write(self, line: dict[str, Any]) -> None:
        line |= self.left_out | {"time": self.time}
        self.left_out = dict.fromkeys(LEFT_OUT, 0.0)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for key, value in line.items():
            if key not in ("step", "time") and value is not None:
                self.board.add_scalar(key, value, line["step"])
        self.prometheus.update(line)

    def close(self) -> None:
        self.prometheus.close()
        self.board.close()
        self.file.close()


def drop_after(run: Path, step: int) -> None:
    """Take the lines after this step out of the metrics: their steps are made again. The goodput needs them still."""
    lines = read_lines(run)
    dropped = [line for line in lines if line["step"] > step]
    with (run / DROPPED).open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in dropped))
    temporary = (run / METRICS).with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))
    os.replace(temporary, run / METRICS)


def read_lines(run: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics; a line cut off by a kill is left out."""
    return _whole_lines(run / METRICS)


def read_all_lines(run: Path) -> list[dict[str, Any]]:
    """With those of steps that were made again, in no order; each once, also after a kill while they were dropped."""
    kept = read_lines(run)
    return kept + [line for line in _whole_lines(run / DROPPED) if line not in kept]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
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
