"""The planner's step times against published training speeds (tests/data/published_speeds.csv)."""

from functools import cache

import published_speeds as published
import pytest

from megamm.common import gpu_constants as gpus
from megamm.model.flops import flops_of_row

ROWS = published.rows()
WORST = {"target": 0.10, "further": 0.16, "transfer": 0.10}
"""Largest error of a dense row by its role."""


@cache
def errors() -> dict[str, float]:
    return published.leave_one_out(ROWS)


def test_dense_rows_are_predicted_within_the_target():
    dense = [row for row in ROWS if not row.has_experts]
    assert len([r for r in dense if r.role == "target"]) == 8
    assert published.mean_error(errors(), (r for r in dense if r.role == "target")) < 0.05
    assert published.mean_error(errors(), (r for r in dense if r.role == "further")) < 0.065


@pytest.mark.parametrize("row", [r for r in ROWS if not r.has_experts], ids=lambda row: row.name)
def test_no_dense_row_is_far_off(row):
    assert abs(errors()[row.name]) < WORST[row.role]


def test_rows_with_experts():
    """Of the target and the later rows; two further ones are much slower than predicted, which the page says."""
    moe = [row for row in ROWS if row.has_experts]
    later = [row for row in moe if row.role == "later"]
    assert published.mean_error(errors(), (r for r in moe if r.role == "target")) < 0.12
    assert len(later) == 8 and published.mean_error(errors(), later) < 0.16
    assert max(abs(errors()[row.name]) for row in later) < 0.26
    slow = {row.name for row in moe if errors()[row.name] < -0.3}
    assert slow == {"bridge-qwen3-30b-25.11", "bridge-qwen3-30b-26.02"}
    assert all(errors()[row.name] < 0.23 for row in moe), "none is predicted much slower than published"


def test_the_constants_of_the_package_are_the_fitted_ones():
    for (name, constant), value in published.fitted(ROWS).items():
        assert getattr(gpus.load(name), constant) == pytest.approx(value, rel=0.01), (name, constant)


def test_published_flops_are_those_of_the_models():
    """Megatron Bridge publishes both tokens/s and TFLOP/s: the models are the published ones, up to counting."""
    for model, flops in {"llama3-8b": 744e12 / 14451, "llama3-70b": 719e12 / 1602, "llama3-405b": 737e12 / 292}.items():
        config, vocabulary, length = published.MODELS[model]
        assert flops_of_row(config, vocabulary, length, [length]) / length == pytest.approx(flops, rel=0.01), model
    for model, flops in {"deepseek-v3": 338e12 / 1297, "qwen3-235b": 242e12 / 1633, "qwen3-30b": 121e12 / 5275}.items():
        config, vocabulary, length = published.MODELS[model]
        assert flops_of_row(config, vocabulary, length, [length]) / length == pytest.approx(flops, rel=0.03), model
