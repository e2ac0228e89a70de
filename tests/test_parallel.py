"""Layouts against one rank (megamm/parity): pairs of features together, and random compositions.

Same weights, same batch, float32, real gloo processes: losses, every gradient, grad norm, every parameter after one
step and after the last, tokens per expert, and every rank's coordinates in the dry run. `make test` has every layout
with every other kind of parallelism; `make test-all` also has every pair (covering.py) and the full products. A failing
composition is reduced to a small one.
"""

from functools import cache

import covering
import pytest

from megamm.parity import fuzz, matrix
from megamm.parity.case import Case, CaseOutcome
from megamm.parity.harness import Harness
from megamm.parity.matrix import FEATURES, LAYOUTS, compose
from megamm.train.dry_run import Grid

# Independent features are tested together.
KITS = {
    "experts": (
        *(
            "auxiliary loss",
            "bias balancing",
            "shared expert",
            "recomputed norms and activations",
            "biases, no q/k norm",
        ),
        *("dense first layer, expert groups", "weight gradients in float32"),
    ),
    "latent": ("latent attention, YaRN", "multi-token prediction", "attention by lengths"),
    "gemma": ("windows", "Gemma's norms, activation and caps"),
    "spans": ("bidirectional spans, windows", "3-axis RoPE"),
    "rest": (
        *("3-axis RoPE", "tied embeddings", "full recompute", "a microbatch without text", "one query group"),
        *("weight gradients in float32", "attention by lengths"),
    ),
}
MIXES = ("rank_without_images", "step_without_images", "images_from_step_3", "padding_row", "text_only")
ABSENT = {
    f"{mix} + {layout}": compose({"mix": mix, "data": 2}, LAYOUTS[layout])
    for mix in MIXES
    for layout in ("data", "pipeline", "context, all-gather", "expert, all-to-all")
}
# A composition has one of each; "" is none.
FACTORS = {
    "experts": ("", "expert, all-to-all", "expert, all-gather"),
    "tensor": ("", "tensor", "sequence", "expert tensor"),
    "pipeline": (
        *("", "pipeline", "interleaved pipeline", "uneven split"),
        "interleaved pipeline + uneven split",
    ),
    "context": ("", "context, all-gather", "context, all-to-all"),
    "kit": ("", *KITS),
    "mix": ("", *MIXES),
    "data": ("", "data"),
}
MOST_RANKS = 4


def composed(row: covering.Row) -> Case | None:
    """Return the case of a row of FACTORS."""
    layouts = [LAYOUTS[name] for factor in FACTORS for name in row[factor].split(" + ") if name in LAYOUTS]
    features = [FEATURES[name] for name in KITS.get(row["kit"], ())]
    return compose(*layouts, *features, {"mix": row["mix"]} if row["mix"] else {})


@cache
def _is_proven(values: tuple[str, ...]) -> bool:
    case = composed(dict(zip(FACTORS, values, strict=True)))
    return case is not None and case.world <= MOST_RANKS and matrix.expected(case).verdict == "proven"


def admits(row: covering.Row) -> bool:
    return _is_proven(tuple(row[factor] for factor in FACTORS))


COVERING = covering.rows(FACTORS, admits)
KINDS = ("experts", "tensor", "pipeline", "context")
"""The factors that are kinds of parallelism, apart from data."""


def parts(row: covering.Row) -> set[tuple[str, ...]]:
    """Return what `make test` has in some row: every value, and each layout and kit with each other kind."""
    used = {factor: value for factor, value in row.items() if value}
    beside = {(used[a], b) for a in (*KINDS, "kit") for b in KINDS if a in used and b in used and a != b}
    return beside | {(value,) for value in used.values()}


def named(rows: list[covering.Row]) -> dict[str, Case | None]:
    return {" + ".join(filter(None, row.values())) or "nothing": composed(row) for row in rows}


FEW = covering.selection(COVERING, parts)
COVERED = named(COVERING)
# One head on each rank: its gradient of the shared rotary channels is a strided slice, which Megatron does not sum.
LATENT = Case.of(2, LAYOUTS["tensor"] | FEATURES["latent attention"])
ONE_HEAD = LATENT.with_setting("model.num_attention_heads", 2).with_setting("model.num_query_groups", 2)
WINDOWS = {
    f"windows by lengths + {layout}": compose(
        LAYOUTS[layout], FEATURES["windows"], FEATURES["attention by lengths"], {"mix": "padding_row"}
    )
    for layout in ("context, all-gather", "context, all-to-all")
}
ADMITTED = [case for n in range(60) if matrix.expected(case := fuzz.draw(7, n, 8)).verdict == "proven"]
RANDOM = {f"random {case.seed}": case for case in ADMITTED if case.world > 1}
COMPOSED = {
    f"{layout} + {kit}": compose(LAYOUTS[layout], *(FEATURES[name] for name in names))
    for layout in LAYOUTS
    for kit, names in KITS.items()
}
PRODUCTS = matrix.singles() | matrix.pairs() | COMPOSED | ABSENT
REFUSED = {name: case for name, case in PRODUCTS.items() if case and matrix.expected(case).verdict == "refused"}
DRAWN = dict(list(RANDOM.items())[:20])
OFTEN = {"latent attention, one head a rank": ONE_HEAD} | named(FEW) | REFUSED
OFTEN |= dict(list(WINDOWS.items())[:1])
OFTEN["random 4"] = DRAWN["random 4"]  # tensor 4 x pipeline 2
CASES = PRODUCTS | WINDOWS | DRAWN | COVERED | OFTEN
PARAMETERS = [
    pytest.param(case, id=name, marks=() if name in OFTEN else pytest.mark.everything)
    for name, case in CASES.items()
    if case
]


@pytest.mark.parametrize("case", PARAMETERS)
def test_layout_equals_one_rank(harness: Harness, case: Case):
    outcome = harness.prove(case)
    expected = matrix.expected(case)
    if (outcome.verdict, outcome.findings) != (expected.verdict, expected.findings):
        pytest.fail(f"{outcome.text()}\n{smallest(harness, case, outcome)}")
    if outcome.verdict == "proven":
        grid = Grid(case.config, case.world)
        for rank, found in enumerate(outcome.coordinates):
            theirs = grid.coordinates(rank)
            for axis in ("tensor", "context", "data", "pipeline", "expert"):
                assert found[axis] == getattr(theirs, axis), f"the dry run's {axis} coordinate of rank {rank}"


def smallest(harness: Harness, case: Case, outcome: CaseOutcome) -> str:
    """Reduce a mismatching case to the settings that it does not fail without."""
    if outcome.verdict != "mismatch":
        return f"not made small: {outcome.verdict}"

    def fails(smaller: Case) -> CaseOutcome | None:
        found = outcome if smaller == case else harness.prove(smaller, explain=False)
        return found if found.verdict == "mismatch" else None

    return f"smallest case that fails: {fuzz.minimise(case, fails).case}"


def test_the_matrix_is_whole():
    assert len(matrix.singles()) == len(LAYOUTS)
    assert sum(name.startswith("random") for name in CASES) == 20
    assert {"tensor + pipeline", "uneven split + context, all-to-all"} <= CASES.keys()
    assert {name for names in KITS.values() for name in names} | {"images from step 3"} <= FEATURES.keys()
    assert max(case.world for case in OFTEN.values() if case) == 8


def test_every_layout_is_always_run_with_every_other_kind():
    """The exceptions are invalid in any run: these experts need sequence parallelism beside tensor parallelism."""
    have = set().union(*map(parts, FEW))
    assert have == set().union(*map(parts, COVERING))
    layouts = {(value, factor) for factor in KINDS for value in FACTORS[factor] if value}
    wanted = {(value, kind) for value, factor in layouts for kind in KINDS if kind != factor}
    wanted |= {(kit, kind) for kit in KITS for kind in KINDS} | {(mix,) for mix in MIXES}
    assert wanted - have == {("tensor", "experts")}
    assert all(composed(row) in OFTEN.values() for row in FEW)
    assert len(FEW) <= len(COVERING) / 2


def test_every_two_parts_are_in_a_case():
    """The cases have everything in the products; missing pairs are invalid in any run or need two batches."""
    assert {name for values in FACTORS.values() for value in values for name in value.split(" + ") if name} == {
        *LAYOUTS,
        *KITS,
        *MIXES,
    }
    have = set().union(*(covering.pairs_of(row) for row in COVERING))
    factors = list(FACTORS)
    missing = set()
    for i, a in enumerate(factors):
        for b in factors[i + 1 :]:
            pairs = ((x, y) for x in FACTORS[a] for y in FACTORS[b])
            missing |= {(x, y) for x, y in pairs if frozenset({(a, x), (b, y)}) not in have}
    experts = {(name, "tensor") for name in ("expert, all-to-all", "expert, all-gather")} | {("tensor", "experts")}
    assert missing == experts | {("rest", mix) for mix in MIXES}
    assert all(composed(row) in CASES.values() for row in COVERING)
    assert len(COVERING) < len(PRODUCTS) / 2
