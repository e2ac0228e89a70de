"""Runs that start from other weights: rules as pure functions, then every layout and engine against plain torch.

One rank writes a source checkpoint of random numbers. Every layout starts from it with another vocabulary and saves.
The saved tensors must be bit-identical to indexing the source's tensors by hand; new rows must equal one rank's.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_folders import generator_states, save_now
from run_folders import read_tensors

from megamm.checkpoint import TrainState, path_of
from megamm.checkpoint.tensor_shards import TensorShard
from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.config import config_from_dict
from megamm.engine.build import build_engine
from megamm.init_from import initialize, new_rows, rules
from megamm.init_from.rules import resize_vocabulary
from megamm.mcore import process_groups
from megamm.model.vocabulary import Vocabulary
from megamm.parity.case import Case, Run
from megamm.parity.worlds import WorldFailure, Worlds

TEXT, AUDIO, VISUAL = (61, "t0"), (16, "a0"), (26, "v0")
BEFORE = Vocabulary.of({"text": TEXT, "audio": AUDIO})
AFTER = Vocabulary.of({"text": TEXT, "audio": AUDIO, "image": VISUAL})
TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")
MAIN = "optimizer.state.param."


def test_ranges_are_kept_moved_added_and_dropped():
    growth = resize_vocabulary(BEFORE, AFTER, {})
    assert [(s.start, s.stop, s.taken_from) for s in growth.spans] == [
        *((0, 61, 0), (61, 93, 61)),
        *((93, 119, None), (119, 135, 93)),
    ]
    assert growth.text == range(61)
    assert growth.lines == (
        *("text: 61 kept", "control: 32 kept"),
        *("visual: 26 new (not in the source)", "audio: 16 moved from 93 to 119"),
    )
    back = resize_vocabulary(AFTER, BEFORE, {"visual": "ignore"})
    assert back.lines[-1] == "visual: 26 dropped" and back.spans[-1].taken_from == 119
    larger = Vocabulary.of({"text": (70, "t1"), "audio": (9, "a1")})
    by_rule = resize_vocabulary(BEFORE, larger, {"text": "load", "audio": "new"})
    assert [(s.start, s.stop, s.taken_from) for s in by_rule.spans] == [
        *((0, 61, 0), (61, 70, None)),
        *((70, 102, 61), (102, 111, None)),
    ]
    assert by_rule.lines[0] == "text: 61 kept, 9 new (by rule: another codec)"
    assert resize_vocabulary(BEFORE, larger, {"text": "load", "audio": "load"}).lines[2] == (
        "audio: 9 moved from 93 to 102, 7 dropped (by rule: another codec)"
    )


@pytest.mark.parametrize(
    ("theirs", "ours", "given", "message"),
    [
        (
            AFTER,
            BEFORE,
            {},
            "the source has 26 ids of visual, the run has none; set init_from.vocabulary.visual: ig",
        ),
        (BEFORE, Vocabulary.of({"text": (61, "t1"), "audio": AUDIO}), {}, "text has codec t1, the source t0"),
        (
            AFTER,
            Vocabulary.of({"text": TEXT, "audio": (9, "a0"), "image": VISUAL}),
            {},
            "audio has 9 ids, the source 16",
        ),
        (BEFORE, AFTER, {"visual": "load"}, "init_from.vocabulary.visual: load, but the source has no such range"),
        (BEFORE, AFTER, {"audio": "ignore"}, "init_from.vocabulary.audio: ignore, but the run has this range"),
        (BEFORE, AFTER, {"vision": "new"}, "no such range; the ranges are text, control, audio, visual"),
    ],
)
def test_a_range_that_does_not_fit_needs_a_rule(theirs, ours, given, message):
    with pytest.raises(UserError) as caught:
        resize_vocabulary(theirs, ours, given)
    assert message in str(caught.value)


THEIRS = {"a": (3, 4), "b": (2,), "table": (99, 4), "old.x": (1,)}
OURS = {"a": (3, 4), "b": (5,), "table": (120, 4), "adapter.x": (2,), "adapter.y": (2,)}


def test_the_first_rule_that_matches_a_tensor_counts():
    given = [("ignore", "old.*"), ("new", "adapter.?"), ("new", "b"), ("load", "*")]
    actions = rules.decide(THEIRS, OURS, {"table"}, given)
    assert actions == {"a": "load", "b": "new", "table": "load", "adapter.x": "new", "adapter.y": "new"}
    # A source that contains adapters only.
    adapters = {name: shape for name, shape in OURS.items() if name.startswith("adapter")}
    actions = rules.decide(adapters, OURS, {"table"}, [("load", "adapter.*"), ("new", "*")])
    assert actions == dict.fromkeys(("a", "b", "table"), "new") | dict.fromkeys(adapters, "load")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            [],
            "adapter.x (only in the model), adapter.y (only in the model), b ([2] in the source, [5] in the mo",
        ),
        (
            [("new", "adapter.*"), ("new", "b"), ("new", "old.x")],
            "match the model: old.x (only in the source); under",
        ),
        ([("new", "adapter.*"), ("ignore", "old.x"), ("ignore", "b")], "b (set to ignore, but the model has it)"),
        ([("load", "adapter.*"), ("ignore", "old.x"), ("new", "b")], "adapter.x (only in the model), adapter.y"),
        ([("new", "adaptor.*")], "new 'adaptor.*' matches no tensor; the nearest name is adapter."),
    ],
)
def test_what_no_rule_covers_is_named(given, message):
    with pytest.raises(UserError) as caught:
        rules.decide(THEIRS, OURS, {"table"}, given)
    assert message in str(caught.value)


def test_drawn_numbers_depend_on_seed_name_and_row_alone():
    rows = torch.stack([new_rows.noise(1, "a", row, 4096) for row in range(64)])
    assert abs(rows.mean()) < 0.01 and abs(rows.std() - 1) < 0.01
    assert rows.unique().numel() > 0.98 * rows.numel()  # no row is repeated in another
    assert torch.equal(new_rows.noise(1, "a", 5, 100), rows[5][:100])
    assert not torch.equal(new_rows.noise(2, "a", 5, 4096), rows[5]) and not torch.equal(
        new_rows.noise(1, "b", 5, 4096), rows[5]
    )


@dataclass(frozen=True)
class Job:
    """fill: write random state to `out`; otherwise start as the settings say and write that."""

    world: int
    settings: tuple[tuple[str, Any], ...]
    out: Path
    fill: bool = False


def run(job: Job) -> dict[str, float]:
    """Return the standard deviation of the engine's fresh tensors, without tables (whole on one rank)."""

    config = Run(job.world, 1, job.settings, ()).config
    groups = process_groups.build(config.parallel, seed=job.world)
    vocabulary = BEFORE if job.fill else AFTER
    engine: Any = build_engine(config, vocabulary.size, groups, choose("cpu"))
    fresh = {}
    if job.fill:
        blocks = {(block.key, block.offset): block.data for block in engine.blocks()}
        for name in {name for name, _ in blocks}:
            values = torch.cat([data.flatten().float() for (key, _), data in blocks.items() if key == name])
            fresh[name] = float(values.std(correction=0))
        torch.manual_seed(1)
        for (name, _), data in blocks.items():
            data.copy_(torch.rand(data.shape) + 0.5)
            if name.removeprefix(MAIN) in TABLES:
                data[: TEXT[0]] *= 3  # other mean and deviation than the remaining rows
        for (name, offset), data in blocks.items():
            data.copy_(blocks.get((MAIN + name, offset), data))
    else:
        assert config.init_from is not None
        initialize.WINDOW = 7 * config.model.hidden_size  # several windows of text rows, the last one shorter
        initialize.init_from(config, vocabulary, engine, config.init_from)
    state = TrainState(0, 0, job.world, {}, vocabulary.to_json(), config.model_dump(mode="json"), versions={})
    save_now(job.out, state, engine.blocks(), generator_states(), choose("cpu"))
    dist.barrier()
    return fresh


T, S, P, V, C, E, X = (
    "parallel." + name
    for name in ("tensor", "sequence", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
)
MOE = {"model.moe.num_experts": 4, "model.moe.ffn_hidden_size": 24, "model.moe.shared_ffn_hidden_size": 32}
MOE |= {"model.moe.score": "sigmoid", "model.moe.bias_update_rate": 0.01}
MTP = {"model.mtp.num_layers": 1}
DEEPSPEED = {"engine": "deepspeed", "deepspeed.zero": 3}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], list[tuple[int, dict[str, Any]]]]] = {
    "dense": (
        {},
        {},
        [(1, {}), (2, {T: 2}), (2, {P: 2, V: 2}), (4, {T: 2, P: 2})],
    ),
    "bf16-tied": (
        {"train.precision": "bf16", "model.tie_embeddings": True},
        {},
        [(1, {}), (2, {}), (2, {P: 2}), (2, DEEPSPEED)],  # importing DeepSpeed takes most of the time
    ),
    # The module of multi-token prediction is new, the experts are not.
    "moe": (MOE, MTP, [(1, {}), (2, {E: 2}), (2, {T: 2, S: True, X: 2}), (4, {P: 2, C: 2, E: 2})]),
}


def _done(worlds: Worlds, world: int, settings: dict[str, Any], out: Path, fill: bool = False) -> dict[str, float]:
    case = Case.of(world, {"train.global_batch_size": 8, "train.micro_batch_size": 1, "output": str(out)} | settings)
    results = worlds.run(world, run, Job(world, case.settings, out, fill), timeout=120)
    assert not isinstance(results, WorldFailure), results.lines()
    return results[0]


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.everything if f != "moe" else ()) for f in FAMILIES]
)
def test_every_layout_starts_with_the_same_bits(worlds, family, tmp_path):
    model, more, layouts = FAMILIES[family]
    source = tmp_path / "source"
    _done(worlds, 1, model, source, fill=True)
    theirs = read_tensors(path_of(source, 0))
    start: dict[str, Any] = {"init_from.checkpoint": str(source)}
    if more:
        start |= {"init_from.rules": [{"new": "mtp.*"}]}
    first: dict[str, torch.Tensor] = {}
    for number, (world, layout) in enumerate(layouts):
        out = tmp_path / f"layout{number}"
        _done(worlds, world, model | more | start | layout, out)
        ours = read_tensors(path_of(out, 0))
        if not first:
            first = ours
            _check_against(theirs, ours, is_bf16="bf16" in family)
        assert ours.keys() == first.keys()
        for name, tensor in first.items():
            mine = ours[name]
            if name.endswith(TABLES):
                assert not mine[AFTER.size :].any(), f"{name}: padding of {layout} is not 0"
                mine = mine[: AFTER.size]
            assert mine.dtype == tensor.dtype and torch.equal(mine, tensor), f"{name} of {layout}"


def _check_against(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], is_bf16: bool) -> None:
    """Compare one rank's whole tensors with the source's, indexed by hand: weights from its float32 copies."""
    for name, tensor in ours.items():
        if "exp_avg" in name:
            assert not tensor.any(), f"{name} is not a fresh run's"
            continue
        main = theirs.get(MAIN + name.removeprefix(MAIN), theirs.get(name))
        if name.removeprefix(MAIN) in TABLES:
            assert main is not None
            wanted = main.to(tensor.dtype)
            assert torch.equal(tensor[:93], wanted[:93]) and torch.equal(tensor[119:135], wanted[93:109])
            if not (is_bf16 and not name.startswith(MAIN)):
                _check_drawn(name.removeprefix(MAIN), tensor[93:119], main[:61])
        elif main is not None:
            assert torch.equal(tensor, main.to(tensor.dtype)), name


def _check_drawn(name: str, new: torch.Tensor, text: torch.Tensor) -> None:
    """Check rows drawn around the text's mean with its per-channel deviation, exactly and statistically."""
    mean, std = text.double().mean(0), text.double().std(0, correction=0)
    noise = torch.stack([new_rows.noise(1, name, row, len(mean)) for row in range(93, 119)])
    torch.testing.assert_close(new.double(), mean + std * noise, rtol=0, atol=1e-6)  # of numbers around 3
    z = (new - mean) / std
    assert abs(z.mean()) < 4 / math.sqrt(z.numel()) and abs(z.std() - 1) < 4 / math.sqrt(2 * z.numel())


def test_new_tensors_are_spread_as_a_fresh_models(worlds, tmp_path):
    """Compare with what Megatron itself draws, tensor by tensor."""
    model = MOE | MTP
    fresh = _done(worlds, 1, model, tmp_path / "fresh", fill=True)
    start = {"init_from.checkpoint": str(tmp_path / "fresh"), "init_from.rules": [{"new": "*"}]}
    _done(worlds, 1, model | start, tmp_path / "new")
    ours = {k: v for k, v in read_tensors(path_of(tmp_path / "new", 0)).items() if not k.startswith("optimizer.")}
    assert ours.keys() == {key for key in fresh if not key.startswith("optimizer.")}
    for name, tensor in ours.items():
        if fresh[name] == 0:
            assert tensor.unique().tolist() == [1.0 if "norm" in name else 0.0], name
        else:
            assert float(tensor.std()) == pytest.approx(fresh[name], rel=6 / math.sqrt(2 * tensor.numel())), name
            assert abs(tensor.mean()) < 5 * fresh[name] / math.sqrt(tensor.numel()), name


def test_a_passed_on_initialisation_is_not_guessed():
    config = config_from_dict(
        Run(1, 1, Case.of(1, {"model.megatron": {"embedding_init_method_std": 1.0}}).settings, ()).config.model_dump(),
        "",
    )
    block = TensorShard.whole("output_layer.weight", torch.zeros(3, 4))
    with pytest.raises(UserError, match=r"model\.megatron\.embedding_init_method_std changes"):
        new_rows.init_new(block, block.key, config.model, seed=1)


def test_a_new_zero_centred_norm_multiplies_by_one():
    model = Case.of(1, {"model.zero_centered_norm": True}).config.model
    block = TensorShard.whole("decoder.final_layernorm.weight", torch.ones(4))
    new_rows.init_new(block, block.key, model, seed=1)
    assert not block.data.any()
