"""The matrix of layouts and features: each layout, each pair of layouts, each layout with each feature.

docs/parallelism.md is its table. tests/test_parallel.py runs a few compositions that contain every pair of its parts,
and with `make test-all` the matrix itself (features of one kind in one case).
"""

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

from megamm.common.errors import UserError
from megamm.parity.case import Case, CaseOutcome

Settings = dict[str, Any]
_MOE: Settings = {"model.moe.num_experts": 4, "model.moe.ffn_hidden_size": 40}
_MLA: Settings = {
    "model.num_query_groups": 4,
    "model.mla.kv_lora_rank": 16,
    "model.mla.qk_head_dim": 8,
    "model.mla.qk_rope_head_dim": 8,
    "model.mla.v_head_dim": 12,
}
_SPANS: Settings = {"modalities.image.attention": "span"}
_TP, _PP, _CP = {"parallel.tensor": 2}, {"parallel.pipeline": 2}, {"parallel.context": 2}

LAYOUTS: dict[str, Settings] = {
    "data": {"data": 2},
    "tensor": _TP,
    "sequence": _TP | {"parallel.sequence": True},
    "pipeline": _PP,
    "interleaved pipeline": _PP | {"parallel.virtual_pipeline": 2},
    "uneven split": _PP | {"parallel.layers_per_chunk": [1, 3]},
    "context, all-gather": _CP,
    "context, all-to-all": _CP | {"parallel.cp_comm_type": "alltoall"},
    "expert, all-to-all": _MOE | {"parallel.expert": 2},
    "expert, all-gather": _MOE | {"parallel.expert": 2, "model.moe.dispatcher": "allgather"},
    "expert tensor": _MOE | _TP | {"parallel.sequence": True, "parallel.expert_tensor": 2},
}
FEATURES: dict[str, Settings] = {
    "auxiliary loss": _MOE | {"model.moe.aux_loss_coeff": 0.02},
    "bias balancing": _MOE | {"model.moe.score": "sigmoid", "model.moe.bias_update_rate": 0.01},
    "shared expert": _MOE | {"model.moe.shared_ffn_hidden_size": 40},
    "dense first layer, expert groups": _MOE
    | {"model.moe.dense_layers": 1, "model.moe.routed_scaling_factor": 2.5}
    | {"model.moe.num_groups": 2, "model.moe.group_top_k": 1},
    "latent attention": _MLA,
    "latent attention, YaRN": _MLA
    | {"model.rope_scaling.kind": "yarn", "model.rope_scaling.factor": 4, "model.rope_scaling.original_length": 16}
    | {"model.rope_scaling.mscale": 0.8, "model.rope_scaling.mscale_all_dim": 0.6},
    "multi-token prediction": {"model.mtp.num_layers": 1},
    "windows": {"model.window.size": 7, "model.window.full_layers": [1, 3], "model.window.rope_base": 1e3},
    "Gemma's norms, activation and caps": {"model.attention_softcap": 1.5, "model.logit_softcap": 4.0}
    | dict.fromkeys(("model.zero_centered_norm", "model.sandwich_norm", "model.scale_embeddings"), True)
    | {"model.activation": "gelu_tanh", "model.query_pre_attn_scalar": 11},
    "3-axis RoPE": {"model.rope_axes": 3},
    "bidirectional spans": _SPANS,
    "bidirectional spans, windows": _SPANS | {"model.window.size": 7, "model.window.full_layers": [1, 3]},
    "tied embeddings": {"model.tie_embeddings": True},
    "biases, no q/k norm": {"model.qkv_bias": True, "model.qk_norm": False},
    "one query group": {"model.num_query_groups": 1},
    "attention by lengths": {"train.attention": "varlen"},
    "full recompute": {"train.recompute": "full"},
    "recomputed norms and activations": {"train.recompute.modules": ["norms", "activation"]},
    "weight gradients in float32": {"model.megatron.gradient_accumulation_fusion": True},
    "a rank without spans": _SPANS | {"mix": "rank_without_images", "data": 2},
    "a rank without images": {"mix": "rank_without_images", "data": 2},
    "a microbatch without text": {"mix": "microbatch_without_text"},
    "a step without images": {"mix": "step_without_images"},
    "images from step 3": {"mix": "images_from_step_3"},
}
_SPLIT = "parallel.layers_per_chunk"


def compose(*parts: Settings) -> Case | None:
    """Return one case with all the parts; None if two of them need different values of one key."""
    merged: Settings = {}
    for part in parts:
        if any(merged.get(k, v) != v for k, v in part.items()):
            return None
        merged |= part
    merged = dict(merged)
    data, mix = merged.pop("data", 1), merged.pop("mix", "mixed")
    if _SPLIT in merged and merged.get("parallel.virtual_pipeline"):
        merged |= {_SPLIT: [1, 2, 1, 1], "model.num_layers": 5}
    world = merged.get("parallel.tensor", 1) * merged.get("parallel.pipeline", 1) * merged.get("parallel.context", 1)
    # Experts are split over the ranks of a stage: add data-parallel ranks if there are too few.
    spread = world * data // merged.get("parallel.pipeline", 1)
    experts = merged.get("parallel.expert", 1) * merged.get("parallel.expert_tensor", 1)
    if spread % experts:
        data *= experts // spread or 1
    return Case.of(world * data, merged, mix)


def singles() -> dict[str, Case]:
    """Return each layout alone."""
    return {name: case for name, settings in LAYOUTS.items() if (case := compose(settings))}


def pairs() -> dict[str, Case]:
    """Return each pair of compatible layouts, named "one + other"."""
    both = {f"{a} + {b}": compose(LAYOUTS[a], LAYOUTS[b]) for a, b in combinations(LAYOUTS, 2) if not _within(a, b)}
    return {name: case for name, case in both.items() if case}


def _within(a: str, b: str) -> bool:
    """Whether one of the two is part of the other, so that the pair is not a new case."""
    return LAYOUTS[a].items() <= LAYOUTS[b].items() or LAYOUTS[b].items() <= LAYOUTS[a].items()


def with_features() -> dict[str, Case]:
    """Return each layout with each feature."""
    return {
        f"{a} + {b}": case for a in LAYOUTS for b in FEATURES if (case := compose(LAYOUTS[a], FEATURES[b])) is not None
    }


def everything() -> dict[str, Case]:
    """Return all cases of the matrix by their names."""
    return singles() | pairs() | with_features()


HEADER = """# Verified layouts

Each cell is a layout that ran as real gloo processes in float32 with the compiled operators of csrc/. It is compared
with one rank that uses plain torch operators, the same weights and the same global batch. Required: losses of each
modality within 1e-6; every gradient, the gradient norm and every parameter after one step and after the last within
1e-5; the same tokens for every expert (megamm/parity). Random layouts of up to eight ranks:
`tools/parity.py --fuzz 200 --seed 1`. This file is written by `make parity`.

- **proven**: the numbers are those of one rank.
- **refused (n)**: `megamm train` ends with exit code 2 and the reason below, before any GPU time is spent.
- **-**: the two exclude each other or are the same thing.
"""


def table(outcome_of: Callable[[Case], CaseOutcome]) -> str:
    """Return the document; outcome_of is called once for every case."""
    reasons: list[str] = []

    def cell(name: str, cases: dict[str, Case]) -> str:
        case = cases.get(name)
        if case is None:
            return "-"
        outcome = outcome_of(case)
        if outcome.verdict != "refused":
            return outcome.verdict
        reason = outcome.findings[0]
        if reason not in reasons:
            reasons.append(reason)
        return f"refused ({reasons.index(reason) + 1})"

    alone = singles()
    lines = ["## Layouts alone and in pairs", "", *_head("", ["alone", *LAYOUTS])]
    both = pairs()
    both |= {" + ".join(reversed(name.split(" + "))): case for name, case in both.items()}
    lines += [_row(a, [cell(a, alone), *(cell(f"{a} + {b}", both) for b in LAYOUTS)]) for a in LAYOUTS]
    lines += ["", "## Layouts with features of the model, of training and of the data", "", *_head("", list(LAYOUTS))]
    featured = with_features()
    lines += [_row(b, [cell(f"{a} + {b}", featured) for a in LAYOUTS]) for b in FEATURES]
    if reasons:
        lines += ["", "## Reasons", "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))]
    return "\n".join([HEADER, *lines, ""])


def _head(first: str, names: list[str]) -> Iterator[str]:
    yield _row(first, names)
    yield _row("---", ["---"] * len(names))


def _row(first: str, cells: list[str]) -> str:
    return f"| {first} | {' | '.join(cells)} |"


def expected(case: Case) -> CaseOutcome:
    """Return the outcome of a correct run of the case without running it: proven, unless layout.check rejects it."""
    try:
        case.run()
    except UserError as error:
        return CaseOutcome(case.line(), "refused", [error.what])
    return CaseOutcome(case.line(), "proven")
