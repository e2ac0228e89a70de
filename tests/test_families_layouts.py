"""Models of transformers on tensor, pipeline and expert parallel ranks: loss as theirs, and the same tensors back.

One gloo world a layout reads what was converted, gives the loss of packed rows, and saves; float32.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_rows import documents
from family_models import read_model, write_model
from saver_worker import state
from stream_models import add_tokenizer, cut_weights, equal

from megamm import engine as engines
from megamm.checkpoint import path_of
from megamm.checkpoint.saver import save_now
from megamm.convert.hf import import_
from megamm.data.sample import IGNORE_LABEL
from megamm.device import choose
from megamm.mcore import groups as grid
from megamm.parity.case import Case, Run
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches
from megamm.parity.worlds import Failure, Worlds

ROWS, SEQUENCE = [(True, True)] * 8, 48
SIZES = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
EVEN = {"qwen3-moe": {"num_experts": 8}, "mixtral": {"num_local_experts": 4}}
LATENT = {"num_key_value_heads": 8, "kv_lora_rank": 12, "n_routed_experts": 8}
EVEN |= {"deepseek-v3-published": LATENT | {"q_lora_rank": 16, "n_group": 4}, "deepseek-v2-lite": LATENT}
# Fewer heads of keys and values than tensor ranks.
EVEN |= {"qwen2-tied": {"num_key_value_heads": 2}, "mistral-window": {"num_key_value_heads": 1}}
EVEN["mixtral"] |= {"num_key_value_heads": 1}
EVEN["gemma3"] = {"layer_types": ["sliding_attention", "full_attention"] * 2}
T, S, P, E, X = (f"parallel.{name}" for name in ("tensor", "sequence", "pipeline", "expert", "expert_tensor"))
DENSE = [(2, {T: 2}), (4, {T: 4}), (2, {P: 2}), (4, {P: 4}), (4, {T: 2, S: True, P: 2})]
EXPERTS = [(2, {E: 2}), (4, {E: 4}), (4, {P: 2, E: 2}), (4, {T: 2, S: True, E: 2})]
STAGES = [(4, {P: 4})]
"""Of which some have dense layers alone."""


@dataclass(frozen=True)
class Job:
    """Read `folder`, evaluate, save to `out`."""

    world: int
    settings: tuple[tuple[str, Any], ...]
    folder: Path
    out: Path


def run(job: Job) -> list[float]:
    """The mean loss of every modality."""
    from megamm.mcore import rng  # not before a world has adapted Megatron-core to its device

    place = choose("cpu")
    config = Run(job.world, 1, job.settings, ()).config
    groups = grid.build(config.parallel, seed=9)
    engine = engines.build(config, VOCABULARY, groups, place)
    engine.load(path_of(job.folder, 0) / "tensors", 5, with_optimizer=False)
    batches = rank_batches(global_batch(6, 1, ROWS, SEQUENCE), 1, groups.data_rank, groups.data_size)
    loss = engine.evaluate(batches, torch.ones(2, dtype=torch.float64))
    save_now(job.out, state(5), engine.blocks(), rng.fresh(), place)
    mean: list[float] = loss.mean.tolist()
    return mean


@pytest.fixture(scope="module")
def worlds():
    with Worlds() as worlds:
        yield worlds


def expected(theirs: Any) -> torch.Tensor:
    """transformers' mean loss of every modality, each document read alone."""
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


NAMES = (
    "llama3",
    "mistral-window",
    "qwen2-tied",
    "qwen3",
    "qwen3-moe",
    "mixtral",
    "deepseek-v3-published",
    "deepseek-v2-lite",
    "gemma2",
)
NAMES += ("gemma3",)


@pytest.mark.parametrize("name", NAMES)
def test_converted_weights_at_every_layout(worlds: Any, name: str, tmp_path: Path) -> None:
    theirs = write_model(name, tmp_path / "hf", SIZES | EVEN.get(name, {}))
    family, section, file = read_model(tmp_path / "hf")
    model = {f"model.{key}": value for key, value in section.items()}
    wanted, m = expected(theirs), Case.of(1, model).config.model
    layouts: list[tuple[int, dict[str, Any]]] = [(1, {}), *(EXPERTS if m.moe.num_experts else DENSE)]
    layouts += STAGES if m.moe.dense_layers else []
    source = tmp_path / "converted"
    add_tokenizer(tmp_path / "hf", VOCABULARY)
    import_(tmp_path / "hf", source, nproc=1, shard_size=100_000, overrides=[f"data.seq_length={SEQUENCE}"])
    for i, (world, parallel) in enumerate(layouts):
        case = Case.of(world, {"train.global_batch": 8, "train.micro_batch": 1} | model | parallel)
        out = tmp_path / f"layout{i}"
        done = worlds.run(world, run, Job(world, case.settings, source, out), timeout=120)
        assert not isinstance(done, Failure), done.lines()
        for means in done:
            torch.testing.assert_close(torch.tensor(means, dtype=torch.float64), wanted, rtol=1e-6, atol=0)
        back = cut_weights(path_of(out, 5), family.entries, m, VOCABULARY, tmp_path / f"back{i}")
        assert equal(back, file), case.line()
