"""Runs units in this process or in processes of this machine.

In: a stage and its units. Out: their results in the order of the units. Neither the engine nor the number of workers
changes a result or a byte. A unit whose worker is killed is done again; one that kills its worker ATTEMPTS times is an
error. At most AHEAD units a worker are submitted at a time, so that the memory does not grow with their number.
"""

import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Protocol

from megamm.data.units.progress import StageProgress
from megamm.data.units.unit import AHEAD, ATTEMPTS, SAMPLES, Result, Stage, Unit, killed

logger = logging.getLogger(__name__)


class UnitEngine(Protocol):
    """Does units in any order."""

    def complete(self, stage: Stage, units: Sequence[tuple[int, Unit]]) -> Iterator[tuple[int, Result]]:
        """Do the numbered units, and yield each number with its result as soon as it is there."""
        ...


def run_units(engine: UnitEngine, stage: Stage, units: Sequence[Unit]) -> list[Result]:
    """Do all units of a stage that no earlier attempt has finished; returns all results in the order of the units."""
    names = [unit.name for unit in units]
    assert len(set(names)) == len(names), f"two units of {stage.folder.name} have one name"
    stage.folder.mkdir(parents=True, exist_ok=True)
    results = {number: kept for number, unit in enumerate(units) if (kept := stage.done(unit)) is not None}
    missing = [(number, unit) for number, unit in enumerate(units) if number not in results]
    if results:
        logger.info("%s: %d of %d units kept", stage.folder.name, len(results), len(units))
    with StageProgress(stage.folder.name, len(units)) as progress:
        for _ in results:
            progress.keep()
        for number, result in engine.complete(stage, missing):
            results[number] = result
            progress.add(int(result.get(SAMPLES, 0)))
    return [results[number] for number in range(len(units))]


class InProcess:
    """Does units one by one in this process."""

    def complete(self, stage: Stage, units: Sequence[tuple[int, Unit]]) -> Iterator[tuple[int, Result]]:
        """Do the numbered units in order."""
        for number, unit in units:
            yield number, stage.do(unit)


class LocalProcesses:
    """Does units in worker processes of this machine, which are started for the first unit and end with `close`."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def complete(self, stage: Stage, units: Sequence[tuple[int, Unit]]) -> Iterator[tuple[int, Result]]:
        """Do the numbered units; those of a broken pool are done again, one at a time, so that the culprit is found."""
        waiting, lost = list(reversed(units)), dict[int, int]()
        running: dict[Future[Result], tuple[int, Unit]] = {}
        while waiting or running:
            while waiting and len(running) < (1 if lost else AHEAD * self.workers):
                task = waiting.pop()
                try:
                    running[self._workers().submit(stage.do, task[1])] = task
                except BrokenProcessPool:
                    # It broke since the last wait: the units that run in it fail now, this one was never there.
                    waiting.append(task)
                    if not running:  # a worker without a unit was killed
                        self.close()
                    break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            broken = [running.pop(future) for future in list(done) if isinstance(future.exception(), BrokenProcessPool)]
            for future in done & running.keys():
                number, _ = running.pop(future)
                lost.pop(number, None)
                yield number, future.result()
            if broken:
                # Every unit of the pool fails with it, and nothing says whose worker was killed.
                broken += running.values()
                running.clear()
                self.close()
                for number, unit in broken:
                    lost[number] = lost.get(number, 0) + 1
                    if lost[number] >= ATTEMPTS:
                        raise killed(stage, unit)
                logger.warning("%s: a worker was killed; %d units are done again", stage.folder.name, len(broken))
                waiting += reversed(broken)

    def _workers(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # "spawn": a forked child of a process with threads (torch, image libraries) can hang.
            self._pool = ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("spawn"))
        return self._pool

    def close(self) -> None:
        """End the workers; the next unit starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


@contextmanager
def open_engine(workers: int) -> Iterator[UnitEngine]:
    """The engine with this number of worker processes; 0: this process."""
    if not workers:
        yield InProcess()
        return
    pool = LocalProcesses(workers)
    try:
        yield pool
    finally:
        pool.close()
