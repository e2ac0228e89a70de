"""Time that a step waits for a checkpoint, and the cost of saving at every step.

part stall: one rank, a model with about 300 MB of state in float32. Ours against torch.save of the same tensors, DCP
(dcp.save), DCP async (dcp.async_save) by default and with its staging memory kept, in turns; medians and minima of the
rounds. stall: seconds by which the next step ends later, as far as it waits (ours is copied during that step's forward
and backward; copy: seconds if it were waited for at once); durable: until the files are synced (torch.save syncs
nothing, so its figure is without); resume: seconds to read all back into the live tensors, files in the page cache.
part every: two ranks with the demo's model and batch (examples/cpu_tiny.yaml) on random tokens. Blocks of steps without
a save, with one into local storage (on a RAM disk, one node, no replica) and with one into the run's folder after each
step take turns; cost: 1 - tokens/s with / tokens/s without; cpu_cost: processor seconds, of the rank and the processes
that it started, with / without - 1; medians of the rounds' ratios. alone: processor seconds of a save without training;
share: that divided by those of a step. On a shared machine cost and cpu_cost are noise, share is not; it excludes
slower training through evicted caches.
Run: `python benchmarks/checkpoint.py [--part stall|every] [--rounds N] [--json OUT]`.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from megamm import __version__
from megamm.checkpoint import TrainState, path_of
from megamm.checkpoint.rank_file import RankFile
from megamm.checkpoint.saver import Saver
from megamm.checkpoint.storage.local import LocalStorage
from megamm.common.device import choose
from megamm.common.sample import Batch
from megamm.config import RunConfig, config_from_dict
from megamm.engine.build import build_engine
from megamm.mcore import process_groups
from megamm.parity.rows import random_row
from megamm.parity.worlds import WorldFailure, Worlds

ROUNDS = 5
LARGE = {"num_layers": 5, "hidden_size": 512, "ffn_hidden_size": 1536, "num_attention_heads": 8, "num_query_groups": 4}
DEMO = {"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 768, "num_attention_heads": 4, "num_query_groups": 2}
VOCABULARY, LENGTH, GLOBAL_BATCH, MICRO_BATCH = 8104, 512, 8, 4
"""The demo's batch."""
STEPS_A_BLOCK = 4

Timed = dict[str, float]


def config_of(model: dict[str, int], batch: int) -> RunConfig:
    """Return the config of a run of this model; folders are not used."""
    return config_from_dict(
        {
            "output": "unused",
            "device": "cpu",
            "model": model | {"head_dim": 64},
            "data": {"seq_length": LENGTH, "sources": [{"path": "unused"}]},
            "tokenizers": {"text": "unused"},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 1000, "global_batch_size": batch, "micro_batch_size": min(batch, MICRO_BATCH)},
        },
        where="benchmark",
    )


def state(step: int) -> TrainState:
    """Return the state for a checkpoint of which only the tensors are used."""
    return TrainState(step, 0, dist.get_world_size(), layout={}, vocabulary=[], config={}, versions={})


class Sides:
    """One model's state, and each way of saving it; every way writes the same tensors, each once."""

    def __init__(self, folder: Path) -> None:
        place, config = choose("cpu"), config_of(LARGE, batch=1)
        process_groups.start(place)
        groups = process_groups.build(config.parallel, seed=1)
        self.runner = build_engine(config, VOCABULARY, groups, place)
        self.batch = Batch.stack([random_row(np.random.default_rng(1), LENGTH)])
        self.blocks = self.runner.blocks()
        self.layout = RankFile.of(self.blocks, "unused")
        self.tensors = {f"{i}": self.blocks[at.shard].data for i, at in enumerate(self.layout.offsets)}
        self.folder, self.step = folder, 0
        self.saver = Saver(folder / "ours", place, keep=1)
        self.settled = 0.0
        """Seconds that updates have waited for copies."""
        self.runner.before_update = self._settle
        self.save()  # makes the plan and starts the writer
        self.saver.finish()
        self.kept = DefaultStager(StagingOptions(False, False, False, False))

    def _settle(self) -> None:
        start = time.perf_counter()
        self.saver.settle()
        self.settled += time.perf_counter() - start

    def save(self) -> float:
        """Begin our save; return the seconds that it took."""
        start = time.perf_counter()
        self.step += 1
        self.saver.save(state(self.step), self.blocks, {"torch": torch.get_rng_state()})
        return time.perf_counter() - start

    def ours(self) -> Timed:
        settled, stalled = self.settled, self.save()
        self.runner.compute_gradients([self.batch], torch.ones(2, dtype=torch.float64))
        self.runner.apply_update()
        stalled += self.settled - settled
        self.saver.finish()
        return {"stall": stalled}

    def ours_waiting(self) -> Timed:
        start = time.perf_counter()
        self.save()
        self.saver.settle()
        copied = time.perf_counter() - start
        self.saver.finish()
        return {"copy": copied, "durable": time.perf_counter() - start}

    def torch_save(self) -> Timed:
        start = time.perf_counter()
        torch.save(self.tensors, self.folder / "torch.pt")
        return {"stall": time.perf_counter() - start}

    def dcp_save(self) -> Timed:
        start = time.perf_counter()
        dcp.save(self.tensors, storage_writer=dcp.FileSystemWriter(self.folder / "dcp"), no_dist=True)
        return {"stall": (seconds := time.perf_counter() - start), "durable": seconds}

    def dcp_async(self, **options: Any) -> Timed:
        start = time.perf_counter()
        future = dcp.async_save(self.tensors, storage_writer=dcp.FileSystemWriter(self.folder / "async"), **options)
        stalled = time.perf_counter() - start
        future.result()  # type: ignore[union-attr]
        return {"stall": stalled, "durable": time.perf_counter() - start}

    def resumes(self) -> dict[str, Callable[[], Any]]:
        """Return functions that read the last save of each way."""
        ours = path_of(self.folder / "ours", self.step) / "tensors"
        stored = dcp.FileSystemReader(self.folder / "dcp")
        empty = {name: torch.empty_like(tensor) for name, tensor in self.tensors.items()}
        return {
            "megamm": lambda: self.runner.load(ours, self.step, with_optimizer=True),
            "torch.save": lambda: torch.load(self.folder / "torch.pt", weights_only=True),
            "dcp.save": lambda: dcp.load(empty, storage_reader=stored, no_dist=True),
        }


def stall(folder: Path) -> dict[str, Any]:
    """Run part stall."""
    sides = Sides(folder)
    result = _in_turns(
        {
            "megamm": sides.ours,
            "megamm, waiting": sides.ours_waiting,
            "torch.save": sides.torch_save,
            "dcp.save": sides.dcp_save,
            "dcp.async_save": sides.dcp_async,
            "dcp.async_save, memory kept": partial(sides.dcp_async, async_stager=sides.kept),
        }
    )
    for name, timed in _in_turns({n: partial(_resume, read) for n, read in sides.resumes().items()}).items():
        result[name] |= timed
    sides.saver.close()
    medians = {name: timed["stall"]["median"] for name, timed in result.items() if "stall" in timed}
    better = min(seconds for name, seconds in medians.items() if "async" in name)
    ratios = {"torch.save": medians["torch.save"], "dcp.async_save, the better": better}
    result["stall_ratio"] = {name: seconds / medians["megamm"] for name, seconds in ratios.items()}
    result["bytes"] = {"tensors": sum(t.nbytes for t in sides.tensors.values()), "file": sides.layout.size}
    process_groups.destroy()
    return result


def _resume(read: Callable[[], Any]) -> Timed:
    start = time.perf_counter()
    read()
    return {"resume": time.perf_counter() - start}


def _in_turns(sides: dict[str, Callable[[], Timed]]) -> dict[str, Any]:
    """Run every side once per round, after one warm-up round."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    for number in range(ROUNDS + 1):
        for name, side in sides.items():
            for what, seconds in side().items():
                found[name].setdefault(what, []).extend([seconds] if number else [])
    return {
        name: {what: {"median": statistics.median(all_), "least": min(all_)} for what, all_ in timed.items()}
        for name, timed in found.items()
    }


class Every:
    """Part every, on one of two ranks."""

    def __init__(self, folder: Path, memory: Path) -> None:
        place, config = choose("cpu"), config_of(DEMO, GLOBAL_BATCH)
        groups = process_groups.build(config.parallel, seed=1)
        self.runner = build_engine(config, VOCABULARY, groups, place)
        draw = np.random.default_rng(groups.data_rank)
        rows = [random_row(draw, LENGTH) for _ in range(GLOBAL_BATCH // groups.data_size)]
        self.batches = [Batch.stack(rows[i : i + MICRO_BATCH]) for i in range(0, len(rows), MICRO_BATCH)]
        self.weights = torch.ones(2, dtype=torch.float64)
        folder.mkdir(parents=True, exist_ok=True)
        self.local = LocalStorage(str(memory), folder, replicate=False)
        self.local.begin(-1)
        self.savers = {"local": Saver(folder, place, 2, local=self.local), "run": Saver(folder, place, 2)}
        self.runner.before_update = self._settle
        self.step, self.settled = 0, 0.0

    def _settle(self) -> None:
        start = time.perf_counter()
        for saver in self.savers.values():
            saver.settle()
        self.settled += time.perf_counter() - start

    def block(self, kind: str) -> Timed:
        """Run steps, each with a save of this kind ("none": none): seconds and processor seconds a step, and stall."""
        saver = self.savers.get(kind)
        dist.barrier()
        start, used = time.perf_counter(), _processor_seconds()
        stalled, settled = 0.0, self.settled
        for _ in range(STEPS_A_BLOCK):
            self.step += 1
            self.runner.compute_gradients(self.batches, self.weights)
            self.runner.apply_update()
            if saver is not None:
                rng = {"torch": torch.get_rng_state()}
                begun = time.perf_counter()
                saver.save(state(self.step), self.runner.blocks(), rng, to_run=kind == "run")
                stalled += time.perf_counter() - begun
        dist.barrier()
        seconds = (time.perf_counter() - start) / STEPS_A_BLOCK
        if saver is not None:
            saver.finish()
            stalled += self.settled - settled
        spent = (_processor_seconds() - used) / STEPS_A_BLOCK
        return {"seconds": seconds, "cpu": spent, "stall": stalled / STEPS_A_BLOCK}

    def alone(self, kind: str) -> Timed:
        """Return the processor seconds of a complete save of this kind without training."""
        used, saver = _processor_seconds(), self.savers[kind]
        for _ in range(STEPS_A_BLOCK):
            self.step += 1
            saver.save(state(self.step), self.runner.blocks(), {"torch": torch.get_rng_state()}, to_run=kind == "run")
            saver.finish()
        return {"alone": (_processor_seconds() - used) / STEPS_A_BLOCK}

    def run(self, rounds: int) -> dict[str, Any]:
        """Run all kinds in turns, after one warm-up round."""
        kinds = ("none", *self.savers)
        timed = [{kind: self.block(kind) for kind in kinds} for _ in range(rounds + 1)][1:]
        alone = {kind: [self.alone(kind) for _ in range(ROUNDS)] for kind in self.savers}
        for saver in self.savers.values():
            saver.close()
        self.local.leave(True)
        self.local.close()
        found: dict[str, Any] = {kind: _summary([turn[kind] for turn in timed]) for kind in kinds}
        for kind in self.savers:
            costs = [1 - turn["none"]["seconds"] / turn[kind]["seconds"] for turn in timed]
            cpu_costs = [turn[kind]["cpu"] / turn["none"]["cpu"] - 1 for turn in timed]
            found[kind] |= _summary([{"cost": a, "cpu_cost": b} for a, b in zip(costs, cpu_costs, strict=True)])
            found[kind] |= _summary(alone[kind])
            found[kind]["share"] = found[kind]["alone"]["median"] / found["none"]["cpu"]["median"]
        tokens = GLOBAL_BATCH * LENGTH
        return {"tokens_per_s": tokens / found["none"]["seconds"]["median"]} | found


def _summary(timed: list[Timed]) -> dict[str, dict[str, float]]:
    values = {what: [one[what] for one in timed] for what in timed[0]}
    return {what: {"median": statistics.median(all_), "least": min(all_)} for what, all_ in values.items()}


def every(told: tuple[Path, Path, int]) -> dict[str, Any]:
    """Run part every on one of two ranks; told: the run's folder, that of local storage, rounds."""
    folder, memory, rounds = told
    return Every(folder, memory).run(rounds)


def _processor_seconds() -> float:
    """Return those of this rank and its processes, to the nanosecond (proc(5), schedstat)."""
    ranks = (psutil.Process(), *psutil.Process().children())
    tasks = [task for rank in ranks for task in Path(f"/proc/{rank.pid}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def main() -> None:
    """Run and print; --json also writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("stall", "every"))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of part every")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    result: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "megamm": __version__}
    result |= {"date": time.strftime("%Y-%m-%d"), "rounds": ROUNDS, "load_before": os.getloadavg()}
    with tempfile.TemporaryDirectory(prefix="megamm-checkpoint-") as folder:
        if arguments.part in (None, "every"):
            shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
            with Worlds() as worlds, tempfile.TemporaryDirectory(prefix="megamm-local-", dir=shared) as memory:
                told = (Path(folder, "every"), Path(memory), arguments.rounds)
                ranks = worlds.run(2, every, told, timeout=1200)
            assert not isinstance(ranks, WorldFailure), ranks.lines()
            result["every"] = ranks[0]
        if arguments.part in (None, "stall"):
            result["stall"] = stall(Path(folder))
    result["load_after"] = os.getloadavg()
    print(json.dumps(result, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
