"""A training run from top to bottom: device, groups, vocabulary, data, model, optimizer, resume, training steps.

Every process of the job calls `train` with the same config; a run continues automatically from the newest valid
checkpoint in its output folder.
"""

import logging
import os
import time
from functools import partial
from typing import Any

import torch

from megamm.checkpoint import RunState
from megamm.common import device, events
from megamm.config import RunConfig, accelerators
from megamm.data.pipeline.loader import Loader, Reading
from megamm.data.pipeline.run_data import RunData, open_run_data
from megamm.elastic import heartbeat
from megamm.elastic.heartbeat import Heartbeat
from megamm.elastic.node_fault import NodeFault
from megamm.elastic.rank_status import Ending
from megamm.elastic.step_boundary import Boundary, of_this_rank
from megamm.engine import api
from megamm.engine.build import build_engine
from megamm.guards.loss_guard import LeftOut, LossGuard
from megamm.guards.stragglers import Stragglers
from megamm.mcore import groups as grid
from megamm.model import flops, layout
from megamm.model.loss import overall, weight_tensor
from megamm.observability import metrics
from megamm.train.checkpoint_manager import RunStore

log = logging.getLogger(__name__)


def train(config: RunConfig, boundary: Boundary | None = None) -> Ending:
    """Run to train.steps, or to the step boundary at which the job must stop; return why it ended.

    boundary: by default the launcher's. UserError for errors that the user can fix; every rank raises the same one.
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
        pulse.beat("end", trainer.step)
        if ending == "regroup":
            trainer.store.drain()  # all nodes resume from the checkpoint that is being written
        else:
            trainer.store.leave_node()
        if ending == "done":
            trainer.store.finish()
    except NodeFault as fault:
        trainer.store.leave_node(fault.ranks)
        raise
    finally:
        trainer.close()
    torch.distributed.barrier()
    grid.destroy()
    grid.stop()
    return ending


class Trainer:
    """The state of a run on this rank, and its loop."""

    def __init__(self, config: RunConfig, data: RunData, place: device.Device, pulse: Heartbeat) -> None:
        self.config, self.data, self.place, self.pulse = config, data, place, pulse
        self.groups = grid.build(config.parallel, config.train.seed)
        self.engine = build_engine(config, data.vocabulary.size, self.groups, place)
        self.weights = weight_tensor(config.loss_weights, data.vocabulary.modalities, place.torch_device)
        self.store = RunStore(config, data, self.engine, self.groups, place, self._wait_for_writer)
        self.step, self.saved_step, self.loader = 0, 0, self._loader(consumed_rows=0)
        rank, gather = self.groups.rank, self.groups.gather
        self.guard = LossGuard(config, data.vocabulary.modalities, rank, gather)
        stragglers = config.resilience.stragglers
        self.stragglers = Stragglers(stragglers, config.output, rank, self.groups.pipeline_rank, gather)
        self.tokens = torch.zeros(len(self.weights), dtype=torch.int64, device=place.torch_device)
        self.metrics: metrics.Metrics | None = None
        log.info("%s, process %d", self.groups.describe(), os.getpid())

    def _loader(self, consumed_rows: int) -> Loader:
        t, d = self.config.train, self.config.data
        return Loader(
            self.data.stream,
            global_batch=t.global_batch_size,
            micro_batch=t.micro_batch_size,
            data_rank=self.groups.data_rank,
            data_size=self.groups.data_size,
            cost=partial(flops.flops_of_row, self.config.model, self.data.vocabulary.size, d.seq_length),
            consumed_rows=consumed_rows,
            reading=Reading(d.workers, d.prefetch, pin_memory=self.place.is_gpu),
        )

    def run(self, boundary: Boundary) -> Ending:
        """Run steps until train.steps, stop_after or a stop, with reports, losses and checkpoints as configured."""
        t, every = self.config.train, self.config.checkpoint.every
        local_every = self.config.checkpoint.local_every if self.config.checkpoint.local is not None else 0
        if self.groups.rank == 0:
            run, world_size = self.config.output, self.groups.world_size
            self.metrics = metrics.Metrics(run, self.step, t.steps, self.config.metrics)
            events.record(run, "started", step=self.step, world=world_size, layout=self.config.parallel.model_dump())
        first, stop = self.step + 1, min(t.steps, t.stop_after or t.steps)
        while self.step < stop:
            if (ending := boundary.stops_before(self.step + 1)) is not None:
                if self.step > self.saved_step:
                    self.save(wait=True)
                return ending
            if not self._one_step():
                continue
            if self.step == first and self.groups.rank == 0:
                self.pulse.tell_first_step(self.config.output, first)
            last, heldout_loss = self.step == stop, None
            if t.eval_every and (self.step % t.eval_every == 0 or last):
                heldout_loss = self._evaluate()
            fault = self.guard.fault or self.stragglers.fault
            if last or fault or (every and self.step % every == 0):
                self.save(heldout_loss, wait=last or fault is not None)
            elif local_every and self.step % local_every == 0:
                self.save(heldout_loss, to_run=False)
            else:
                self.store.poll()
            if fault and not last:
                raise fault
        if self.step > self.saved_step:  # no step was left, but the last one is not saved
            self.save(wait=True)
        return "done"

    def _one_step(self) -> bool:
        """Run one step; return False if the loss guard rolled back to an earlier step instead."""
        t = self.config.train
        self.pulse.beat("data", self.step + 1)
        row = self.guard.next_row(self.loader.consumed_rows, t.global_batch_size)
        if row != self.loader.consumed_rows:
            self._open_loader(row)
        with self.engine.clock.host("data"):
            batches = [batch.to(self.place.torch_device) for batch in self.loader.step()]
        self.pulse.beat("step", self.step + 1)
        result = self.engine.compute_gradients(batches, self.weights)
        recompute = self.engine.recompute_gradients if self.engine.can_discard else None
        result, is_good = self.guard.check(self.step + 1, row, t.global_batch_size, result, recompute)
        if is_good or not self.engine.can_discard:
            self.engine.apply_update()
        else:
            self.engine.discard()
        if self.guard.wanted_rollback is not None:
            self._roll_back(self.guard.wanted_rollback)
            return False
        self.step += 1
        self.tokens += result.loss.count.to(self.tokens.dtype)
        reports = self.step % t.log_every == 0 or self.step in (1, t.steps)
        if reports:
            self._report(result)
        return True

    def _report(self, result: api.StepResult) -> None:
        """Compare the step's figures between ranks; rank 0 writes them."""
        seconds = self.engine.clock.take()
        scores = self.stragglers.window(self.step, seconds, self.place.torch_device)
        if self.metrics is None:
            return
        names = self.data.vocabulary.modalities
        means = zip(names, result.loss.mean, strict=True)
        values: dict[str, Any] = {f"loss/{name}": metrics.finite_or_none(float(mean)) for name, mean in means}
        values |= {
            "grad_norm": metrics.finite_or_none(result.grad_norm),
            "lr": result.lr,
            "data_wait": self.loader.waited,
        }
        values |= {"padding_share": self.loader.figures.padding_share, "imbalance": self.loader.figures.imbalance}
        t, m, s = self.config.train, self.config.model, self.config.data.seq_length
        values |= {"flops_per_token": flops.flops_per_token(m, self.data.vocabulary.size, s)} | scores.figures()
        self.metrics.report(self.step, values, t.global_batch_size * s, self.place.peak_flops)

    def _roll_back(self, window: LeftOut) -> None:
        """Roll back to the newest checkpoint from before the rows to skip."""
        self.pulse.beat("resume", self.step)
        self.store.drain()
        folder = self.store.checkpoint_before(window.first)
        if folder is None:
            why = f"{window.why}, and there is no checkpoint from before row {window.first} to roll back to"
            self.guard.stop(self.step + 1, why, "lower checkpoint.every, or set resilience.loss_guard.action=skip")
        self._go_on_from(self.store.go_back(folder))
        self.guard.rolled_back(window)
        if self.metrics is not None:
            self.metrics.go_back(self.step)

    def _evaluate(self) -> float | None:
        """Report the mean loss per modality over the held-out rows, weighted by tokens; return their weighted mean."""
        names, start = self.data.vocabulary.modalities, time.monotonic()
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
            self.metrics.report_heldout(self.step, means, time.monotonic() - start)
        return overall(total / count, self.weights.cpu())

    def save(self, heldout_loss: float | None = None, wait: bool = False, to_run: bool = True) -> None:
        """Start to write a checkpoint of the state after the current step; with `wait` it is complete on return.

        to_run: save into the run's folder too, not only into the local tier.
        """
        self.pulse.beat("save", self.step)
        start = time.monotonic()
        with self.engine.clock.host("checkpoint"):
            tokens = dict(zip(self.data.vocabulary.modalities, map(int, self.tokens), strict=True))
            rows, guard = self.loader.consumed_rows, self.guard.state()
            self.store.save(self.step, rows, tokens, guard, heldout_loss, wait, to_run)
        self.saved_step = self.step if to_run else self.saved_step
        if self.metrics is not None:
            self.metrics.exclude("checkpoint_stall_seconds", time.monotonic() - start)

    def resume(self) -> None:
        """Continue from the newest valid checkpoint of the output folder, if there is one."""
        self.pulse.beat("resume", self.step)
        resumed = self.store.resume()
        if resumed is not None:
            self._go_on_from(resumed)
            self.saved_step = self.step if self.store.is_in_run else 0

    def _go_on_from(self, state: RunState) -> None:
        self.step = self.saved_step = state.step
        seen = [state.tokens.get(name, 0) for name in self.data.vocabulary.modalities]
        self.tokens = torch.tensor(seen, device=self.place.torch_device)
        self.guard.restore(state.loss_guard)
        self._open_loader(state.consumed_rows)

    def _open_loader(self, row: int) -> None:
        """Continue reading from this row."""
        self.loader.close()
        waited, self.loader = self.loader.waited, self._loader(row)
        self.loader.waited = waited

    def _wait_for_writer(self) -> None:
        self.pulse.beat("wait", self.step)

    def close(self) -> None:
        self.store.close()
        self.loader.close()
        if self.metrics is not None:
            self.metrics.close()
