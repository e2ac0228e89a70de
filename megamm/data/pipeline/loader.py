"""Loads this data rank's batches: its own rows of each global batch, read ahead by worker processes.

    Loader   .step() -> list[Batch], the microbatches of the next global batch

Rows are planned in this process (balance.py), and read, packed and stacked by `torch.utils.data.DataLoader`. Each step
takes the rows [consumed, consumed + global_batch), at every world size. So the whole state is the number of rows
consumed, without those read ahead.
"""

import multiprocessing
import multiprocessing.util
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.multiprocessing
from torch.utils.data import DataLoader, Dataset

from megamm.common.errors import UserError
from megamm.common.processes import (
    WORKERS_FOLDER,
    die_with_parent,
    remove_shared_tensors,
    socket_folder,
    without_blas_threads,
)
from megamm.common.sample import Batch
from megamm.data.pipeline.balance import RowCost, StepFigures, balanced_batches
from megamm.data.pipeline.fetch_ahead import FetchAhead
from megamm.data.pipeline.row_stream import RowReader, RowSpec, RowStream


@dataclass(frozen=True)
class Reading:
    """How data is read: `workers` processes (0: in the training process), `prefetch` steps ahead.

    pin_memory: use page-locked memory, from which a GPU can copy while it computes. fetch: downloads the shards that
    are in an object store, for `steps` steps, after which there are no more.
    """

    workers: int = 0
    prefetch: int = 2
    pin_memory: bool = False
    fetch: FetchAhead | None = None
    steps: int = 0


class Loader:
    """This data rank's share of each global batch; global_batch and micro_batch are in rows.

    Raises UserError if they do not divide. `waited`: seconds spent in `step` so far.
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
            raise UserError(what, remedy=f"set train.global_batch_size to a multiple of {micro_batch * data_size}")
        assert 0 <= data_rank < data_size
        self.stream, self.global_batch, self.micro_batch = stream, global_batch, micro_batch
        self.data_rank, self.data_size, self.cost, self.reading = data_rank, data_size, cost, reading
        self.consumed_rows, self.waited = consumed_rows, 0.0
        self.figures = StepFigures(0.0, 1.0, 0.0)
        """Figures of the last step."""
        self._planned: deque[StepFigures] = deque()
        """Figures of the steps that are planned but not consumed, the next one first."""
        self._batches: Iterator[Any] | None = None

    @property
    def _microbatches(self) -> int:
        """Microbatches of a step on each data rank."""
        return self.global_batch // (self.micro_batch * self.data_size)

    def step(self) -> list[Batch]:
        """The microbatches of the next global batch. Raises UserError for damaged data or a dead worker."""
        begin = time.monotonic()
        if self._batches is None:
            with without_blas_threads():  # starts the worker server, which forks the workers
                self._batches = iter(self._data_loader())
        batches = [self._next(self._batches) for _ in range(self._microbatches)]
        self.figures = self._planned.popleft()
        self.consumed_rows += self.global_batch
        self.waited += time.monotonic() - begin
        return batches

    def close(self) -> None:
        """Stop the workers."""
        workers = getattr(self._batches, "_workers", [])
        self._batches = None
        for worker in workers:
            remove_shared_tensors(worker.pid)  # torch kills those that take longer than some seconds

    def _data_loader(self) -> "DataLoader[Batch]":
        workers = self.reading.workers
        parallel: dict[str, Any] = {}
        if workers:
            # Not fork: this process has threads of torch and its communication; a fork would copy their held locks.
            # Not spawn: every worker would import torch; a server imports it once and forks before it has threads.
            context = torch.multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["megamm.data.pipeline.worker_server", "megamm.data.pipeline.loader"])
            os.environ[WORKERS_FOLDER] = socket_folder()
            ahead = max(1, -(-self.reading.prefetch * self._microbatches // workers))
            parallel = {"multiprocessing_context": context, "prefetch_factor": ahead}
        return DataLoader(
            _Microbatches(self.stream.reader),
            sampler=self._plan(self.consumed_rows),
            batch_size=None,  # an item is already a microbatch
            num_workers=workers,
            pin_memory=self.reading.pin_memory,
            worker_init_fn=_end_with_parent,
            generator=torch.Generator(),  # DataLoader draws a seed: it must not use the model's generator
            **parallel,
        )

    def _plan(self, first_row: int) -> Iterator[list[RowSpec]]:
        """This rank's microbatches from that row on; the DataLoader asks as far ahead as it reads."""
        batches = balanced_batches(
            self.stream,
            first_row,
            global_batch=self.global_batch,
            micro_batch=self.micro_batch,
            data_size=self.data_size,
            cost=self.cost,
        )
        if (fetch := self.reading.fetch) is not None:
            batches = fetch.before(batches, self.stream, first_row, self.reading.steps, self.data_rank)
        for batch in batches:
            self._planned.append(batch.figures)
            yield from batch.microbatches(self.data_rank)

    def _next(self, batches: Iterator[Any]) -> Batch:
        try:
            batch = next(batches)
        except (RuntimeError, OSError, EOFError):
            # A dead worker is noticed after some seconds, or at once if it was handing over a batch.
            died = [worker.pid for worker in getattr(batches, "_workers", []) if _has_ended(worker)]
            if not died:
                raise
            for process in died:
                remove_shared_tensors(process)
            what = f"a data worker (process {', '.join(map(str, died))}) ended unexpectedly"
            remedy = "if the node ran out of memory, lower data.workers or data.prefetch; the same command resumes"
            raise UserError(what, remedy=remedy, is_transient=True) from None
        if isinstance(batch, _Failure):
            raise UserError(batch.what, where=batch.where, remedy=batch.remedy)
        assert isinstance(batch, Batch)
        return batch


def _has_ended(worker: multiprocessing.Process) -> bool:
    worker.join(timeout=1)  # the connection breaks before the system reports the exit
    return not worker.is_alive()


@dataclass(frozen=True)
class _Failure:
    """Carries a worker's UserError: DataLoader can only rebuild exceptions with one argument."""

    what: str
    where: str | None
    remedy: str


class _Microbatches(Dataset[Any]):
    """The work of a worker: the planned rows of a microbatch -> Batch."""

    def __init__(self, reader: RowReader) -> None:
        self.reader = reader

    def __getitem__(self, rows: list[RowSpec]) -> Batch | _Failure:
        try:
            return Batch.stack([self.reader.row(row) for row in rows])
        except UserError as error:
            return _Failure(error.what, None if error.where is None else str(error.where), error.remedy)


def _end_with_parent(worker: int) -> None:
    """Make a worker exit when the training process exits. torch watches the parent, which here is the fork server."""
    die_with_parent(os.getppid())  # the server exits with the training process, and the kernel kills a stuck worker
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are started by multiprocessing"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
