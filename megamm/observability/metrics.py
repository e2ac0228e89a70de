"""Metrics of a run: TensorBoard, JSON lines, Prometheus and the console; written by rank 0 only.

Units: losses in nats per token, learning rate per step, tokens/s of the whole job, time left in seconds.
data_wait_share, the share of time spent waiting for data, is measured on rank 0. docs/observability.md has every field.
"""

import json
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.common import events
from megamm.config import MetricsConfig
from megamm.observability import goodput
from megamm.observability.prometheus import Exporter

log = logging.getLogger(__name__)

METRICS, DROPPED = "metrics.jsonl", "metrics_dropped.jsonl"
STARVED = 0.1
"""Share of a step's time spent waiting for data above which the console reports it."""


@dataclass(frozen=True)
class Devices:
    """The devices of a job: their number, and the peak FLOP/s of one, None if unknown."""

    number: int
    peak_flops: float | None


class Metrics:
    """Writes the metrics of one run. It drops lines that an earlier, killed attempt wrote after the start step."""

    def __init__(self, run: Path, start_step: int, total_steps: int, config: MetricsConfig = MetricsConfig()) -> None:
        # Imported here: TensorBoard takes a second to import, which `megamm --help` does not need.
        from torch.utils.tensorboard import SummaryWriter

        run.mkdir(parents=True, exist_ok=True)
        self.run, self.total_steps = run, total_steps
        past = goodput.account(events.read(run), read_all_lines(run), resuming_from=start_step)
        self.restarts, self.first_launch = max(past.attempts - 1, 0), past.begin or time.time()
        self.productive = past.seconds["productive"]
        drop_after(run, start_step)
        self.file = (run / METRICS).open("a")
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)
        self.prometheus = Exporter(run, total_steps, start_step, self.restarts, config)
        # Read both clocks at the same moment, so that there are no gaps between lines on the time line.
        self.clock, self.time = time.monotonic(), time.time()
        self.since, self.waited = start_step, 0.0
        self.excluded = dict.fromkeys(goodput.OUTSIDE_STEPS, 0.0)
        self.is_first_report, self.has_warned = True, False

    def report(self, step: int, values: dict[str, Any], tokens_per_step: float, devices: Devices) -> None:
        """Record values after `step`; add throughput, time left, and the use of time since the last call.

        "data_wait": seconds that the run has waited for data so far; it is recorded as a share. "model_flops": FLOPs of
        the rows read since the last call (model/flops.py), recorded as a rate and as a share of the devices' peak.
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
        values["flops_per_s_per_device"] = values.pop("model_flops") / seconds / devices.number
        if devices.peak_flops is not None:
            values["mfu"] = values["flops_per_s_per_device"] / devices.peak_flops
        self.productive += max(seconds - waited, 0.0)
        passed = max(self.time - self.first_launch, 1e-9)
        values |= {"steps": steps, "step_seconds": seconds, "data_wait_seconds": min(waited, seconds)}
        values |= {"restarts": self.restarts, "goodput": min(self.productive / passed, 1.0)}
        self._write({"step": step} | values | self.prometheus.heartbeat_age())
        self._print(step, values)

    def _print(self, step: int, values: dict[str, Any]) -> None:
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
        if is_starved and not self.is_first_report and not self.has_warned:
            self.has_warned = True
            log.warning(
                "starved: %.0f %% of the time of steps is spent waiting for data; raise data.workers, or data.prefetch "
                "if reading is uneven (reported once; metrics have data_wait_share)",
                100 * values["data_wait_share"],
            )
        self.is_first_report = False  # the first steps also wait for the workers to start

    def report_heldout(self, step: int, losses: dict[str, float | None], seconds: float) -> None:
        """Record held-out losses and the seconds of the evaluation."""
        self.exclude("evaluation_seconds", seconds)
        self._write({"step": step} | losses)
        shown = " ".join(f"{k.split('/')[1]} {v:.4f}" for k, v in losses.items() if v is not None)
        print(f"step {step}/{self.total_steps}  held-out loss {shown}", flush=True)

    def report_suite(self, step: int, values: dict[str, float], seconds: float) -> None:
        """Record the figures of a suite and the seconds of the evaluation."""
        self.exclude("evaluation_seconds", seconds)
        self._write({"step": step} | values)
        print(f"step {step}/{self.total_steps}  suite of {len(values)} figures in {seconds:.1f} s", flush=True)

    def exclude(self, part: str, seconds: float) -> None:
        """Exclude time outside of steps (part: one of goodput.OUTSIDE_STEPS) from the throughput."""
        # Both clocks move forward, so that the next line counts only the time of steps.
        self.clock += seconds
        self.time += seconds
        self.excluded[part] += seconds

    def go_back(self, step: int) -> None:
        """Drop the lines after an earlier step, from which the run continues without a restart."""
        from torch.utils.tensorboard import SummaryWriter

        self.file.close()
        self.board.close()
        past = goodput.account(events.read(self.run), read_all_lines(self.run), resuming_from=step)
        self.productive, self.since = past.seconds["productive"], step
        drop_after(self.run, step)
        self.file = (self.run / METRICS).open("a")
        self.board = SummaryWriter(str(self.run / "tensorboard"), purge_step=step + 1)

    def _write(self, line: dict[str, Any]) -> None:
        line |= self.excluded | {"time": self.time}
        self.excluded = dict.fromkeys(goodput.OUTSIDE_STEPS, 0.0)
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
    """Move the lines after this step to metrics_dropped.jsonl: these steps are repeated, but goodput needs them."""
    lines = read_lines(run)
    dropped = [line for line in lines if line["step"] > step]
    with (run / DROPPED).open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in dropped))
    temporary = (run / METRICS).with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))
    # The dropped lines were appended before: a kill in between leaves a line in both files, and read_all_lines
    # counts it once.
    os.replace(temporary, run / METRICS)


def read_lines(run: Path) -> list[dict[str, Any]]:
    """Return all complete lines of a run's metrics; a line cut off by a kill is skipped."""
    return _whole_lines(run / METRICS)


def read_all_lines(run: Path) -> list[dict[str, Any]]:
    """Return all lines, including those of repeated steps, unordered and each once, even after a kill in drop_after."""
    return with_dropped(run, read_lines(run))


def with_dropped(run: Path, kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the result of `read_lines`, and the lines of repeated steps that are not in it."""
    dropped = _whole_lines(run / DROPPED)
    known = {json.dumps(line, sort_keys=True) for line in kept} if dropped else set()
    return kept + [line for line in dropped if json.dumps(line, sort_keys=True) not in known]


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
    """Return None for a value that is not finite: JSON has no NaN (a modality without tokens has no loss)."""
    return value if math.isfinite(value) else None
