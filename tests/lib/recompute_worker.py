"""Gradients with and without recomputation on two tensor-parallel ranks: the code of each rank (worlds.py)."""

from typing import Any

import torch
from step_costs_worker import CONFIG, LENGTH, ROWS, Operators

from megamm.common.device import choose
from megamm.config import config_from_dict
from megamm.mcore import process_groups
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches

MODEL: dict[str, Any] = CONFIG["model"] | {
    "num_layers": 3,
    "moe": CONFIG["model"]["moe"] | {"dense_layers": 1, "shared_ffn_hidden_size": 32, "aux_loss_coeff": 0.01},
}
FORWARD = {
    "norm": ("rms_norm", "add_rms_norm"),
    "swiglu": ("swiglu",),
    "mm": ("mm",),
    "alltoall_base": ("alltoall_base",),
}
"""Operators whose number in a step shows what is computed again."""


def gradients(recompute: Any) -> dict[str, Any]:
    """Return the loss, the flat gradients and the number of FORWARD's operators in a step with train.recompute."""
    train = CONFIG["train"] | {"recompute": recompute}
    parallel = {"tensor": 2, "sequence": True, "expert": 2}
    config = config_from_dict(CONFIG | {"model": MODEL, "train": train, "parallel": parallel, "ops": "csrc"}, "test")
    groups = process_groups.build(config.parallel, seed=5)
    from megamm.engine.native import NativeEngine

    engine = NativeEngine(config, VOCABULARY, groups, choose("cpu"))
    rows = global_batch(1, 1, [(True, True)] * ROWS, LENGTH)
    with Operators() as seen:
        result = engine.compute_gradients(
            rank_batches(rows, 1, groups.data_rank, groups.data_size), torch.ones(2).double()
        )
    (chunk,) = engine.chunks
    flat = [buffer.grad_data.clone() for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    heldout = engine.evaluate(rank_batches(rows, 1, groups.data_rank, groups.data_size), torch.ones(2).double())
    return {
        "loss": result.loss.mean.tolist(),
        "heldout": heldout.mean.tolist(),
        "gradients": torch.cat(flat).numpy(),
        "counts": {name: len(seen.of(*operators)) for name, operators in FORWARD.items()},
    }
