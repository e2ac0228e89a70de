"""Training speed on a CPU: our one rank against plain PyTorch, and two ranks against one.

Same sizes, same packed rows, same threads, same run: `transformers`' Qwen3 with AdamW and gradient clipping is the
plain side. The sides take turns (ours, plain, ours, ...) and medians over the rounds are compared, so that a
drifting machine slows both. Figures in tokens per second.
Run: `python benchmarks/train_cpu.py [--part ranks] [--json OUT]`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamm import __version__
from megamm.common.device import choose
from megamm.common.sample import IGNORE_LABEL, Batch, Row
from megamm.config import RunConfig, config_from_dict
from megamm.mcore import process_groups

VOCABULARY, LENGTH, MICRO_BATCH, MICROBATCHES = 5152, 256, 4, 2
DOCUMENT = 80
"""Tokens of a packed document: a short caption and an image of 64 tokens."""


def config_of(parallel: dict[str, Any]) -> RunConfig:
    """Return the config of a model with the size of examples/cpu_tiny.yaml."""
    return config_from_dict(
        {
            "output": "unused",
            "device": "cpu",
            "model": {
                "num_layers": 4,
                "hidden_size": 256,
                "ffn_hidden_size": 768,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "head_dim": 64,
            },
            "data": {"seq_length": LENGTH, "sources": [{"path": "unused"}]},
            "tokenizers": {"text": "unused"},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 1000, "global_batch_size": MICRO_BATCH * MICROBATCHES, "micro_batch_size": MICRO_BATCH},
            "parallel": parallel,
        },
        where="benchmark",
    )


def microbatches(data_rank: int, data_size: int) -> list[Batch]:
    """Return this rank's microbatches of one fixed global batch of packed rows."""
    rng = np.random.default_rng(0)
    batches = []
    for number in range(MICROBATCHES):
        rows = [_row(rng) for _ in range(MICRO_BATCH)]
        if number % data_size == data_rank:
            batches.append(Batch.stack(rows))
    return batches


def _row(rng: np.random.Generator) -> Row:
    ids = rng.integers(0, VOCABULARY, LENGTH)
    segment = np.arange(LENGTH) // DOCUMENT
    labels = np.append(ids[1:], IGNORE_LABEL)
    labels[:-1][segment[1:] != segment[:-1]] = IGNORE_LABEL
    valid = labels != IGNORE_LABEL
    position = np.broadcast_to(np.arange(LENGTH) % DOCUMENT, (3, LENGTH)).copy()
    return Row(ids, labels, valid.astype(np.float32), segment, position, np.where(valid, 0, -1), np.full(LENGTH, -1))


def our_step(config: RunConfig) -> Callable[[], float]:
    """Return a function that runs one training step of ours on this rank's grid and returns the loss."""
    device = choose("cpu")
    process_groups.start(device)
    from megamm.engine.native import NativeEngine  # import Megatron, which is adapted to the device by now

    engine = NativeEngine(config, VOCABULARY, process_groups.build(config.parallel, seed=1), device)
    groups = engine.groups
    batches, weights = microbatches(groups.data_rank, groups.data_size), torch.ones(1, dtype=torch.float64)

    def run() -> float:
        result = engine.compute_gradients(batches, weights)
        engine.apply_update()
        return float(result.loss.mean[0])

    return run


def plain_step(config: RunConfig) -> Callable[[], float]:
    """Return the same step in plain PyTorch: transformers' Qwen3, SDPA with the same document mask, fused AdamW."""
    from transformers import AutoModelForCausalLM

    from megamm.convert.families.config import family_for, to_config

    theirs = to_config(family_for(config.model), config.model, VOCABULARY, LENGTH, {})
    model = AutoModelForCausalLM.from_config(theirs, dtype=torch.float32, attn_implementation="sdpa")
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = microbatches(0, 1)
    count = sum(int(batch.loss_weight.sum()) for batch in batches)

    def run() -> float:
        optim.zero_grad()
        total = 0.0
        for batch in batches:
            same = batch.segment[:, :, None] == batch.segment[:, None, :]
            mask = same.tril().unsqueeze(1)  # `[B, 1, S, S]`: same document and not later
            logits = model(batch.input_ids, attention_mask=mask, position_ids=batch.position[:, 0]).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_LABEL, reduction="sum"
            )
            (loss / count).backward()
            total += loss.item() / count
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        return total

    return run


TOKENS_PER_STEP = LENGTH * MICRO_BATCH * MICROBATCHES


def timed(run: Callable[[], float], steps: int) -> float:
    """Return tokens per second over this many steps."""
    start = time.perf_counter()
    for _ in range(steps):
        run()
    return steps * TOKENS_PER_STEP / (time.perf_counter() - start)


def against_plain(threads: int, rounds: int, steps: int) -> dict[str, Any]:
    """Run ours and plain in turns in this process, with that many threads."""
    torch.set_num_threads(threads)
    config = config_of({})
    sides = {"ours": our_step(config), "plain": plain_step(config)}
    for run in sides.values():
        timed(run, 2)
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            speeds[name].append(timed(run, steps))
    process_groups.destroy()
    ratios = [ours / plain for ours, plain in zip(speeds["ours"], speeds["plain"], strict=True)]
    return {name: statistics.median(s) for name, s in speeds.items()} | {"ratio": statistics.median(ratios)}


def ranks(parallel: dict[str, Any], processes: int, rounds: int, steps: int) -> float:
    """Return the median tokens per second of a job of that many one-thread processes."""
    arguments = [sys.executable]
    if processes > 1:
        arguments += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments += [__file__, "--worker", json.dumps(parallel), "--rounds", str(rounds), "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    return float(next(line for line in done.stdout.splitlines() if line.startswith("median ")).split()[1])


LAYOUTS: dict[str, dict[str, Any]] = {
    "DP=2": {},
    "TP=2": {"tensor": 2},
    "TP=2, sequence": {"tensor": 2, "sequence": True},
    "PP=2": {"pipeline": 2},
    "CP=2, all-gather": {"context": 2},
    "CP=2, all-to-all": {"context": 2, "cp_comm_type": "alltoall"},
}


def against_one_rank(rounds: int, steps: int, starts: int = 3) -> dict[str, Any]:
    """Compare each layout of two ranks with one rank in turns, one thread a rank; print the table.

    Efficiency: tokens per second and core, as a share of one rank's.
    """
    speeds: dict[str, list[float]] = {name: [] for name in ("one rank", *LAYOUTS)}
    for _ in range(starts):
        speeds["one rank"].append(ranks({}, 1, rounds, steps))
        for name, parallel in LAYOUTS.items():
            speeds[name].append(ranks(parallel, 2, rounds, steps))
    table = {}
    print(f"{'layout':<18} {'tokens/s':>9} {'per core':>9} {'efficiency':>11}")
    for name, measured in speeds.items():
        cores = 1 if name == "one rank" else 2
        shares = [x / cores / one for x, one in zip(measured, speeds["one rank"], strict=True)]
        row = {"tokens_per_s": statistics.median(measured), "efficiency": statistics.median(shares)}
        table[name] = row | {"tokens_per_s_per_core": row["tokens_per_s"] / cores}
        print(
            f"{name:<18} {row['tokens_per_s']:>9,.0f} {row['tokens_per_s'] / cores:>9,.0f} {row['efficiency']:>11.2f}"
        )
    return table


def worker(parallel: dict[str, Any], rounds: int, steps: int) -> None:
    """Run one rank of `ranks`; rank 0 prints."""
    torch.set_num_threads(1)
    run = our_step(config_of(parallel))
    timed(run, 2)
    speed = statistics.median(timed(run, steps) for _ in range(rounds))
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"median {speed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--part", choices=("all", "plain", "ranks"), default="all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(json.loads(options.worker), options.rounds, options.steps)
        return
    result: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__}
    result |= {"megamm": __version__, "rounds": options.rounds, "steps_per_round": options.steps}
    for threads in (1, 2) if options.part != "ranks" else ():
        row = against_plain(threads, options.rounds, options.steps)
        result[f"one rank, {threads} threads"] = row
        print(
            f"{threads} threads: ours {row['ours']:,.0f}  plain {row['plain']:,.0f} tokens/s  ratio {row['ratio']:.3f}"
        )
    if options.part != "plain":
        result["two ranks"] = against_one_rank(options.rounds, options.steps)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
