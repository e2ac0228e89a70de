"""Balance: every row once, a pure function of costs and layout, and an even load over ranks."""

import numpy as np
import pytest

from megamm.config import ModelConfig
from megamm.data.pipeline.balance import assign, imbalance
from megamm.model.flops import flops_of_row

LAYOUTS = [(1, 1, 8), (2, 4, 4), (4, 4, 1), (3, 5, 2), (8, 4, 2), (16, 1, 1)]
"""Data ranks, microbatches, rows per microbatch."""


@pytest.mark.parametrize(("ranks", "microbatches", "rows"), LAYOUTS)
def test_every_row_once_and_evener_than_in_turn(ranks, microbatches, rows):
    generator, found = np.random.default_rng(ranks), []
    for _ in range(20):
        costs = generator.lognormal(0, 0.3, ranks * microbatches * rows).tolist()
        chosen = assign(costs, ranks, rows)
        assert chosen.shape == (microbatches, ranks, rows)
        assert sorted(chosen.ravel().tolist()) == list(range(len(costs)))
        assert np.array_equal(chosen, assign(list(costs), ranks, rows))
        in_turn = imbalance(costs, np.arange(len(costs)).reshape(chosen.shape))
        ours = imbalance(costs, chosen)
        assert 1 - 1e-12 <= ours[0] <= ours[1] + 1e-12  # waiting for each other in every microbatch is never faster
        found.append((*ours, *in_turn))
    total, slots, total_in_turn, slots_in_turn = np.mean(found, axis=0)
    if ranks > 1 and microbatches * rows > 1:
        assert total - 1 < 0.75 * (total_in_turn - 1) and slots - 1 < 0.75 * (slots_in_turn - 1)


def test_rows_of_a_long_context_model_are_even_over_ranks():
    """An 8B model with rows of 8,192 tokens of web-like documents; the target is 1.03."""
    model = ModelConfig(
        num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32, num_query_groups=8, head_dim=128
    )
    generator, length = np.random.default_rng(0), 8192
    costs = []
    for _ in range(32 * 20):
        documents = generator.lognormal(6.2, 1.2, 40).astype(int) + 2
        kept = documents[np.cumsum(documents) <= length].tolist()
        costs.append(flops_of_row(model, 150_000, length, [*kept, length - sum(kept)]))
    assert max(costs) / np.mean(costs) > 1.05
    steps = [costs[first : first + 32] for first in range(0, len(costs), 32)]
    found = np.array([imbalance(step, assign(step, 8, 1)) for step in steps])
    in_turn = np.array([imbalance(step, np.arange(32).reshape(4, 8, 1)) for step in steps])
    assert found.max(0)[0] < 1.03 and found.mean(0)[1] < 1.03
    assert in_turn.max(0)[0] > 1.03 and in_turn.mean(0)[1] > 1.03


def test_best_of_a_small_case():
    """10 and 9 run at the same time, then 2 and 1; the rank with 10 gets 1."""
    assert assign([1, 10, 2, 9], 2, 1)[:, :, 0].tolist() == [[1, 3], [0, 2]]


def test_flops_of_a_row_are_those_counted_by_hand():
    model = ModelConfig(
        num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2, head_dim=16
    )
    whole = flops_of_row(model, 500, 96, [96])
    # Products of a token: q, k and v, the output, three of the MLP, the head; twice, and thrice with the backward pass.
    products = 2 * (64 * (4 + 2 + 2) * 16 + 4 * 16 * 64 + 3 * 64 * 128) + 500 * 64
    norms = 2 * (2 * 64 + 2 * 16) + 64
    # Attention: scores and values of 4 heads of 16 in 2 layers, for half of the pairs of tokens.
    assert whole == 6 * 96 * (products + norms) + 3 * 2 * 2 * 4 * 16 * 2 * 96**2 / 2
    parts = flops_of_row(model, 500, 96, [32, 32, 32])
    none = flops_of_row(model, 500, 96, [])
    assert (whole - none) == pytest.approx(3 * (parts - none))  # quadratic inside a document, nothing across
