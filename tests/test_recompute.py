"""Recomputation changes no bit of losses and gradients, and computes again what its name says."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from recompute_worker import gradients

from megamm.parity.worlds import WorldFailure, Worlds

LAYERS, EXPERT_LAYERS = 3, 2
NORMS = 2 * LAYERS
ACTIVATIONS = 1 + EXPERT_LAYERS * 2
"""Of the dense MLP, and of all experts together and the shared expert of each other layer."""
EXTRA: dict[str, dict[str, int]] = {
    "norms": {"norm": NORMS},
    "activation": {"swiglu": ACTIVATIONS},
    "mlp": {"swiglu": 1},
    "moe": {"swiglu": ACTIVATIONS - 1},
}
"""Operators of a microbatch that the backward pass computes again."""
ALL = ["norms", "activation", "mlp", "moe"]


@pytest.fixture(scope="module")
def step(worlds: Worlds) -> Any:
    @cache
    def of(*modules: str) -> list[dict[str, Any]]:
        recompute = modules[0] if modules[0] in ("none", "full") else {"modules": list(modules)}
        found = worlds.run(2, gradients, recompute, timeout=120)
        assert not isinstance(found, WorldFailure), found.lines()
        return found

    return of


ONE = [pytest.param([name], marks=pytest.mark.everything) for name in (*ALL, "full")]


@pytest.mark.parametrize("modules", [ALL, *ONE], ids="+".join)
def test_losses_and_gradients_are_the_same_bits(step: Any, modules: list[str]) -> None:
    for rank, (found, wanted) in enumerate(zip(step(*modules), step("none"), strict=True)):
        assert found["loss"] == wanted["loss"] and found["heldout"] == wanted["heldout"], rank
        assert np.array_equal(found["gradients"], wanted["gradients"]), rank
        assert np.abs(found["gradients"]).max() > 0


@pytest.mark.everything
@pytest.mark.parametrize("module", EXTRA)
def test_the_backward_pass_computes_the_module_again(step: Any, module: str) -> None:
    microbatches = 4
    for found, wanted in zip(step(module), step("none"), strict=True):
        for name, extra in EXTRA[module].items():
            assert found["counts"][name] == wanted["counts"][name] + microbatches * extra


def test_a_part_of_a_recomputed_module_is_computed_again_once(step: Any) -> None:
    for found, wanted in zip(step(*ALL), step("none"), strict=True):
        assert found["counts"]["swiglu"] == wanted["counts"]["swiglu"] + 4 * ACTIVATIONS
        assert found["counts"]["norm"] == wanted["counts"]["norm"] + 4 * NORMS
