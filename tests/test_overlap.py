"""Parameters that are gathered beside the next forward pass: no number of a run changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from overlap_worker import OverlapJob, steps

from megamm.parity.worlds import WorldFailure, Worlds

MODELS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "experts": (2, {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 40}}, {"expert": 2}),
    "two stages, tied embeddings": (4, {"moe": {}, "tie_embeddings": True}, {"pipeline": 2}),
}
"""Ranks, model and layout."""


@pytest.mark.parametrize("name", ["experts", pytest.param("two stages, tied embeddings", marks=pytest.mark.everything)])
def test_losses_and_parameters_are_the_same_bits(worlds: Worlds, tmp_path: Path, name: str) -> None:
    """Of training, evaluation, a checkpoint and a roll-back just after an update, and a step that is discarded."""
    ranks, model, parallel = MODELS[name]
    found = {}
    for mode in ("before", "beside", "late"):
        found[mode] = worlds.run(ranks, steps, OverlapJob(mode, model, parallel, tmp_path / mode), timeout=120)
        assert not isinstance(found[mode], WorldFailure), found[mode].lines()
    for rank in range(ranks):
        wanted = found["before"][rank]
        assert wanted["buckets"] > 2 or rank >= ranks // 2  # Megatron has one bucket on later stages
        for mode in ("beside", "late"):
            assert found[mode][rank]["seen"] == wanted["seen"], (rank, mode)
            assert np.array_equal(found[mode][rank]["parameters"], wanted["parameters"]), (rank, mode)
