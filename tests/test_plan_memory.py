"""The planner's memory: parameters of a rank against the built model, activations against a run with fake tensors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_plan import DENSE_8B, MOE_200B, VOCABULARY, leave_job, tiny

from megamm.config import load_config
from megamm.model import layout
from megamm.plan import gpu, memory, rank_parameters
from megamm.plan import job as jobs
from megamm.plan.job import Documents, Job
from megamm.train.dry_run import Grid

GIB = 2**30
MOE = {"moe": {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 48, "dense_layers": 1, "shared_ffn_hidden_size": 32}}
MLA = {
    "num_query_groups": 8,
    "mla": {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
    "mtp": {"num_layers": 1},
}
BIASES = {"qkv_bias": True, "sandwich_norm": True, "qk_norm": False, "tie_embeddings": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "pp2x2": (16, {"tensor": 2, "context": 2, "pipeline": 2, "virtual_pipeline": 2}, {"tie_embeddings": True}),
    "biases": (4, {"tensor": 4}, BIASES),
    "experts": (32, {"tensor": 2, "sequence": True, "pipeline": 2, "expert": 2, "expert_tensor": 2}, MOE),
    "latent": (8, {"tensor": 2, "pipeline": 2}, MLA),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_of_every_stage_are_those_of_the_built_model(name):
    from megamm.mcore.fake_world import FakeWorld

    leave_job()
    world_size, parallel, model = LAYOUTS[name]
    config = tiny(parallel, model)
    layout.check(config, world_size)
    world, grid = FakeWorld(config, VOCABULARY, world_size), Grid(config, world_size)
    job = jobs.of_config(config, world_size, VOCABULARY, Documents.whole_rows(64))
    for stage in range(config.parallel.pipeline):
        built = world.rank(stage * grid.stage)
        assert rank_parameters.of_stage(job, stage) == (built.dense_parameters, built.expert_parameters), stage


def example(path: Path, *overrides: str, world_size: int) -> Job:
    config = load_config(path, overrides)
    layout.check(config, world_size)
    return jobs.of_config(config, world_size, 200_000, Documents.whole_rows(config.data.seq_length))


ONE_STAGE = ("parallel.pipeline=1", "parallel.virtual_pipeline=1")
FOUR_LAYERS = ("model.num_layers=4", *ONE_STAGE)
ONE_RANK = ("parallel.tensor=1", "parallel.sequence=false", "parallel.context=1", "data.seq_length=8192")


def test_a_layer_saves_what_a_run_with_fake_tensors_measured():
    """Slopes over the number of layers of the real engine's peak memory, recorded on 2026-11-29."""
    dense = example(DENSE_8B, world_size=16)
    assert memory.saved(dense, dense.last_kind) / GIB == pytest.approx(0.555, rel=0.01)
    experts = example(MOE_200B, world_size=1024)
    assert memory.saved(experts, experts.last_kind) / GIB == pytest.approx(0.431, rel=0.01)


TENSOR_2 = ("parallel.tensor=2", "parallel.context=1", "data.seq_length=8192", "train.global_batch_size=512")
FEW_ROWS = "train.global_batch_size=8"
SIMULATED: dict[str, tuple[tuple[str, ...], int, int, int, float]] = {
    "first of two stages": ((FEW_ROWS,), 16, 0, 200_000, 42.50),
    "last of two stages": ((FEW_ROWS,), 16, 1, 200_000, 26.77),
    "full recompute": ((*FOUR_LAYERS, FEW_ROWS, "train.recompute=full"), 8, 0, 200_000, 6.87 + 2.31),
    "selective recompute": ((*FOUR_LAYERS, FEW_ROWS), 8, 0, 200_000, 6.87 + 4.41),
    "one rank a row": ((*FOUR_LAYERS, *ONE_RANK, FEW_ROWS, "train.recompute=none"), 8, 0, 200_000, 29.10),
    "no recompute": (
        (*ONE_STAGE, *TENSOR_2, "train.micro_batch_size=2", "train.recompute=none"),
        *(64, 0, 128_256, 66.66),
    ),
}
"""Overrides of the dense example, ranks, stage, vocabulary, and GiB at the peak.

Measured by running the real engine with fake tensors on a simulated GPU, on 2026-11-29 and 2026-11-30.
"""


@pytest.mark.parametrize("name", SIMULATED)
def test_peak_is_that_of_a_run_with_fake_tensors(name):
    overrides, world_size, stage, vocabulary, measured = SIMULATED[name]
    job = replace(example(DENSE_8B, *overrides, world_size=world_size), vocabulary_size=vocabulary)
    assert memory.of_stage(job, stage).total / GIB == pytest.approx(measured, rel=0.03)


def test_passes_in_flight():
    """Two stages of the interleaved schedule, and a plain one with more stages than microbatches."""
    job = jobs.of_config(tiny({"pipeline": 2, "virtual_pipeline": 2}, {}), 2, VOCABULARY, Documents.whole_rows(64))
    assert memory.in_flight(job, 0) == [3, 2]
    assert memory.in_flight(job, 1) == [2, 1]
    plain = jobs.of_config(tiny({"pipeline": 4}, {}, global_batch_size=2), 4, VOCABULARY, Documents.whole_rows(64))
    assert [memory.in_flight(plain, stage) for stage in range(4)] == [[2], [2], [2], [1]]


def test_memory_falls_with_every_means_against_it():
    job = example(DENSE_8B, "train.recompute=none", world_size=16)
    total = memory.peak(job)[1].total
    for other in (replace(job, recompute="selective"), replace(job, recompute="full")):
        assert memory.peak(other)[1].total < total
        total = memory.peak(other)[1].total
    for override in ("parallel.context=4", "parallel.tensor=8", "train.micro_batch_size=1"):
        smaller = example(DENSE_8B, "train.micro_batch_size=2", override, world_size=64)
        assert (
            memory.peak(smaller)[1].total
            < memory.peak(example(DENSE_8B, "train.micro_batch_size=2", world_size=64))[1].total
        )


def test_usable_memory_leaves_the_reserve():
    for name in gpu.kinds():
        kind = gpu.load(name)
        assert 0.9 * kind.memory < memory.usable(kind) < kind.memory
