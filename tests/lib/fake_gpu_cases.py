"""Runs whose simulated figures are committed (tests/data/fake_gpu.json), and their measurement.

    python tests/lib/fake_gpu_cases.py [CASE ...]        # measure again and write; the diff shows what a change costs

A case is a published shape on a world that a user could have. Memory is in bytes at the peak, collectives are
(messages, bytes) of a step with all its microbatches, host waits and kernel launches are those of one microbatch and
of the rest of a step.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.config import RunConfig, load_config
from megamm.fakegpu.results import Figures, ProbeResult
from megamm.fakegpu.simulator import Simulator, memory_of

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests/data/fake_gpu.json"
VOCABULARY = 200_000
ONE_STAGE = ("parallel.pipeline=1", "parallel.virtual_pipeline=1", "parallel.layers_per_chunk=[]")
DENSE_DATA_PARALLEL = (
    *("parallel.tensor=1", "parallel.sequence=false", "parallel.context=1", *ONE_STAGE),
    *("data.seq_length=8192", "train.global_batch_size=64", "train.recompute=none"),
)
A3B = (  # the shape of Qwen3-30B-A3B
    *("model.num_layers=48", "model.hidden_size=2048", "model.ffn_hidden_size=6144", "model.num_attention_heads=32"),
    *(
        "model.moe.ffn_hidden_size=768",
        "parallel.tensor=1",
        "parallel.sequence=false",
        "parallel.expert=16",
        *ONE_STAGE,
    ),
    *("data.seq_length=4096", "train.global_batch_size=64", "train.recompute=none"),
)
MLA_MTP = (  # about the shape of DeepSeek-V2-Lite, with a module that predicts a second token
    *("model.num_layers=27", "model.hidden_size=2048", "model.ffn_hidden_size=10944", "model.num_attention_heads=16"),
    *("model.num_query_groups=16", "model.rope_axes=1", "model.mla.kv_lora_rank=512", "model.mla.qk_head_dim=128"),
    *("model.mla.qk_rope_head_dim=64", "model.mla.v_head_dim=128", "model.mtp.num_layers=1"),
    *("model.moe.num_experts=64", "model.moe.top_k=6", "model.moe.ffn_hidden_size=1408", "model.moe.dense_layers=1"),
    *("model.moe.shared_ffn_hidden_size=2816", "model.moe.score=sigmoid", "model.moe.bias_update_rate=0.001"),
    *("parallel.tensor=1", "parallel.sequence=false", "parallel.expert=32", *ONE_STAGE),
    *("data.seq_length=4096", "train.global_batch_size=64", "train.recompute=none"),
)
LONG = (
    *("parallel.tensor=4", "parallel.context=4", *ONE_STAGE),
    *("data.seq_length=131072", "train.global_batch_size=4", "train.recompute=full"),
)


@dataclass(frozen=True)
class Case:
    """A rank of a run: an example with overrides, on a world of this size. in_all: only in `make test-all`."""

    example: str
    overrides: tuple[str, ...]
    world_size: int
    rank: int = 0
    in_all: bool = False

    def config(self) -> RunConfig:
        return load_config(ROOT / "examples" / self.example, list(self.overrides))


CASES = {
    "8B, data parallel 8": Case("dense_8b.yaml", DENSE_DATA_PARALLEL, 8),
    "8B, 131k tokens, context 4": Case("dense_8b.yaml", LONG, 16),
    "30B-A3B, expert 16": Case("moe_200b.yaml", A3B, 16),
    "30B-A3B, sequential": Case("moe_200b.yaml", (*A3B, "train.experts=sequential"), 16, in_all=True),
    "MLA and MTP, expert 32": Case("moe_200b.yaml", MLA_MTP, 32, in_all=True),
    "8B, attention flex": Case("dense_8b.yaml", (*DENSE_DATA_PARALLEL, "train.attention=flex"), 8, in_all=True),
    "8B, recompute norms and activation": Case(
        "dense_8b.yaml", (*DENSE_DATA_PARALLEL, "train.recompute.modules=[norms,activation]"), 8, in_all=True
    ),
    "8B, recompute norms and mlp": Case(
        "dense_8b.yaml", (*DENSE_DATA_PARALLEL, "train.recompute.modules=[norms,mlp]"), 8, in_all=True
    ),
    "8B, bf16 moments": Case("dense_8b.yaml", (*DENSE_DATA_PARALLEL, "optimizer.moments=bf16"), 8, in_all=True),
    "8B, moments in host memory": Case(
        "dense_8b.yaml", (*DENSE_DATA_PARALLEL, "optimizer.offload_moments=true"), 8, in_all=True
    ),
    "30B-A3B, recompute norms and moe": Case(
        "moe_200b.yaml", (*A3B, "train.recompute.modules=[norms,moe]"), 16, in_all=True
    ),
    "8B, recompute full": Case("dense_8b.yaml", (*DENSE_DATA_PARALLEL, "train.recompute=full"), 8, in_all=True),
    "8B, FP8": Case("dense_8b.yaml", (*DENSE_DATA_PARALLEL, "train.precision=fp8"), 8, in_all=True),
    "30B-A3B, FP8": Case("moe_200b.yaml", (*A3B, "train.precision=fp8"), 16, in_all=True),
    "dense_8b.yaml, first stage": Case("dense_8b.yaml", (), 16, 0, in_all=True),
    "dense_8b.yaml, last stage": Case("dense_8b.yaml", (), 16, 15, in_all=True),
}


def measure(simulator: Simulator, case: Case, exact: bool = False) -> ProbeResult:
    return simulator.simulate(case.config(), VOCABULARY, case.world_size, case.rank, exact)


def table(simulator: Simulator, case: Case, figures: Figures) -> dict[str, Any]:
    """Return the figures in the form of the committed file."""
    config = case.config()
    microbatches = config.train.global_batch_size // (
        config.train.micro_batch_size * config.data_parallel(case.world_size)
    )
    waits: dict[str, dict[str, int]] = {"microbatch": {}, "step": {}}
    collectives = {}
    for name, value in sorted(figures.items()):
        if name.startswith("wait|"):
            scope, kind, file, function, _ = name.split("|")[1:]
            key = f"{kind} at {file} {function}"
            count = value / microbatches if scope == "microbatch" else value
            waits[scope][key] = waits[scope].get(key, 0) + round(count)
        if name.startswith("count|"):
            scope, operation, group, size = name.split("|")[1:]
            moved = figures[name.replace("count|", "bytes|", 1)]
            collectives[f"{scope}: {operation} over {group} of {size}"] = [round(value), round(moved)]
    memory = {kind: size for kind, size in sorted(memory_of(figures, simulator.gpu).kinds.items()) if size}
    launches = {
        "microbatch": round(figures["launches|microbatch"] / microbatches),
        "step": round(figures["launches|step"]),
    }
    return {"memory": memory, "collectives": collectives, "waits": waits, "launches": launches}


def committed() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text())
    return found


def main(names: list[str]) -> None:
    written = committed() if FILE.exists() else {}
    with Simulator("h100") as simulator:
        for name in names or CASES:
            written[name] = table(simulator, CASES[name], measure(simulator, CASES[name]).figures)
            ordered = {name: written[name] for name in CASES if name in written}
            FILE.write_text(json.dumps(ordered, indent=1) + "\n")
            print(name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
