"""Training with stored moments, and checkpoints of it: the code of each rank (worlds.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoint_folders import generator_states, save_now
from saver_worker import state
from step_costs_worker import CONFIG, LENGTH, ROWS

from megamm.checkpoint import path_of
from megamm.common.device import choose
from megamm.config import config_from_dict
from megamm.mcore import process_groups
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches


@dataclass(frozen=True)
class MomentsJob:
    """Train from step `first` to `last` on few batches, with these keys of `optimizer`; load before, save after it."""

    optimizer: dict[str, Any]
    last: int
    first: int = 1
    load: Path | None = None
    save: Path | None = None


def train(job: MomentsJob) -> dict[str, Any]:
    """Return each step's loss, and state of the optimizer: as it is after loading, and at the end."""
    optimizer = CONFIG["optimizer"] | {"lr": 2e-3, "clip_grad": 1.0} | job.optimizer
    settings = {"optimizer": optimizer, "train": CONFIG["train"] | {"steps": 99, "precision": "bf16"}}
    config = config_from_dict(CONFIG | settings, "test")
    groups = process_groups.build(config.parallel, seed=5)
    from megamm.engine.native import NativeEngine
    from megamm.mcore import optimizer as optimizers

    engine = NativeEngine(config, VOCABULARY, groups, choose("cpu"))

    def stored() -> dict[str, Any]:
        found: dict[str, list[torch.Tensor]] = {"main": [], "exp_avg": [], "exp_avg_sq": []}
        for part in optimizers.parts(engine.optimizer):
            for group in part.optimizer.param_groups:
                for main in group["params"]:
                    found["main"].append(main.detach())
                    for kind in ("exp_avg", "exp_avg_sq"):
                        found[kind].append(part.optimizer.state[main][kind])
        steps = {float(s["step"]) for part in optimizers.parts(engine.optimizer) for s in part.optimizer.state.values()}
        dtypes = {str(tensor.dtype) for kind in ("exp_avg", "exp_avg_sq") for tensor in found[kind]}
        return {kind: torch.cat(tensors).float().numpy() for kind, tensors in found.items()} | {
            "steps": steps,
            "dtypes": dtypes,
        }

    if job.load is not None:
        engine.load(path_of(job.load, job.first - 1) / "tensors", job.first - 1, with_optimizer=True)
    before, losses = stored(), []
    for step in range(job.first, job.last + 1):
        rows = global_batch(1, 1 + step % 3, [(True, True)] * ROWS, LENGTH)
        batches = rank_batches(rows, 1, groups.data_rank, groups.data_size)
        losses.append(engine.compute_gradients(batches, torch.ones(2, dtype=torch.float64)).loss.mean.tolist())
        engine.apply_update()
    if job.save is not None:
        save_now(job.save, state(job.last), engine.blocks(), generator_states(), choose("cpu"))
    return {"losses": losses, "before": before, "after": stored()}
