"""Runs engines over the same rows in a world's real processes (megamm/parity/worlds.py), many cases per start.

A case builds its engine, loads a folder if one is named, runs its steps (saving OUT/NAME after step `save_at`) and,
if there were any, evaluates; OUT/NAME.json gets losses, grad norms and learning rates of every step.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_folders import save_now

from megamm.checkpoint import TrainState, path_of
from megamm.common.device import choose
from megamm.common.sample import Batch
from megamm.config import RunConfig, config_from_dict
from megamm.engine.build import build_engine
from megamm.mcore import process_groups
from megamm.model import layout
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches

LENGTH, ROWS, MICRO, STEPS = 48, 8, 2, 20
WEIGHTS = torch.tensor([1.0, 0.5], dtype=torch.float64)


def case_config(case: dict[str, Any]) -> RunConfig:
    # Odd sizes: two ranks cut inside parameters, and the last shards are padded.
    model = dict(
        num_layers=2, hidden_size=30, ffn_hidden_size=51, num_attention_heads=3, num_query_groups=1, head_dim=6
    )
    return config_from_dict(
        {
            "output": "unused",
            "device": "cpu",
            "engine": case["engine"],
            "deepspeed": case.get("deepspeed", {}),
            "model": model | case.get("model", {}),
            "data": {"seq_length": LENGTH, "sources": [{"path": "unused"}]},
            "tokenizers": {"text": "unused"},
            # Clipping at half of a usual norm, and decay strong enough to be seen. eps: as in parity_worker.py.
            "optimizer": {"lr": 1e-2, "warmup_steps": 5, "clip_grad": 0.4, "weight_decay": 0.5, "eps": 1e-3},
            "train": {"steps": STEPS, "global_batch_size": ROWS, "micro_batch_size": MICRO} | case.get("train", {}),
        },
        "deepspeed case",
    )


def batches_of(number: int, groups: process_groups.ProcessGroups) -> list[Batch]:
    """Return a step's batches; in every third step data rank 1 has no image, and step 4 has none at all."""
    image_rows = [] if number == 4 else [0, 1, 4, 5] if number % 3 == 1 else range(ROWS)
    rows = global_batch(number, 1, [(True, i in image_rows) for i in range(ROWS)], LENGTH)
    return rank_batches(rows, MICRO, groups.data_rank, groups.data_size)


def state(step: int) -> TrainState:
    """Return the state for a checkpoint of which only the tensors are used."""
    return TrainState(step, 0, dist.get_world_size(), layout={}, vocabulary=[], config={}, versions={})


def run_case(case: dict[str, Any], out: Path) -> None:
    config = case_config(case)
    layout.check(config, dist.get_world_size())
    groups = process_groups.build(config.parallel, seed=case.get("seed", 1))
    runner = build_engine(config, VOCABULARY, groups, choose("cpu"))
    first, last = case["steps"]
    if "load" in case:
        runner.load(path_of(out / case["load"], first) / "tensors", first, case.get("with_optimizer", True))
    result: dict[str, Any] = {"loss": [], "count": [], "grad_norm": [], "lr": []}
    for number in range(first, last + 1):
        if number == case.get("save_at"):
            save_now(
                out / case["name"], state(number), runner.blocks(), {"torch": torch.get_rng_state()}, choose("cpu")
            )
        if number == last:
            break
        done = runner.compute_gradients(batches_of(number, groups), WEIGHTS)
        runner.apply_update()
        result["loss"].append(done.loss.mean.tolist())
        result["count"].append(done.loss.count.tolist())
        result["grad_norm"].append(done.grad_norm)
        result["lr"].append(done.lr)
    if last > first:
        result["evaluated"] = runner.evaluate(batches_of(1000, groups), WEIGHTS).mean.tolist()
    if case.get("diverge"):
        result["diverged"] = runner.compute_gradients(batches_of(1001, groups), WEIGHTS * torch.inf).grad_norm
    if dist.get_rank() == 0:
        (out / f"{case['name']}.json").write_text(json.dumps(result))
    process_groups.destroy()


@dataclass(frozen=True)
class Job:
    """Cases to run one after the other. out: the folder of their results, and of each rank's output in stdout_RANK."""

    cases: list[dict[str, Any]]
    out: Path
    home: Path


def run(job: Job) -> None:
    """Run the job on this rank."""
    os.environ["HOME"] = str(job.home)
    printed = os.open(job.out / f"stdout_{dist.get_rank()}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    for case in job.cases:
        run_case(case, job.out)
    dist.barrier()
    sys.stdout.flush()
