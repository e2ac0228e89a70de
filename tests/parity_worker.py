"""Runs parity cases in real processes, many per start: `torchrun ... parity_worker.py CASES.json OUT`.

For each case it lays the grid, loads the shared starting weights, takes two optimizer steps, and stores
loss, grad norm, every gradient and every updated parameter, assembled to whole tensors.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rows import global_batch, rank_batches

from megamm import layout
from megamm.config import RunConfig, config_from_dict
from megamm.device import choose
from megamm.mcore import groups as grid

VOCABULARY, LENGTH, ROWS, MICRO = 301, 48, 8, 2
MIXES = {
    "mixed": None,
    "rank_without_images": frozenset({0, 1, 4, 5}),  # data rank 1 of 2 sees none
    "step_without_images": frozenset[int](),
}


def case_config(case: dict[str, Any]) -> RunConfig:
    model = dict(
        num_layers=4, hidden_size=48, ffn_hidden_size=80, num_attention_heads=4, num_query_groups=2, head_dim=16
    )
    return config_from_dict(
        {
            "output": "unused",
            "model": model | case.get("model", {}),
            "data": {"seq_length": LENGTH, "sources": [{"path": "unused"}]},
            "tokenizers": {"text": "unused"},
            # Adam's update is g / |g| where |g| >> eps: rounding of a gradient near zero would decide its sign.
            # With this eps the updates of two layouts are as close as their gradients.
            "optimizer": {"lr": 1e-2, "clip_grad": 1.0, "eps": 1e-3},
            "train": {"steps": 10, "global_batch": ROWS, "micro_batch": MICRO} | case.get("train", {}),
            "parallel": case.get("parallel", {}),
            "loss_weights": {},
        },
        "parity case",
    )


def run_case(case: dict[str, Any], out: Path) -> None:
    from megatron_state import save_assembled

    from megamm.mcore import backbone, optimizer, step, store

    device = choose("cpu")
    config = case_config(case)
    layout.check(config, dist.get_world_size())
    groups = grid.build(config.parallel, seed=1)
    model = backbone.build(config, VOCABULARY, groups, device)
    step.prepare(model)
    # With ZeRO-1 a rank keeps only its shard of the reduced gradients; all of them are compared here.
    finalize = model.config.finalize_model_grads_func
    model.config.finalize_model_grads_func = lambda *a, **k: finalize(*a, **(k | {"force_all_reduce": True}))
    optim = optimizer.build(config, model)
    start = out.parent / f"start_{case['weights']}"
    if not start.exists():
        assert dist.get_world_size() == 1, "one rank makes the starting weights"
        start.mkdir(parents=True)
        store.save(start, model, optim, groups)
    store.load(start, model, optim, groups, step=0)
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    result: dict[str, Any] = {"loss": [], "count": [], "grad_norm": []}
    for number in range(2):
        rows = global_batch(number, ROWS, LENGTH, VOCABULARY, MIXES[case.get("mix", "mixed")])
        batches = rank_batches(rows, MICRO, groups.data_rank, groups.data_size)
        loss = step.run(model, batches, weights, groups)
        if number == 0:
            save_assembled(out / "gradients", model, lambda p: p.main_grad)
        _, norm, _ = optim.step()
        result["loss"].append(loss.mean.tolist())
        result["count"].append(loss.count.tolist())
        result["grad_norm"].append(float(norm))
    save_assembled(out / "parameters", model, lambda p: p.data)
    result["local_parameters"] = sum(p.numel() for p in model.parameters())
    place = groups.collection
    result["place"] = [groups.tensor_rank, groups.data_rank, groups.pipeline_rank, place.ep.rank()]
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, result)
    if dist.get_rank() == 0:
        (out / "result.json").write_text(json.dumps(results))
    grid.destroy()


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    grid.start(choose("cpu"))
    for case in cases:
        run_case(case, out / case["name"])
    dist.barrier()
    grid.stop()


if __name__ == "__main__":
    main()
