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

from megamm.checkpoint import TrainState
from megamm.common import events, numa
from megamm.common.device import Device, prepare_gpu
from megamm.common.device import choose as choose_device
from megamm.common.sample import Batch
from megamm.config import RunConfig, accelerators
from megamm.data.pipeline.fetch_ahead import FetchAhead
from megamm.data.pipeline.loader import Loader, Reading
from megamm.data.pipeline.run_data import RunData, open_run_data
from megamm.elastic.graceful_stop import StopCondition, stop_condition
from megamm.elastic.heartbeat import Heartbeat
from megamm.elastic.heartbeat import of_this_rank as heartbeat_of_this_rank
from megamm.elastic.rank import NodeFault
from megamm.elastic.rank_status import ExitReason
from megamm.engine import api
from megamm.engine.build import build_engine
from megamm.guards.loss_guard import LossGuard, SkippedWindow
from megamm.guards.stragglers import Stragglers
from megamm.mcore import process_groups
from megamm.model import flops, layout
from megamm.model.loss import overall, weight_tensor
from megamm.observability import metrics
from megamm.observability.gpu_memory import gpu_memory
from megamm.observability.profiler import StepProfiler
from megamm.train.checkpoint_manager import CheckpointManager
from megamm.train.engine_subject import SuiteDuringRun
from megamm.train.garbage import GarbageCollection

log = logging.getLogger(__name__)


def train(config: RunConfig, stop_when: StopCondition | None = None) -> ExitReason:
    """Run to train.steps, or to the step boundary at which the job must stop; return why it ended.

    stop_when: by default the launcher's stop condition. UserError for errors that the user can fix; every rank raises
    the same one.
    """
    heartbeat = heartbeat_of_this_rank(config.output)
    heartbeat.beat("start", 0)
    for line in prepare_gpu(config.device, launches_in_order=config.parallel.tensor > 1):
        log.info("%s", line)
    device = choose_device(config.device)
    if device.is_gpu:
        heartbeat.set_on_gpu()
        log.info("%s", numa.bind_near(device.pci_address()))
    accelerators.log_use(config, device)
    process_groups.start(device)
    world_size = torch.distributed.get_world_size()
    layout.check(config, world_size)
    data = open_run_data(config)
    for long_samples in filter(None, data.long_samples):
        log.info("%s", long_samples)
    trainer = Trainer(config, data, device, heartbeat)
    heartbeat.watch_compilations()
    try:
        trainer.resume()
        exit_reason = trainer.run(stop_when or stop_condition())
        heartbeat.beat("end", trainer.step)
        if exit_reason == "regroup":
            trainer.checkpoints.drain()  # all nodes resume from the checkpoint that is being written
        else:
            trainer.checkpoints.leave_node()
        if exit_reason == "done":
            trainer.checkpoints.finish()
    except NodeFault as fault:
        trainer.checkpoints.leave_node(fault.ranks)  # other nodes keep theirs, to resume faster
        raise
    finally:
        heartbeat.ignore_compilations()
        trainer.close()
    torch.distributed.barrier()
    process_groups.destroy()
    process_groups.stop()
    return exit_reason


class Trainer:
    """The state of a run on this rank, and its loop."""

    def __init__(self, config: RunConfig, data: RunData, device: Device, heartbeat: Heartbeat) -> None:
        self.config, self.data, self.device, self.heartbeat = config, data, device, heartbeat
        self.groups = process_groups.build(config.parallel, config.train.seed)
        self.engine = build_engine(config, data.vocabulary.size, self.groups, device)
        self.weights = weight_tensor(config.loss_weights, data.vocabulary.modalities, device.torch_device)
        self.checkpoints = CheckpointManager(config, data, self.engine, self.groups, device, self._wait_for_writer)
        self.step = self.saved_step = 0
        self.fetch = None if data.cache is None else FetchAhead(data.cache, config.data.cache.ahead)
        self.loader = self._loader(consumed_rows=0)
        rank, gather = self.groups.rank, self.groups.gather
        self.guard = LossGuard(config, data.vocabulary.modalities, rank, gather)
        stragglers = config.resilience.stragglers
        self.stragglers = Stragglers(stragglers, config.output, rank, self.groups.pipeline_rank, gather)
        self.tokens = torch.zeros(len(self.weights), dtype=torch.int64, device=device.torch_device)
        """Tokens seen so far, by modality; on the device, so that no step waits for it."""
        self.flops = 0.0
        """Model FLOPs of the rows that all ranks have read since the last report."""
        self.metrics: metrics.Metrics | None = None
        self.profiler = StepProfiler(config.metrics.profile, config.output, rank, device)
        self.garbage = GarbageCollection(config.train.gc_every)
        self.suite: SuiteDuringRun | None = None
        if config.evaluation is not None:
            self.suite = SuiteDuringRun(config, config.evaluation, data, self.engine, self.groups, device)
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
            reading=Reading(d.workers, d.prefetch, self.device.is_gpu, self.fetch, self._last_step - self.step),
        )

    @property
    def _last_step(self) -> int:
        """The step after which this run ends, if nothing stops it earlier."""
        return min(self.config.train.steps, self.config.train.stop_after or self.config.train.steps)

    def run(self, stop_when: StopCondition) -> ExitReason:
        """Run steps until train.steps, stop_after or a stop, with reports, losses and checkpoints as configured."""
        t, c = self.config.train, self.config.checkpoint
        local_every = c.local_every if c.local is not None else 0
        first, last = self.step + 1, self._last_step
        self._record_start()
        self.garbage.begin()
        while self.step < last:
            exit_reason = stop_when.stops_before(self.step + 1)
            if exit_reason is not None:
                self._save_last_step()
                return exit_reason

            self.profiler.begin(self.step + 1)
            # Read the rows, and compute loss and gradients. Only DeepSpeed changes the weights here already.
            first_row, batches = self._read_batches()
            self.heartbeat.beat("step", self.step + 1)
            result = self.engine.compute_gradients(batches, self.weights)

            # Judge the result. If it is bad, the guard computes it again; if it stays bad, the update is skipped, or
            # the run returns to an earlier step.
            recompute = self.engine.recompute_gradients if self.engine.can_discard else None
            result, is_good = self.guard.check(self.step + 1, first_row, t.global_batch_size, result, recompute)
            if is_good or not self.engine.can_discard:
                self.engine.apply_update()
            else:
                self.engine.discard()
            if self.guard.wanted_rollback is not None:
                self._roll_back(self.guard.wanted_rollback)
                continue
            self.step += 1
            self.tokens += result.loss.count.to(self.tokens.dtype)
            self.flops += self.loader.figures.cost
            self.profiler.end(self.step)

            # Report, evaluate and save, each as often as configured.
            is_last = self.step == last
            if self.step % t.log_every == 0 or self.step in (1, t.steps):
                self._report(result)
            if self.step == first and self.groups.rank == 0:
                self.heartbeat.tell_first_step(self.config.output, first)
            heldout_loss = None
            if t.eval_every and (self.step % t.eval_every == 0 or is_last):
                heldout_loss = self._evaluate()
            if self.suite is not None and (self.step % self.suite.every == 0 or is_last):
                self._run_suite(self.suite)
            fault = self.guard.fault or self.stragglers.fault
            if is_last or fault or (c.every and self.step % c.every == 0):
                self.save(heldout_loss, wait=is_last or fault is not None)
            elif local_every and self.step % local_every == 0:
                self.save(heldout_loss, to_run=False)
            else:
                self.checkpoints.poll()
            self.garbage.end_step(self.step)
            if fault and not is_last:
                raise fault  # the job restarts without that node, from the checkpoint just written
        self._save_last_step()
        return "done"

    def _record_start(self) -> None:
        if self.groups.rank == 0:
            run, t, world_size = self.config.output, self.config.train, self.groups.world_size
            self.metrics = metrics.Metrics(run, self.step, t.steps, self.config.metrics)
            events.record(run, "started", step=self.step, world=world_size, layout=self.config.parallel.model_dump())

    def _read_batches(self) -> tuple[int, list[Batch]]:
        """Return the first row of the next step and this rank's microbatches, without rows that the guard skips."""
        self.heartbeat.beat("data", self.step + 1)
        first_row = self.guard.next_row(self.loader.consumed_rows, self.config.train.global_batch_size)
        if first_row != self.loader.consumed_rows:
            self._open_loader(first_row)
        with self.engine.timers.host("data"):
            return first_row, [batch.to(self.device.torch_device) for batch in self.loader.step()]

    def _report(self, result: api.StepResult) -> None:
        """Compare the step's figures between ranks; rank 0 writes them."""
        seconds = self.engine.timers.take()
        scores = self.stragglers.window(self.step, seconds, self.device.torch_device)
        memory = gpu_memory(self.device.memory_figures(), self.device.torch_device, self.groups.gather)
        model_flops, self.flops = self.flops, 0.0
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
        values |= {"model_flops": model_flops} | scores.figures() | memory
        if self.fetch is not None:
            values |= self.fetch.figures()
        devices = metrics.Devices(self.groups.world_size, self.device.peak_flops(self.config.train.precision))
        tokens = self.config.train.global_batch_size * self.config.data.seq_length
        self.metrics.report(self.step, values, tokens, devices)

    def _roll_back(self, window: SkippedWindow) -> None:
        """Roll back to the newest checkpoint from before the rows to skip."""
        self.heartbeat.beat("resume", self.step)
        self.checkpoints.drain()
        folder = self.checkpoints.checkpoint_before(window.first)
        if folder is None:
            why = f"{window.why}, and there is no checkpoint from before row {window.first} to roll back to"
            self.guard.stop(self.step + 1, why, "lower checkpoint.every, or set resilience.loss_guard.action=skip")
        self._continue_from(self.checkpoints.go_back(folder))
        self.flops = 0.0
        self.guard.rolled_back(window)
        if self.metrics is not None:
            self.metrics.go_back(self.step)

    def _evaluate(self) -> float | None:
        """Report the mean loss per modality over the held-out rows, weighted by tokens; return their weighted mean."""
        names, start = self.data.vocabulary.modalities, time.monotonic()
        # The losses are already reduced over all ranks; a modality without tokens in a batch has the mean NaN.
        total = torch.zeros(len(names), dtype=torch.float64)
        count = torch.zeros_like(total)
        self.heartbeat.beat("evaluate", self.step)
        for batches in self.data.heldout_steps(self.config, self.groups.data_rank, self.groups.data_size):
            self.heartbeat.beat("evaluate", self.step)
            loss = self.engine.evaluate([batch.to(self.device.torch_device) for batch in batches], self.weights)
            total += torch.nan_to_num(loss.mean.cpu()) * loss.count.cpu()
            count += loss.count.cpu()
        if self.metrics is not None:
            means = {
                f"heldout/{n}": metrics.finite_or_none(float(x)) for n, x in zip(names, total / count, strict=True)
            }
            self.metrics.report_heldout(self.step, means, time.monotonic() - start)
        return overall(total / count, self.weights.cpu())

    def _run_suite(self, suite: SuiteDuringRun) -> None:
        """Run the suite on the weights after this step, and report its figures."""
        start = time.monotonic()
        values = suite.run(self.step, self.loader.consumed_rows, lambda: self.heartbeat.beat("evaluate", self.step))
        if self.metrics is not None:
            self.metrics.report_suite(self.step, values, time.monotonic() - start)

    def save(self, heldout_loss: float | None = None, wait: bool = False, to_run: bool = True) -> None:
        """Start to write a checkpoint of the state after the current step; with `wait` it is complete on return.

        to_run: save into the run's folder too, not only into local storage.
        """
        self.heartbeat.beat("save", self.step)
        start = time.monotonic()
        with self.engine.timers.host("checkpoint"):
            tokens = dict(zip(self.data.vocabulary.modalities, map(int, self.tokens), strict=True))
            rows, guard = self.loader.consumed_rows, self.guard.state()
            self.checkpoints.save(self.step, rows, tokens, guard, heldout_loss, wait, to_run)
        self.saved_step = self.step if to_run else self.saved_step
        if self.metrics is not None:
            self.metrics.exclude("checkpoint_stall_seconds", time.monotonic() - start)

    def _save_last_step(self) -> None:
        """Save the state of the last step, unless it is saved already, and wait until it is written."""
        if self.step > self.saved_step:
            self.save(wait=True)

    def resume(self) -> None:
        """Continue from the newest valid checkpoint of the output folder, if there is one."""
        self.heartbeat.beat("resume", self.step)
        resumed = self.checkpoints.resume()
        if resumed is not None:
            self._continue_from(resumed)
            # A state that is only in local storage is saved to the run's folder at the next stop.
            self.saved_step = self.step if self.checkpoints.is_in_run else 0

    def _continue_from(self, state: TrainState) -> None:
        self.step = self.saved_step = state.step
        seen = [state.tokens.get(name, 0) for name in self.data.vocabulary.modalities]
        self.tokens = torch.tensor(seen, device=self.device.torch_device)
        self.guard.restore(state.loss_guard)
        self._open_loader(state.consumed_rows)

    def _open_loader(self, row: int) -> None:
        """Continue reading from this row."""
        self.loader.close()
        # `waited` is reported as a total of the run.
        waited, self.loader = self.loader.waited, self._loader(row)
        self.loader.waited = waited

    def _wait_for_writer(self) -> None:
        self.heartbeat.beat("wait", self.step)

    def close(self) -> None:
        self.checkpoints.close()
        self.loader.close()
        if self.fetch is not None:
            self.fetch.close()
        self.garbage.close()
        self.profiler.close()
        if self.metrics is not None:
            self.metrics.close()
