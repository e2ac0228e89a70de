"""Runs with faults for the loss guard and the straggler scores to detect: each changes a forked rank's own code.

`at` counts forward and backward passes of the process, from 1: a step that is run again counts twice.
"""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Case:
    """A config to train, and the faults by name with their arguments."""

    config: str
    faults: list[tuple[str, dict[str, Any]]]


def train(case: Case) -> tuple[str, str] | None:
    """Run with the faults in a rank; return the error that it ended with, as (kind, text)."""
    # Saving starts processes, which a daemon must not do.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    from megamm.common.errors import UserError
    from megamm.config import load_config
    from megamm.elastic.rank import NodeFault
    from megamm.train import trainer

    for name, arguments in case.faults:
        globals()[name](**arguments)
    try:
        trainer.train(load_config(Path(case.config)))
    except (UserError, NodeFault) as error:
        return type(error).__name__, str(error)
    return None


def passes(during: Callable[[int], Any]) -> None:
    """Call during(number) before every forward and backward pass of training."""
    from megamm.mcore import step

    run, count = step.run, 0

    def counted(*args: Any, forward_only: bool = False, **options: Any) -> Any:
        nonlocal count
        if not forward_only:
            count += 1
            during(count)
        return run(*args, forward_only=forward_only, **options)

    step.run = counted


def nan_in_gradient(rank: int, at: list[int]) -> None:
    """Make one element of the first bucket's gradient NaN, before it is summed over ranks."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Buckets

    original, number = Buckets.start_grad_sync, 0

    def note(now: int) -> None:
        nonlocal number
        number = now

    def poisoned(self: Any, *args: Any, **options: Any) -> Any:
        if dist.get_rank() == rank and number in at:
            self.buckets[0].grad_data[7] = torch.nan
        return original(self, *args, **options)

    passes(note)
    Buckets.start_grad_sync = poisoned


def flipped_bit(rank: int, at: list[int]) -> None:
    """Flip the highest exponent bit of one activation between 1 and 2 in a norm's output, once each time."""
    from megamm.mcore.layers import RMSNorm

    original, due = RMSNorm.forward, False

    def note(now: int) -> None:
        nonlocal due
        due = dist.get_rank() == rank and now in at

    def flipping(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal due
        output = original(self, *args, **options)
        usual = ((output.abs() >= 1) & (output.abs() < 2)).flatten().nonzero()
        if due and len(usual):
            due = False
            with torch.no_grad():
                output.data.view(-1).view(torch.int32)[usual[0]] ^= 1 << 30
        return output

    passes(note)
    RMSNorm.forward = flipping


def poisoned_rows(rows: list[int]) -> None:
    """Give steps with one of these rows the same label everywhere."""
    from megamm.train import trainer

    class Poisoned(trainer.Loader):
        def step(self) -> Any:
            first = self.consumed_rows
            batches = super().step()
            if any(first <= row < self.consumed_rows for row in rows):
                for batch in batches:
                    batch.labels.copy_(torch.where(batch.labels >= 0, batch.labels * 0 + 1, batch.labels))
            return batches

    trainer.Loader = Poisoned


def rows_left_out(first: int, count: int) -> None:
    """Make the reference of a roll-back: data without these rows."""
    from megamm.data.pipeline.row_stream import RowStream

    row_spec = RowStream.row_spec
    RowStream.row_spec = lambda self, row: row_spec(self, row + count if row >= first else row)


def ended_before(step: int) -> None:
    """End the run where this step would begin, as if by a user's mistake."""
    from megamm.common.errors import UserError
    from megamm.train import trainer

    read_batches = trainer.Trainer._read_batches

    def ended(self: Any) -> Any:
        if self.step + 1 == step:
            raise UserError("ended", remedy="none", on_all_ranks=True)
        return read_batches(self)

    trainer.Trainer._read_batches = ended


def ended_by_roll_back() -> None:
    """End the run when it has set the later checkpoints aside."""
    from megamm.common.errors import UserError
    from megamm.guards.loss_guard import LossGuard

    def ended(self: Any, window: Any) -> None:
        raise UserError("ended", remedy="none", on_all_ranks=True)

    LossGuard.rolled_back = ended


def no_remote_storage() -> None:
    """Make writing to remote storage fail."""
    from megamm.checkpoint.storage.remote import RemoteCheckpoints, RemoteError

    def refused(self: Any, name: str) -> None:
        raise RemoteError("no answer", self.store.url)

    RemoteCheckpoints.withdraw = refused


def no_update(at: list[int]) -> None:
    """Make the reference of a skipped step: the optimizer and its schedule stand still in these passes."""
    from megamm.engine.native import NativeEngine
    from megamm.mcore import optimizer

    update, number = optimizer.update, 0

    def note(now: int) -> None:
        nonlocal number
        number = now

    passes(note)
    apply_update = NativeEngine.apply_update

    def kept(self: Any) -> None:
        schedule = self.schedule.step
        self.schedule.step = lambda increment: None if number in at else schedule(increment)
        try:
            apply_update(self)
        finally:
            self.schedule.step = schedule

    optimizer.update = lambda *args: None if number in at else update(*args)
    NativeEngine.apply_update = kept


def slow_forward(rank: int, seconds: float) -> None:
    """Add a busy loop to every forward of a norm. Phases are measured in processor time, independent of other load."""
    from megamm.common import device, timers
    from megamm.mcore.layers import RMSNorm

    timers.time = device.time = SimpleNamespace(perf_counter=time.thread_time)  # type: ignore[assignment]

    original = RMSNorm.forward

    def slow(self: Any, *args: Any, **options: Any) -> Any:
        until = time.thread_time() + seconds * (dist.get_rank() == rank)
        while time.thread_time() < until:
            pass
        return original(self, *args, **options)

    RMSNorm.forward = slow


def slow_loader(rank: int, seconds: float) -> None:
    """Make its rows slow to read."""
    from megamm.data.pipeline.row_stream import RowReader

    original = RowReader.row

    def slow(self: Any, spec: Any) -> Any:
        if dist.get_rank() == rank:
            time.sleep(seconds)
        return original(self, spec)

    RowReader.row = slow
