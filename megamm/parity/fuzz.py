"""Draws random compositions, a pure function of (seed, number, maximum ranks), and minimises one that fails."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from megamm.common.errors import UserError
from megamm.parity.case import Case, CaseOutcome
from megamm.parity.rows import MIXES

Settings = dict[str, Any]
_MOE_KEYS = ("model.moe.", "parallel.expert")


def draw(seed: int, number: int, max_ranks: int) -> Case:
    """Draw a composition; layout.check accepts most of them."""
    rng = random.Random(f"{seed}/{number}/{max_ranks}")
    world = rng.choice([n for n in (1, 2, 2, 3, 4, 4, 4, 5, 6, 6, 7, 8, 8, 8) if n <= max_ranks])
    sizes, left = {}, world
    for axis in rng.sample(["tensor", "pipeline", "context"], 3):
        sizes[axis] = rng.choice(_divisors(left))
        left //= sizes[axis]
    settings: Settings = {f"parallel.{axis}": size for axis, size in sizes.items() if size > 1}
    tensor, pipeline, context = sizes["tensor"], sizes["pipeline"], sizes["context"]
    if context > 1:
        settings["parallel.cp_comm_type"] = rng.choice(["allgather", "alltoall"])
    settings |= _model(rng, tensor)
    if rng.random() < 0.5:
        settings |= _experts(rng, tensor, tensor * context * left)
    if tensor > 1 and (rng.random() < 0.6 or ("model.moe.num_experts" in settings and rng.random() < 0.9)):
        settings["parallel.sequence"] = True
    settings |= _pipeline(rng, pipeline)
    parts = (2 * context if context > 1 else 1) * (tensor if "parallel.sequence" in settings else 1)
    settings["data.seq_length"] = parts * rng.randint(-(-20 // parts), max(64 // parts, -(-20 // parts)))
    micro = rng.choice([1, 1, 2, 3])
    microbatches = pipeline * rng.randint(1, 2) if "parallel.virtual_pipeline" in settings else rng.randint(1, 4)
    settings |= {"train.micro_batch_size": micro, "train.global_batch_size": micro * left * microbatches}
    recompute = rng.choice(["none", "none", "modules", "full"])
    settings |= (
        {"train.recompute.modules": _modules(settings)} if recompute == "modules" else {"train.recompute": recompute}
    )
    mix = rng.choice(list(MIXES))
    if "model.moe.num_experts" in settings:
        settings["train.experts"] = rng.choice(["grouped", "grouped", "sequential"])
    if not settings.get("model.attention_softcap"):
        settings["train.attention"] = rng.choice(["auto", "varlen"])
    if settings.get("train.attention") != "varlen" and "model.mtp.num_layers" not in settings and rng.random() < 0.5:
        settings["modalities.image.attention"] = "span"
    return Case.of(world, settings, mix, number)


def _modules(settings: Settings) -> list[str]:
    """Return all modules of the drawn model that can be recomputed."""
    has_experts, dense = "model.moe.num_experts" in settings, "model.moe.dense_layers" in settings
    modules = ["norms"] if settings.get("model.activation", "silu") != "silu" else ["norms", "activation"]
    # An MLP that is recomputed as a whole does not recompute its activation alone: draw one or the other.
    whole = settings["train.global_batch_size"] % 2 == 0
    return modules + ["mlp"] * (whole and (dense or not has_experts)) + ["moe"] * (whole and has_experts)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _model(rng: random.Random, tensor: int) -> Settings:
    # One in eight ignores the tensor ranks and may be rejected.
    unit = tensor if rng.random() < 0.875 else 1
    groups = unit * rng.randint(1, 3)
    per_group = rng.randint(1, 3)
    settings: Settings = {
        "model.hidden_size": tensor * rng.randint(24 // tensor + 1, 56 // tensor) if unit == tensor else 33,
        "model.ffn_hidden_size": unit * rng.randint(9, 31),
        "model.num_query_groups": groups,
        "model.num_attention_heads": groups * per_group,
        "model.head_dim": rng.choice([6, 8, 16]),
        "model.rope_axes": rng.choice([1, 1, 3]),
        "model.tie_embeddings": rng.random() < 0.3,
    }
    if rng.random() < 0.3:
        settings |= {"model.qk_norm": rng.random() < 0.5, "model.qkv_bias": rng.random() < 0.5}
    if tensor % groups == 0 and rng.random() < 0.3:  # ranks share groups
        settings["model.num_query_groups"] = rng.choice(_divisors(groups))
    if rng.random() < 0.2:
        settings |= {"model.num_query_groups": groups * per_group, "model.rope_axes": 1, "model.qkv_bias": False}
        settings |= {"model.mla.kv_lora_rank": 5 * unit, "model.mla.q_lora_rank": rng.choice([0, 9 * unit])}
        settings |= {"model.mla.qk_head_dim": rng.choice([6, 8]), "model.mla.qk_rope_head_dim": 2 * tensor}
        settings["model.mla.v_head_dim"] = rng.choice([6, 8, 12])
    if rng.random() < 0.25:
        settings["model.mtp.num_layers"] = rng.randint(1, 2)
    is_plain = "model.mla.kv_lora_rank" not in settings and "model.mtp.num_layers" not in settings
    if is_plain and rng.random() < 0.2:
        settings |= {"model.window.size": rng.randint(1, 20), "model.window.full_layers": rng.choice([[], [0]])}
    if is_plain and rng.random() < 0.2:
        names = ("zero_centered_norm", "sandwich_norm", "scale_embeddings")
        settings |= {f"model.{name}": rng.random() < 0.7 for name in names}
        settings |= {"model.attention_softcap": rng.choice([0.0, 1.5]), "model.logit_softcap": rng.choice([0.0, 4.0])}
        settings |= {"model.activation": rng.choice(["silu", "gelu_tanh"])}
    return settings


def _experts(rng: random.Random, tensor: int, ranks: int) -> Settings:
    expert_tensor = rng.choice(_divisors(ranks) if rng.random() < 0.2 else _divisors(tensor))
    expert = rng.choice(_divisors(ranks // expert_tensor)) if ranks % expert_tensor == 0 else 1
    number = expert * rng.randint(1, 3) if rng.random() < 0.9 else 5
    settings: Settings = {
        "parallel.expert": expert,
        "parallel.expert_tensor": expert_tensor,
        "model.moe.num_experts": number,
        "model.moe.top_k": rng.randint(1, min(3, number)),
        "model.moe.ffn_hidden_size": expert_tensor * rng.randint(5, 15),
        "model.moe.shared_ffn_hidden_size": tensor * rng.choice([0, 0, 9]),
        "model.moe.score": rng.choice(["softmax", "sigmoid"]),
        "model.moe.aux_loss_coeff": rng.choice([0.0, 0.02]),
        "model.moe.dispatcher": rng.choice(["alltoall", "allgather"]),
    }
    if settings["model.moe.score"] == "sigmoid" and rng.random() < 0.5:
        settings["model.moe.bias_update_rate"] = 0.01
    if rng.random() < 0.3:
        settings |= {"model.moe.dense_layers": 1, "model.moe.routed_scaling_factor": 1.5}
    return settings


def _pipeline(rng: random.Random, pipeline: int) -> Settings:
    settings: Settings = {}
    chunks = pipeline
    if pipeline > 1 and rng.random() < 0.4:
        settings["parallel.virtual_pipeline"] = 2
        chunks *= 2
    extra = rng.randint(0, 2 if chunks > 4 else 3)
    settings["model.num_layers"] = chunks + extra
    if chunks > 1 and rng.random() < 0.3:
        split = [1] * chunks
        for _ in range(extra):
            split[rng.randrange(chunks)] += 1
        settings["parallel.layers_per_chunk"] = split
    return settings


def minimise(case: Case, fails: Callable[[Case], CaseOutcome | None]) -> CaseOutcome:
    """Return the smallest case found by removing one feature after the other while it still fails.

    fails: returns the outcome of a case that fails (in any way), else None.
    """
    found = fails(case)
    assert found is not None, "the case to minimise fails"
    while True:
        for smaller in _smaller(Case.parse(found.case)):
            outcome = fails(smaller)
            if outcome is not None:
                found = outcome
                break
        else:
            return found


def _smaller(case: Case) -> Iterator[Case]:
    """Yield simpler valid cases: fewer ranks first, then features at their defaults."""
    settings = dict(case.settings)
    candidates = []
    for axis in ("tensor", "pipeline", "context"):
        size = settings.get(f"parallel.{axis}", 1)
        if size > 1:
            without = case.with_setting(f"parallel.{axis}", None).with_setting("parallel.layers_per_chunk", None)
            without = without.with_setting("parallel.sequence", None) if axis == "tensor" else without
            without = without.with_setting("parallel.virtual_pipeline", None) if axis == "pipeline" else without
            candidates += [replace(without, world=case.world // size)]
    candidates += [replace(case, world=world) for world in range(1, case.world)]
    dense = {k: v for k, v in settings.items() if not k.startswith(_MOE_KEYS)}
    grouped = {k: v for k, v in settings.items() if not k.startswith("model.mla.")}
    candidates += [Case.of(case.world, kept, case.mix, case.seed) for kept in (dense, grouped)]
    candidates += [replace(case, mix="mixed")]
    candidates += [case.with_setting(key, None) for key in settings]
    for candidate in candidates:
        if candidate != case and _is_admitted(candidate):
            yield candidate


def _is_admitted(case: Case) -> bool:
    try:
        case.run()
    except UserError:
        return False
    return True
