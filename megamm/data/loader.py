"""This data rank's batches: the rows of each global batch that are its own, read ahead by worker processes.

    Loader   .step() -> list[Batch], the microbatches of the next global batch

Rows are planned here and read, packed and stacked by `torch.utils.data.DataLoader`. Step after step takes the rows
[consumed, consumed + global_batch) at every world size; which rank takes which is `balance.assign`. So the whole
state is the number of rows consumed: not those read ahead.
"""

import multiprocessing
import multiprocessing.util
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.multiprocessing
from torch.utils.data import DataLoader, Dataset

from megamm.data import worker_server
from megamm.data.balance import assign, imbalance
from megamm.data.row_reader import Recipe, RowReader
from megamm.data.row_stream import RowStream
from megamm.data.sample import Batch
from megamm.errors import UserError
from megamm.resilience.processes import die_with_parent, without_blas_threads

RowCost = Callable[[Sequence[int]], float]
"""Estimated cost of a row (any unit) from the lengths of its documents."""


@dataclass(frozen=True)
class StepFigures:
    """Of one global batch, over all ranks: share of padding, and cost of the dearest data rank over the mean."""

    padding_share: float
    imbalance: float


@dataclass(frozen=True)
class Reading:
    """Who reads: `workers` processes (0: the training process itself), `prefetch` steps ahead.

    pin_memory: into page-locked memory, from which a GPU copies while it computes.
    """

    workers: int = 0
    prefetch: int = 2
    pin_memory: bool = False


class Loader:
    """This data rank's share of each global batch. global_batch and micro_batch are in rows. UserError if they do

    not divide. `waited` is the time in seconds that `step` has taken so far.
    """

    def __init__(
        self,
        stream: RowStream,
        *,
        global_batch: int,
        micro_batch: int,
        data_rank: int,
        data_size: int,
        cost: RowCost,
        consumed_rows: int = 0,
        reading: Reading = Reading(),
    ) -> None:
        if global_batch % (micro_batch * data_size):
            what = f"global batch {global_batch} is not a multiple of micro batch {micro_batch} x data size {data_size}"
            raise UserError(what, remedy=f"set it to a multiple of {micro_batch * data_size}")
        assert 0 <= data_rank < data_size
        self.stream, self.global_batch, self.micro_batch = stream, global_batch, micro_batch
        self.data_rank, self.data_size, self.cost, self.reading = data_rank, data_size, cost, reading
        self.consumed_rows, self.waited = consumed_rows, 0.0
        self.figures = StepFigures(0.0, 1.0)
        """Of the last step."""
        self._planned: deque[StepFigures] = deque()
        self._batches: Iterator[Any] | None = None

    def step(self) -> list[Batch]:
        """The microbatches of the next global batch. UserError for damaged data and for a worker that died."""
        begin = time.monotonic()
        if self._batches is None:
            with without_blas_threads():  # starts the server of the workers, which forks them
                self._batches = iter(self._data_loader())
        batches = [self._next(self._batches) for _ in range(self.global_batch // (self.micro_batch * self.data_size))]
        self.figures = self._planned.popleft()
        self.consumed_rows += self.global_batch
        self.waited += time.monotonic() - begin
        return batches

    def state(self) -> dict[str, int]:
        """All there is to save; pass it to a new Loader at any data size."""
        return {"consumed_rows": self.consumed_rows}

    def close(self) -> None:
        """End the workers."""
        self._batches = None

    def _data_loader(self) -> "DataLoader[Batch]":
        workers, microbatches = self.reading.workers, self.global_batch // (self.micro_batch * self.data_size)
        parallel: dict[str, Any] = {}
        if workers:
            # Not fork: this process has threads of torch and of its communication, whose locks a fork would copy held.
            # Not spawn: that imports torch in each worker; a server imports it once and forks before it has threads.
            context = torch.multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["megamm.data.worker_server", "megamm.data.loader"])
            os.environ[worker_server.FOLDER] = multiprocessing.util.get_temp_dir()
            ahead = max(1, -(-self.reading.prefetch * microbatches // workers))
            parallel = {"multiprocessing_context": context, "prefetch_factor": ahead}
        return DataLoader(
            _Microbatches(self.stream.reader),
            sampler=self._recipes(self.consumed_rows),
            batch_size=None,  # an item is a microbatch already
            num_workers=workers,
            pin_memory=self.reading.pin_memory,
            worker_init_fn=_end_with_parent,
            generator=torch.Generator(),  # it draws a seed: not from the model's generator
            **parallel,
        )

    def _recipes(self, first: int) -> Iterator[list[Recipe]]:
        """This rank's microbatches from row `first` on, without end; asked for as far ahead as is read."""
        while True:
            plans = [self.stream.plan(r) for r in range(first, first + self.global_batch)]
            costs = [self.cost(plan.lengths) for plan in plans]
            rows = assign(costs, self.data_size, self.micro_batch)
            used = sum(sum(plan.lengths) for plan in plans) / (self.global_batch * self.stream.row_length)
            self._planned.append(StepFigures(1.0 - used, imbalance(costs, rows)[0]))
            for microbatch in rows[:, self.data_rank].tolist():
                yield [self.stream.locate(plans[row]) for row in microbatch]
            first += self.global_batch

    def _next(self, batches: Iterator[Any]) -> Batch:
        try:
            batch = next(batches)
        except (RuntimeError, OSError, EOFError):
            # A worker that dies is missed after some seconds, or at once if it was just handing over a batch.
            died = [worker.pid for worker in getattr(batches, "_workers", []) if _has_ended(worker)]
            if not died:
                raise
            what = f"a data worker (process {', '.join(map(str, died))}) ended unexpectedly"
            remedy = "if the system was short of memory, lower data.workers or data.prefetch; the same command resumes"
            raise UserError(what, remedy=remedy, is_transient=True) from None
        if isinstance(batch, _Failure):
            raise UserError(batch.what, where=batch.where, remedy=batch.remedy)
        assert isinstance(batch, Batch)
        return batch


def _has_ended(worker: multiprocessing.Process) -> bool:
    worker.join(timeout=1)  # the connection breaks before the system reports the end
    return not worker.is_alive()


@dataclass(frozen=True)
class _Failure:
    """A worker's UserError on its way: DataLoader can only rebuild exceptions of one argument."""

    what: str
    where: str | None
    remedy: str


class _Microbatches(Dataset[Any]):
    """What a worker computes: recipes of a microbatch's rows -> Batch."""

    def __init__(self, reader: RowReader) -> None:
        self.reader = reader

    def __getitem__(self, recipes: list[Recipe]) -> Batch | _Failure:
        try:
            return Batch.stack([self.reader.row(recipe) for recipe in recipes])
        except UserError as error:
            return _Failure(error.what, None if error.where is None else str(error.where), error.remedy)


def _end_with_parent(worker: int) -> None:
    """In a worker: end when the training process does. torch looks at the parent, which is the server of the fork."""
    die_with_parent(os.getppid())  # the server ends with the training process, and takes a stuck worker with it
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is started by multiprocessing"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
