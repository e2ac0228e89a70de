"""Models of transformers on tensor, pipeline and expert parallel ranks: equal loss, and the same tensors back.

One gloo world per layout reads the converted weights, computes the loss of packed rows, and saves; float32. Every
family and every layout is in OFTEN; `make test-all` has the product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import generator_states, save_now
from convert_rows import documents
from family_models import read_model, write_model
from saver_worker import state
from stream_models import add_tokenizer, cut_weights, equal

from megamm.checkpoint import path_of
from megamm.common.device import choose
from megamm.common.sample import IGNORE_LABEL
from megamm.convert.import_folder import import_
from megamm.engine.build import build_engine
from megamm.mcore import process_groups
from megamm.parity.case import Case, Run
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches
from megamm.parity.worlds import WorldFailure

ROWS, SEQUENCE = [(True, True)] * 8, 48
SIZES = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
EVEN = {"qwen3-moe": {"num_experts": 8}, "mixtral": {"num_local_experts": 4}}
LATENT = {"num_key_value_heads": 8, "kv_lora_rank": 12, "n_routed_experts": 8}
EVEN |= {"deepseek-v3-published": LATENT | {"q_lora_rank": 16, "n_group": 4}, "deepseek-v2-lite": LATENT}
# Fewer key-value heads than tensor ranks.
EVEN |= {"qwen2-tied": {"num_key_value_heads": 2}, "mistral-window": {"num_key_value_heads": 1}}
EVEN["mixtral"] |= {"num_key_value_heads": 1}
EVEN["gemma3"] = {"layer_types": ["sliding_attention", "full_attention"] * 2}
T, S, P, E, X = (f"parallel.{name}" for name in ("tensor", "sequence", "pipeline", "expert", "expert_tensor"))
DENSE = [(2, {T: 2}), (4, {T: 4}), (2, {P: 2}), (4, {P: 4}), (4, {T: 2, S: True, P: 2})]
EXPERTS = [(2, {E: 2}), (4, {E: 4}), (4, {P: 2, E: 2}), (4, {T: 2, S: True, E: 2})]
STAGES = [(4, {P: 4})]
"""Layouts in which some stages have dense layers only."""
ALONE: list[tuple[int, dict[str, Any]]] = [(1, {})]
LAYOUTS = {name: [*ALONE, *DENSE] for name in ("llama3", "mistral-window", "qwen2-tied", "qwen3", "gemma2", "gemma3")}
LAYOUTS |= {name: [*ALONE, *EXPERTS] for name in ("qwen3-moe", "mixtral")}
LAYOUTS |= {name: [*ALONE, *EXPERTS, *STAGES] for name in ("deepseek-v3-published", "deepseek-v2-lite")}
OFTEN = {
    "llama3": [(1, {})],
    "mistral-window": [(2, {T: 2})],  # one key-value head on two ranks
    "qwen2-tied": [(4, {T: 4})],  # two on four ranks
    "qwen3": [(2, {P: 2})],
    "gemma2": [(4, {P: 4})],
    "gemma3": [(4, {T: 2, S: True, P: 2})],
    "qwen3-moe": [(2, {E: 2}), (4, {P: 2, E: 2})],
    "mixtral": [(4, {T: 2, S: True, E: 2})],
    "deepseek-v3-published": [(4, {P: 4})],
    "deepseek-v2-lite": [(4, {E: 4})],
}
CASES = [
    pytest.param(
        *(name, world, parallel),
        id=" ".join([name, *(f"{key.partition('.')[2]}={value}" for key, value in parallel.items())]),
        marks=() if (world, parallel) in OFTEN[name] else pytest.mark.everything,
    )
    for name, layouts in LAYOUTS.items()
    for world, parallel in layouts
]


@dataclass(frozen=True)
class Job:
    """Read `folder`, evaluate, save to `out`."""

    world: int
    settings: tuple[tuple[str, Any], ...]
    folder: Path
    out: Path


def run(job: Job) -> list[float]:
    """Return the mean loss of every modality."""

    place = choose("cpu")
    config = Run(job.world, 1, job.settings, ()).config
    groups = process_groups.build(config.parallel, seed=9)
    engine = build_engine(config, VOCABULARY, groups, place)
    engine.load(path_of(job.folder, 0) / "tensors", 5, with_optimizer=False)
    batches = rank_batches(global_batch(6, 1, ROWS, SEQUENCE), 1, groups.data_rank, groups.data_size)
    loss = engine.evaluate(batches, torch.ones(2, dtype=torch.float64))
    save_now(job.out, state(5), engine.blocks(), generator_states(), place)
    mean: list[float] = loss.mean.tolist()
    return mean


def expected(theirs: Any) -> torch.Tensor:
    """Return transformers' mean loss of every modality, each document read alone."""
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for batch in rank_batches(global_batch(6, 1, ROWS, SEQUENCE), 1, 0, 1):
        for row, part in documents(batch):
            with torch.no_grad():
                logits = theirs(batch.input_ids[row : row + 1, part]).logits[0].double()
            labels, weight = batch.labels[row, part], batch.loss_weight[row, part].double()
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_LABEL)
            for m in range(2):
                mine = (batch.modality[row, part] == m) * weight
                sums[m] += (loss * mine).sum()
                counts[m] += mine.sum()
    return sums / counts


@dataclass(frozen=True)
class Converted:
    """A transformers model, its conversion, and transformers' mean losses."""

    file: dict[str, torch.Tensor]
    rules: Any
    settings: dict[str, Any]
    checkpoint: Path
    losses: torch.Tensor


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Converted]:
    """Return a function name -> model, which makes and converts each model once for all its layouts."""

    @cache
    def make(name: str) -> Converted:
        folder = tmp_path_factory.mktemp(name)
        theirs = write_model(name, folder / "hf", SIZES | EVEN.get(name, {}))
        family, section, file = read_model(folder / "hf")
        add_tokenizer(folder / "hf", VOCABULARY)
        overrides = [f"data.seq_length={SEQUENCE}"]
        import_(folder / "hf", folder / "converted", nproc=1, shard_size=100_000, overrides=overrides)
        settings = {f"model.{key}": value for key, value in section.items()}
        return Converted(file, family.rules, settings, folder / "converted", expected(theirs))

    return make


@pytest.mark.parametrize(("name", "world", "parallel"), CASES)
def test_converted_weights_at_every_layout(
    worlds: Any, converted: Callable[[str], Converted], name: str, world: int, parallel: dict[str, Any], tmp_path: Path
) -> None:
    model = converted(name)
    case = Case.of(world, {"train.global_batch_size": 8, "train.micro_batch_size": 1} | model.settings | parallel)
    m = case.config.model
    assert LAYOUTS[name] == [
        *ALONE,
        *(EXPERTS if m.moe.num_experts else DENSE),
        *(STAGES if m.moe.dense_layers else []),
    ]
    out = tmp_path / "saved"
    done = worlds.run(world, run, Job(world, case.settings, model.checkpoint, out), timeout=120)
    assert not isinstance(done, WorldFailure), done.lines()
    for means in done:
        torch.testing.assert_close(torch.tensor(means, dtype=torch.float64), model.losses, rtol=1e-6, atol=0)
    back = cut_weights(path_of(out, 5), model.rules, m, VOCABULARY, tmp_path / "back")
    assert equal(back, model.file), case.line()


def test_no_family_and_no_layout_is_in_the_product_alone() -> None:
    assert OFTEN.keys() == LAYOUTS.keys()
    for name, layouts in OFTEN.items():
        assert all(layout in LAYOUTS[name] for layout in layouts), name
    for layout in (*ALONE, *DENSE, *EXPERTS):
        assert any(layout in layouts for layouts in OFTEN.values()), layout
