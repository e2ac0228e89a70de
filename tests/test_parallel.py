"""Every layout against one rank (megamm/parity): each by itself, each pair, each with model features, and random ones.

Same weights, same batch, float32, real gloo processes: losses, every gradient, grad norm, every parameter after one
step and after the last, tokens per expert, and every rank's place as the dry run gives it.
"""

import pytest

from megamm.dry_run import Grid
from megamm.parity import fuzz, matrix
from megamm.parity.case import Case
from megamm.parity.matrix import FEATURES, LAYOUTS, compose

# Features that have nothing to do with each other are proven together.
KITS = {
    "experts": (
        *("auxiliary loss", "bias balancing", "shared expert", "selective recompute", "biases, no q/k norm"),
        "dense first layer, expert groups",
    ),
    "latent": ("latent attention, YaRN", "multi-token prediction"),
    "gemma": ("windows", "Gemma's norms, activation and caps"),
    "rest": ("3-axis RoPE", "tied embeddings", "full recompute", "a microbatch without text", "one query group"),
}
ABSENT = {
    f"{mix} + {layout}": compose({"mix": mix, "data": 2}, LAYOUTS[layout])
    for mix in ("rank_without_images", "step_without_images", "images_from_step_3", "padding_row", "text_only")
    for layout in ("data", "pipeline", "context, all-gather", "expert, all-to-all")
}
# One head on each rank: its gradient of the shared rotary channels is a strided slice, which Megatron leaves unsummed.
LATENT = Case.of(2, LAYOUTS["tensor"] | FEATURES["latent attention"])
ONE_HEAD = LATENT.with_setting("model.num_attention_heads", 2).with_setting("model.num_query_groups", 2)
ADMITTED = [case for n in range(60) if matrix.expected(case := fuzz.draw(7, n, 8)).verdict == "proven"]
RANDOM = {f"random {case.seed}": case for case in ADMITTED if case.world > 1}
COMPOSED = {
    f"{layout} + {kit}": compose(LAYOUTS[layout], *(FEATURES[name] for name in names))
    for layout in LAYOUTS
    for kit, names in KITS.items()
}
CASES = (
    {"latent attention, one head a rank": ONE_HEAD}
    | matrix.singles()
    | matrix.pairs()
    | COMPOSED
    | ABSENT
    | dict(list(RANDOM.items())[:20])
)
# Consecutive cases of one size share their processes.
ORDERED = sorted(((name, case) for name, case in CASES.items() if case), key=lambda item: item[1].world)


@pytest.mark.parametrize("case", [case for _, case in ORDERED], ids=[name for name, _ in ORDERED])
def test_layout_equals_one_rank(harness, case: Case):
    outcome = harness.prove(case)
    expected = matrix.expected(case)
    assert (outcome.verdict, outcome.findings) == (expected.verdict, expected.findings), outcome.text()
    if outcome.verdict == "proven":
        grid = Grid(case.config, case.world)
        for rank, place in enumerate(outcome.places):
            theirs = grid.place(rank)
            for axis in ("tensor", "context", "data", "pipeline", "expert"):
                assert place[axis] == getattr(theirs, axis), f"the dry run's {axis} coordinate of rank {rank}"


def test_the_matrix_is_whole():
    assert len(matrix.singles()) == len(LAYOUTS)
    assert sum(name.startswith("random") for name in CASES) == 20
    assert {"tensor + pipeline", "uneven split + context, all-to-all"} <= CASES.keys()
    assert {name for names in KITS.values() for name in names} | {"images from step 3"} <= FEATURES.keys()
    assert max(case.world for _, case in ORDERED) == 8
