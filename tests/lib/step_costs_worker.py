"""What a step of two data-parallel ranks with experts does besides its products: the code of each rank (worlds.py)."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megamm.common.device import choose
from megamm.config import config_from_dict
from megamm.mcore import process_groups
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches

LENGTH, ROWS = 48, 4
CONFIG: dict[str, Any] = {
    "output": "unused",
    "model": {
        "num_layers": 2,
        "hidden_size": 48,
        "ffn_hidden_size": 80,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 16,
        "moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 40},
    },
    "data": {"seq_length": LENGTH, "sources": [{"path": "unused"}]},
    "tokenizers": {"text": "unused"},
    "optimizer": {"lr": 1e-3, "clip_grad": 1e-3},
    "train": {"steps": 1, "global_batch_size": ROWS, "micro_batch_size": 1},
    "parallel": {"expert": 2},
}


class Operators(TorchDispatchMode):
    """Records the names of all operators, and the address and bytes of the first tensor that each gets."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        first = (tensors[0].data_ptr(), tensors[0].nbytes) if tensors else (0, 0)
        self.seen.append((func._schema.name, *first))
        return func(*args, **(kwargs or {}))

    def of(self, *names: str) -> list[tuple[str, int, int]]:
        """Return the records of these operators, by their names without namespace and without a final "_"."""
        return [one for one in self.seen if one[0].rpartition("::")[2].strip("_") in names]


def costs(_: None) -> dict[str, Any]:
    """Return what the rank did in a step: parameter gathers, changes of whole gradient buffers, waits for the norm."""
    config = config_from_dict(CONFIG, "test")
    groups = process_groups.build(config.parallel, seed=5)
    from megamm.engine.native import NativeEngine
    from megamm.mcore import optimizer

    engine = NativeEngine(config, VOCABULARY, groups, choose("cpu"))
    buckets = [
        bucket
        for chunk in engine.chunks
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)
        for bucket in group.buckets
    ]
    rows = global_batch(1, 1, [(True, True)] * ROWS, LENGTH)
    with Operators() as gradients:
        engine.compute_gradients(rank_batches(rows, 1, groups.data_rank, groups.data_size), torch.ones(2).double())
    with Operators() as norm:
        optimizer.norm(engine.optimizer)
    with Operators() as update:
        engine.apply_update()
    whole = {bucket.grad_data.data_ptr() for bucket in buckets}
    return {
        "buckets": sorted(bucket.param_data.nbytes for bucket in buckets),
        "gathers": sorted(size for _, _, size in update.of("allgather_into_tensor_coalesced", "allgather_base")),
        "scaled buffers": [name for name, at, size in gradients.of("mul", "div") if at in whole],
        "parts of the optimizer": len(optimizer.parts(engine.optimizer)),
        "parameters": sum(1 for part in optimizer.parts(engine.optimizer) for _ in part.get_parameters()),
        "waits for the norm": len(norm.of("local_scalar_dense")),
        "passes to clip": len(update.of("mul", "foreach_mul")),
    }
