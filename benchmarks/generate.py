"""Generation speed on a CPU: Engine.generate against transformers' own `generate`, with the same weights.

The model has the size of examples/cpu_tiny.yaml (4 layers, hidden 256, 5,152 ids, float32); both sides are greedy, with
a cache, and their ids are compared. Requests have prompts of mixed lengths. transformers pads a batch to the longest
prompt and runs until the longest answer is complete; only the requested tokens count. Cases:
    1        one request of 128 new tokens
    8, 32    that many requests at a time, prompts of 8 to 128 ids, 96 new tokens each
    32 mixed prompts as above, answers of 16 to 160 tokens
Tokens per second: new tokens over seconds of the whole call, prompts included. The sides take turns; medians of rounds,
and the median of the rounds' ratios; cpu_ratio is of processor seconds, which other load on the machine disturbs less.
Run: `python benchmarks/generate.py [--threads N ...] [--rounds N] [--json OUT]`.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamm import __version__
from megamm.common.device import choose
from megamm.config import config_from_dict
from megamm.mcore import process_groups

VOCABULARY = 5152
MODEL = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 768,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 64,
}
CONFIG = {
    "output": "unused",
    "device": "cpu",
    "model": MODEL,
    "data": {"seq_length": 512, "sources": [{"path": "unused"}]},
    "tokenizers": {"text": "unused"},
    "optimizer": {"lr": 1e-3},
    "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
}
Case = list[tuple[list[int], int]]
"""Prompt and new tokens of each request."""


def cases() -> dict[str, Case]:
    """Return the requests of each case."""
    rng = np.random.default_rng(0)

    def prompts(count: int) -> list[list[int]]:
        return [rng.integers(0, VOCABULARY, rng.integers(8, 129)).tolist() for _ in range(count)]

    return {
        "1": [(prompts(1)[0], 128)],
        "8": [(prompt, 96) for prompt in prompts(8)],
        "32": [(prompt, 96) for prompt in prompts(32)],
        "32 mixed": [(prompt, int(rng.integers(16, 161))) for prompt in prompts(32)],
    }


def sides() -> dict[str, Callable[[Case], list[list[int]]]]:
    """Return both sides: a function of requests to new ids. Only the timed call runs when it is called."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    from megamm.convert.families.config import family_for, to_config

    device = choose("cpu")
    process_groups.start(device)
    from megamm.engine.native import NativeEngine  # import Megatron, which is adapted to the device by now
    from megamm.model.generation import GenerationLimits, GenerationRequest
    from megamm.model.sampling import TokenSampling

    config = config_from_dict(CONFIG, where="benchmark")
    engine = NativeEngine(config, VOCABULARY, process_groups.build(config.parallel, seed=1), device)
    theirs: Any = AutoModelForCausalLM.from_config(
        to_config(family_for(config.model), config.model, VOCABULARY, 512, {}),
        dtype=torch.float32,
        attn_implementation="sdpa",
    ).eval()
    copy_weights(engine.chunks[0].module, theirs)

    def ours(case: Case) -> list[list[int]]:
        asked = [GenerationRequest(prompt, most, TokenSampling(0.0)) for prompt, most in case]
        made = engine.generate(asked, GenerationLimits(cache_tokens=16384, running=32, step_tokens=2048))
        return [answers[0].ids for answers in made]

    def transformers(case: Case) -> list[list[int]]:
        longest = max(len(prompt) for prompt, _ in case)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in case])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in case])
        settings = GenerationConfig(max_new_tokens=max(most for _, most in case), do_sample=False, pad_token_id=0)
        with torch.inference_mode():
            made = theirs.generate(ids, attention_mask=mask, generation_config=settings)[:, longest:].tolist()
        return [new[:most] for new, (_, most) in zip(made, case, strict=True)]

    return {"ours": ours, "transformers": transformers}


@torch.no_grad()
def copy_weights(own: Any, theirs: Any) -> None:
    """Copy random weights of transformers' Qwen3; the rows of a query group are its heads, its key and its value."""
    for parameter in theirs.parameters():
        parameter.normal_(0, 0.05) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    own.embedding.word_embeddings.weight.copy_(theirs.model.embed_tokens.weight)
    own.output_layer.weight.copy_(theirs.lm_head.weight)
    own.decoder.final_layernorm.weight.copy_(theirs.model.norm.weight)
    for layer, source in zip(own.decoder.layers, theirs.model.layers, strict=True):
        attention, given = layer.self_attention, source.self_attn
        groups = MODEL["num_query_groups"]
        rows = [p.weight.unflatten(0, (groups, -1)) for p in (given.q_proj, given.k_proj, given.v_proj)]
        attention.linear_qkv.weight.copy_(torch.cat(rows, 1).flatten(0, 1))
        attention.linear_proj.weight.copy_(given.o_proj.weight)
        attention.q_layernorm.weight.copy_(given.q_norm.weight)
        attention.k_layernorm.weight.copy_(given.k_norm.weight)
        layer.mlp.linear_fc1.weight.copy_(torch.cat((source.mlp.gate_proj.weight, source.mlp.up_proj.weight)))
        layer.mlp.linear_fc2.weight.copy_(source.mlp.down_proj.weight)
        layer.input_layernorm.weight.copy_(source.input_layernorm.weight)
        layer.pre_mlp_layernorm.weight.copy_(source.post_attention_layernorm.weight)


def measure(threads: int, rounds: int, running: dict[str, Callable[[Case], list[list[int]]]]) -> dict[str, Any]:
    """Return tokens per second of both sides and their ratio for each case, with that many threads."""
    torch.set_num_threads(threads)
    results: dict[str, Any] = {}
    for name, case in cases().items():
        speeds: dict[str, list[float]] = {side: [] for side in running}
        cpu: dict[str, list[float]] = {side: [] for side in running}
        made: dict[str, list[list[int]]] = {}
        tokens = sum(most for _, most in case)
        for number in range(rounds + 1):
            for side, run in running.items():
                start, busy = time.perf_counter(), time.process_time()
                made[side] = run(case)
                if number:  # the first round warms up
                    speeds[side].append(tokens / (time.perf_counter() - start))
                    cpu[side].append(time.process_time() - busy)
        ratios = [a / b for a, b in zip(speeds["ours"], speeds["transformers"], strict=True)]
        cpu_ratio = statistics.median(cpu["transformers"]) / statistics.median(cpu["ours"])
        same = sum(a == b for a, b in zip(made["ours"], made["transformers"], strict=True))
        results[name] = {side: round(statistics.median(s), 1) for side, s in speeds.items()}
        results[name] |= {"ratio": round(statistics.median(ratios), 2), "cpu_ratio": round(cpu_ratio, 2)}
        results[name] |= {"equal_answers": f"{same} of {len(case)}"}
        print(f"{threads} threads, {name}: {results[name]}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    running = sides()
    results = {
        "machine": {
            "cpus": os.cpu_count(),
            "processor": platform.machine(),
            "load": [round(value, 1) for value in os.getloadavg()],
            "torch": torch.__version__,
            "megamm": __version__,
        },
        "threads": {str(count): measure(count, options.rounds, running) for count in options.threads},
    }
    process_groups.destroy()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
