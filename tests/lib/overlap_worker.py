"""Steps whose parameters are gathered while the next forward pass runs: the code of each rank (worlds.py)."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from checkpoint_folders import generator_states, save_now
from saver_worker import state
from step_costs_worker import CONFIG, LENGTH, ROWS

from megamm.checkpoint import path_of
from megamm.common.device import choose
from megamm.config import config_from_dict
from megamm.mcore import process_groups
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches

BUCKET = 8000
"""Elements of a bucket of parameters, so that this model has several."""


@dataclass(frozen=True)
class OverlapJob:
    """mode: gather before an update returns; beside what follows; or only when something waits for it."""

    mode: Literal["before", "beside", "late"]
    model: dict[str, Any]
    parallel: dict[str, Any]
    folder: Path


class _Late:
    """The handle of a gather that begins when it is waited for: whoever does not wait sees old parameters."""

    def __init__(self, gather: Any) -> None:
        self.gather = gather

    def wait(self) -> None:
        self.gather()


def _gather_late(group: Any) -> None:
    """Change the class of bucket groups."""
    gather = group.start_param_sync

    def start(self: Any, force_sync: bool = False) -> None:
        def now() -> None:
            self.param_gather_handle = None
            gather(self, force_sync=True)

        self.param_gather_handle, self.param_gather_dispatched = _Late(now), True

    group.start_param_sync = start


def steps(job: OverlapJob) -> dict[str, Any]:
    """Train, evaluate, save, load and discard; return every loss and norm, and the parameters at the end."""
    overrides = {"model": CONFIG["model"] | job.model, "train": CONFIG["train"] | {"steps": 9}}
    parallel = job.parallel | {"overlap_param_gather": job.mode != "before"}
    config = config_from_dict(CONFIG | overrides | {"parallel": parallel}, "test")
    groups = process_groups.build(config.parallel, seed=5)
    from megamm.engine.native import NativeEngine
    from megamm.mcore import backbone, optimizer

    # As on a GPU: buckets whose gradients are reduced as soon as they are complete.
    settings = partial(backbone.DistributedDataParallelConfig, bucket_size=BUCKET)
    backbone.DistributedDataParallelConfig = lambda **given: settings(**given | {"overlap_grad_reduce": True})
    engine = NativeEngine(config, VOCABULARY, groups, choose("cpu"))
    if job.mode == "late":
        _gather_late(type(engine.chunks[0].bucket_groups[0]))
    weights, seen = torch.ones(2, dtype=torch.float64), list[Any]()

    def batches(step: int) -> Any:
        rows = global_batch(1, step, [(True, True)] * ROWS, LENGTH)
        return rank_batches(rows, 1, groups.data_rank, groups.data_size)

    def train(step: int) -> None:
        result = engine.compute_gradients(batches(step), weights)
        seen.append((step, result.loss.mean.tolist(), result.grad_norm))
        engine.apply_update()

    def evaluate() -> None:
        seen.append(engine.evaluate(batches(100), weights).mean.tolist())

    train(1)
    evaluate()
    train(2)
    save_now(job.folder, state(2), engine.blocks(), generator_states(), choose("cpu"))
    evaluate()
    engine.compute_gradients(batches(3), weights)
    seen.append(engine.recompute_gradients().grad_norm)
    engine.discard()
    train(4)
    engine.load(path_of(job.folder, 2) / "tensors", 2, with_optimizer=True)  # as a roll-back, just after an update
    evaluate()
    train(5)
    train(6)
    optimizer.finish_gathers(engine.chunks)
    buffers = [b for chunk in engine.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    buckets = sum(len(buffer.buckets) for buffer in buffers)
    return {"seen": seen, "parameters": torch.cat([b.param_data for b in buffers]).numpy(), "buckets": buckets}
