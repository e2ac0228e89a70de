"""The run, top to bottom: device, groups, vocabulary, data, model, optimizer, resume, then step after step.

Every process of the job calls `train` with the same config; a run continues by itself from the
newest valid checkpoint in its output folder.
"""

import logging
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megamm import accelerators, device, engine, layout, metrics
from megamm.config import RunConfig
from megamm.data.loader import Loader, Reading
from megamm.data.run_data import RunData, open_run_data
from megamm.errors import UserError
from megamm.mcore import groups as grid
from megamm.model import size
from megamm.objective import overall, weight_tensor
from megamm.resilience import events, heartbeat
from megamm.resilience.boundary import Boundary, of_this_rank
from megamm.resilience.heartbeat import Heartbeat
from megamm.resilience.slots import Ending
from megamm.run_state import RunStore

log = logging.getLogger(__name__)


def train(config: RunConfig, boundary: Boundary | None = None) -> Ending:
    """Run to train.steps, or to the step boundary where the job is asked to stop; why it ended.

    boundary: by default the launcher's. UserError for what the user can mend; every rank raises the same one.
    """
    pulse = heartbeat.of_this_rank(config.output)
    pulse.beat("start", 0)
    place = device.choose(config.device)
    accelerators.log_use(config, place)
    grid.start(place)
    world_size = torch.distributed.get_world_size()
    layout.check(config, world_size)
    data = open_run_data(config)
    trainer = Trainer(config, data, place, pulse)
    try:
        trainer.resume()
        ending = trainer.run(boundary or of_this_rank())
    finally:
        trainer.close()
    pulse.beat("end", trainer.step)
    torch.distributed.barrier()
    grid.destroy()
    grid.stop()
    return ending


class Trainer:
    """The state of a run on this rank, and its loop."""

    def __init__(self, config: RunConfig, data: RunData, place: device.Device, pulse: Heartbeat) -> None:
        self.config, self.data, self.place, self.pulse = config, data, place, pulse
        self.groups = grid.build(config.parallel, config.train.seed)
        self.engine = engine.build(config, data.vocabulary.size, self.groups, place)
        self.weights = weight_tensor(config.loss_weights, data.vocabulary.modalities, place.torch_device)
        self.store = RunStore(config, data, self.engine, self.groups, place)
        self.step, self.saved_step, self.loader = 0, 0, self._loader(consumed_rows=0)
        self.metrics: metrics.Metrics | None = None
        log.info("%s, process %d", self.groups.describe(), os.getpid())

    def _loader(self, consumed_rows: int) -> Loader:
        t, d = self.config.train, self.config.data
        return Loader(
            self.data.stream,
            global_batch=t.global_batch,
            micro_batch=t.micro_batch,
            data_rank=self.groups.data_rank,
            data_size=self.groups.data_size,
            cost=partial(size.flops_of_row, self.config.model, self.data.vocabulary.size, d.seq_length),
            consumed_rows=consumed_rows,
            reading=Reading(d.workers, d.prefetch, pin_memory=self.place.is_gpu),
        )

    def run(self, boundary: Boundary) -> Ending:
        """Steps until train.steps, stop_after or a stop, with reports, losses and checkpoints as configured."""
        t, every = self.config.train, self.config.checkpoint.every
        if self.groups.rank == 0:
            self.metrics = metrics.Metrics(self.config.output, self.step, t.steps)
            layout = self.config.parallel.model_dump()
            events.record(self.config.output, "started", step=self.step, world=self.groups.world_size, layout=layout)
        first, stop = self.step + 1, min(t.steps, t.stop_after or t.steps)
        while self.step < stop:
            if (ending := boundary.stops_before(self.step + 1)) is not None:
                if self.step > self.saved_step:
                    self.save()
                return ending
            self._one_step()
            if self.step == first and self.groups.rank == 0:
                self.pulse.tell_first_step(self.config.output, first)
            last, start = self.step == stop, time.monotonic()
            heldout_loss = None
            if t.eval_every and (self.step % t.eval_every == 0 or last):
                heldout_loss = self._evaluate()
            if last or (every and self.step % every == 0):
                self.save(heldout_loss)
            if self.metrics is not None:
                self.metrics.leave_out(time.monotonic() - start)
        self.store.finish()
        return "done"

    def _one_step(self) -> None:
        t = self.config.train
        self.pulse.beat("data", self.step + 1)
        batches = [batch.to(self.place.torch_device) for batch in self.loader.step()]
        self.pulse.beat("step", self.step + 1)
        done = self.engine.train_step(batches, self.weights)
        self.step += 1
        if not math.isfinite(done.grad_norm):
            raise UserError(
                f"training diverged: grad norm {done.grad_norm} at step {self.step}",
                where=self.config.output,
                remedy="lower optimizer.lr or lengthen the warm-up; the last checkpoint is untouched",
                on_all_ranks=True,
            )
        if self.metrics is not None and (self.step % t.log_every == 0 or self.step in (1, t.steps)):
            self.place.synchronize()
            names = self.data.vocabulary.modalities
            means = zip(names, done.loss.mean, strict=True)
            values: dict[str, Any] = {f"loss/{name}": metrics.finite_or_none(float(mean)) for name, mean in means}
            values |= {"grad_norm": done.grad_norm, "lr": done.lr, "data_wait": self.loader.waited}
            values |= {"padding_share": self.loader.figures.padding_share, "imbalance": self.loader.figures.imbalance}
            m, s = self.config.model, self.config.data.seq_length
            values["flops_per_token"] = size.flops_per_token(m, self.data.vocabulary.size, s)
            self.metrics.report(self.step, values, t.global_batch * s, self.place.peak_flops)

    def _evaluate(self) -> float | None:
        """Mean loss per modality over the held-out rows, weighted by tokens; returned is their weighted mean."""
        names = self.data.vocabulary.modalities
        total = torch.zeros(len(names), dtype=torch.float64)
        count = torch.zeros_like(total)
        self.pulse.beat("evaluate", self.step)
        for batches in self.data.heldout_steps(self.config, self.groups.data_rank, self.groups.data_size):
            self.pulse.beat("evaluate", self.step)
            placed = [batch.to(self.place.torch_device) for batch in batches]
            loss = self.engine.evaluate(placed, self.weights)
            total += torch.nan_to_num(loss.mean.cpu()) * loss.count.cpu()
            count += loss.count.cpu()
        if self.metrics is not None:
            means = {
                f"heldout/{n}": metrics.finite_or_none(float(x)) for n, x in zip(names, total / count, strict=True)
            }
            self.metrics.report_heldout(self.step, means)
        return overall(total / count, self.weights.cpu())

    def save(self, heldout_loss: float | None = None) -> Path:
        """Write a checkpoint of the state after the current step."""
        self.pulse.beat("save", self.step)
        folder = self.store.save(self.step, self.loader.consumed_rows, heldout_loss)
        self.saved_step = self.step
        if self.metrics is not None:
            print(f"saved {folder}", flush=True)
        return folder

    def resume(self) -> None:
        """Continue from the newest valid checkpoint of the output folder, if there is one."""
        self.pulse.beat("resume", self.step)
        resumed = self.store.resume()
        if resumed is not None:
            self.step, self.loader = resumed.step, self._loader(resumed.consumed_rows)
            self.saved_step = self.step

    def close(self) -> None:
        self.store.close()
        self.loader.close()
        if self.metrics is not None:
            self.metrics.close()
