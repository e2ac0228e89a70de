"""The dry run: a consistent simulated world, injected faults are found, and the examples fit 16,384 ranks."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tiny_run import ROOT, environment, make_data, megamm, write_config

from megamm import cli
from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.config import RunConfig, config_from_dict, load_config
from megamm.mcore import process_groups
from megamm.model import layout
from megamm.model.flops import parameter_count
from megamm.train import dry_run

VOCABULARY = 301
MOE = {"moe": {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 48}}
FULL_MOE = {"moe": MOE["moe"] | {"shared_ffn_hidden_size": 32, "score": "sigmoid", "bias_update_rate": 1e-3}}
MLA = {
    "num_query_groups": 8,
    "mla": {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
}
SP2 = {"tensor": 2, "sequence": True}

# name -> (world size, parallel, model)
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "tp2-cp2-pp2-dp2": (16, {"tensor": 2, "context": 2, "pipeline": 2}, {}),
    "tp4-pp2x2-tied": (32, {"tensor": 4, "pipeline": 2, "virtual_pipeline": 2}, {"tie_embeddings": True}),
    "pp3-uneven": (6, {"pipeline": 3, "layers_per_chunk": [4, 3, 1]}, {}),
    "pp2-mtp": (8, {"tensor": 2, "pipeline": 2}, {"mtp": {"num_layers": 2}}),
    "ep4-dp2": (8, {"expert": 4}, MOE),
    "tp2-moe": (4, SP2, MOE),
    "tp2-pp2-mla": (8, {"tensor": 2, "pipeline": 2}, MLA),
    "tp2-ep2-etp2": (16, SP2 | {"pipeline": 2, "expert": 2, "expert_tensor": 2}, MOE),
    "tp2-ep2-etp4": (32, SP2 | {"expert": 2, "expert_tensor": 4}, MOE),
    "tp2-cp2-ep4-pp2x2": (32, SP2 | {"context": 2, "expert": 4, "pipeline": 2, "virtual_pipeline": 2}, FULL_MOE),
}


def _config(parallel: dict[str, Any], model: dict[str, Any], **train: Any) -> RunConfig:
    shape = {"num_layers": 8, "hidden_size": 64, "ffn_hidden_size": 96, "head_dim": 8}
    heads = {"num_attention_heads": 8, "num_query_groups": 4}
    return config_from_dict(
        {
            "output": "unused",
            "device": "cpu",
            "model": shape | heads | model,
            "parallel": parallel,
            "data": {"seq_length": 64, "sources": [{"path": "unused"}]},
            "tokenizers": {},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 2, "global_batch_size": 64, "micro_batch_size": 1} | train,
        },
        "test",
    )


@pytest.fixture(autouse=True)
def no_job() -> Iterator[None]:
    """Leave a job that another test of this process has joined, as the dry run needs its own process."""
    from megamm.mcore import cpu

    cpu.install()
    if torch.distributed.is_initialized():
        process_groups.destroy()
        process_groups.stop()
    yield


@cache
def _built(name: str) -> tuple[RunConfig, dry_run.Grid, Any, dict[int, Any]]:
    """Return config, grid, world and every rank's model of a layout."""
    from megamm.mcore.fake_world import FakeWorld

    world_size, parallel, model = LAYOUTS[name]
    config = _config(parallel, model)
    layout.check(config, world_size)
    world = FakeWorld(config, VOCABULARY, world_size)
    return config, dry_run.Grid(config, world_size), world, {r: world.rank(r) for r in range(world_size)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_world_is_consistent(name: str) -> None:
    """All ranks are built, not only those that the dry run builds, so its choice is verified."""
    config, grid, world, models = _built(name)
    assert dry_run.groups_fault(list(world.mesh.kinds.values()), grid) is None
    assert dry_run.stages_fault(models, grid, layout.layers_per_chunk(config, VOCABULARY)) is None
    assert dry_run.shards_fault(models, grid) is None
    assert dry_run.size_fault(config, VOCABULARY, models) is None
    assert dry_run.tokens_fault(config) is None
    assert [grid.coordinates(r) for r in range(grid.world_size)] == [
        models[r].coordinates for r in range(grid.world_size)
    ]


def test_no_tensor_has_storage_and_one_rank_holds_the_model() -> None:
    from megamm.mcore.fake_world import FakeWorld

    config, _, _, models = _built("one")
    assert models[0].parameters == parameter_count(config.model, VOCABULARY)
    big = config.model_copy(update={"model": config.model.model_copy(update={"hidden_size": 2**16})})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert FakeWorld(big, VOCABULARY, 1).rank(0).parameters * 4 > 2**30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18, "KiB: a quarter of one GiB"


def test_parameters_of_a_rank_by_hand() -> None:
    """Half of each layer's matrices, all of its norms; a stage's layers; a table on the first and the last stage."""
    from megamm.mcore.fake_world import FakeWorld

    config = _config({"tensor": 2, "pipeline": 2, "layers_per_chunk": [5, 3]}, {})
    layer = 64 * 8 * (2 * 8 + 2 * 4) // 2 + 3 * 64 * 96 // 2 + 2 * 64 + 2 * 8
    table = 151 * 64
    world = FakeWorld(config, VOCABULARY, 8)
    counts = [world.rank(rank).parameters for rank in (0, 3, 4, 7)]
    assert counts == [5 * layer + table] * 2 + [3 * layer + table + 64] * 2


# --- injected faults must be found and named ---


def _swap_owner(piece: Any) -> Any:
    return piece._replace(is_owner=not piece.is_owner)


def _move(piece: Any) -> Any:
    """Move it to its neighbour's place: a gap at the old place, two owners at the new one."""
    return piece._replace(offset=(piece.offset[0] ^ 1, *piece.offset[1:]))


TAMPERED = {
    "owned by no rank or by two": (_swap_owner, "is owned by"),
    "in the wrong place": (_move, "is owned by"),
    "too small": (lambda p: p._replace(extent=(*p.extent[:-1], p.extent[-1] - 1)), "a checkpoint would have"),
    "reduced over too few ranks": (lambda p: p._replace(copies=p.copies // 2), "reduced over"),
    "another whole": (lambda p: p._replace(shape=(p.shape[0] + 1, *p.shape[1:])), "has shape"),
    "outside": (lambda p: p._replace(offset=(*p.offset[:-1], p.shape[-1])), "does not contain"),
}


def _tampered(model: Any, tensor: str, tamper: Any) -> Any:
    """Return the rank's model with the first shard of the tensor changed."""
    at, piece = next((i, p) for i, p in enumerate(model.boxes) if p.key.endswith(tensor))
    return replace(model, boxes=[*model.boxes[:at], tamper(piece), *model.boxes[at + 1 :]])


@pytest.mark.parametrize("tensor", ["self_attention.linear_proj.weight", "router.weight", "experts.linear_fc2.weight"])
@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_shard_is_found(tensor: str, how: str) -> None:
    """The shard of rank 0 is changed, and of its replicas, which have the same coordinates and never own it."""
    _, grid, _, models = _built("tp2-ep2-etp2")
    tamper, said = TAMPERED[how]
    built = {r: models[r] for r in grid.built_ranks()}
    assert dry_run.shards_fault(built, grid) is None
    replicas = [
        r for r in built if grid.first_with(r, "experts" in tensor) == 0 and (r == 0 or tamper is not _swap_owner)
    ]
    found = dry_run.shards_fault(built | {r: _tampered(models[r], tensor, tamper) for r in replicas}, grid)
    assert found and said in found, found
    assert tensor in found or how == "too small"


def test_a_rank_that_holds_something_else_than_its_equals_is_found() -> None:
    _, grid, _, models = _built("tp2-ep2-etp2")
    for tamper in (_swap_owner, _move):
        wrong = models | {2: _tampered(models[2], "linear_qkv.weight", tamper)}
        assert "rank 2 has [" in str(dry_run.shards_fault(wrong, grid))


@pytest.mark.parametrize("tensor", ["self_attention.linear_proj.weight", "router.weight", "experts.linear_fc2.weight"])
def test_a_wrong_number_of_replicas_is_found(tensor: str) -> None:
    """All ranks agree on the number, but it is not the number of ranks that hold the tensor."""
    _, grid, _, models = _built("tp2-ep2-etp2")
    copies = next(p.copies for p in models[0].boxes if p.key.endswith(tensor))
    for wrong in (copies // 2, copies * 2):
        changed = {
            r: replace(m, boxes=[p._replace(copies=wrong) if p.key.endswith(tensor) else p for p in m.boxes])
            for r, m in models.items()
        }
        assert f"is held by {copies} ranks, not {wrong}" in str(dry_run.shards_fault(changed, grid))


def test_experts_marked_as_dense_weights_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients would silently be summed over the wrong ranks."""
    from megamm.mcore import backbone

    build = backbone.build_chunks

    def mark(*arguments: Any) -> Any:
        chunks = build(*arguments)
        for name, parameter in chunks[0].named_parameters():
            if ".experts." in name:
                parameter.allreduce = True
        return chunks

    config = _config({"expert": 4}, MOE)
    assert dry_run.describe(config, VOCABULARY, 8)[1] is None
    monkeypatch.setattr(backbone, "build_chunks", mark)
    found = dry_run.describe(config, VOCABULARY, 8)[1]
    assert found and found.startswith("tensor decoder.layers.mlp.experts"), found


def test_a_missing_layer_and_a_wrong_order_are_found() -> None:
    config, grid, _, models = _built("tp2-cp2-ep4-pp2x2")
    split = layout.layers_per_chunk(config, VOCABULARY)
    for layers in (models[0].layers[::-1], [models[0].layers[0][:-1], models[0].layers[1]]):
        assert "builds the layers" in str(dry_run.stages_fault({0: replace(models[0], layers=layers)}, grid, split))
    wrong = replace(models[0], coordinates=models[1].coordinates)
    assert "rank 0 is (1, 0, 0, 0, 1)" in str(dry_run.stages_fault({0: wrong}, grid, split))
    lost = {r: replace(m, boxes=[p for p in m.boxes if "router" not in p.key]) for r, m in models.items()}
    assert "parameters, but a checkpoint would have" in str(dry_run.shards_fault(lost, grid))
    assert "the ranks hold a model of" in str(dry_run.size_fault(config, VOCABULARY + 2, models))


@pytest.mark.parametrize("name", ["tp2-cp2-pp2-dp2", "tp2-ep2-etp4"])
def test_groups_that_mix_coordinates_are_found(name: str) -> None:
    _, grid, world, _ = _built(name)
    for family in world.mesh.kinds.values():
        if 1 in family.ranks.shape:
            continue
        exchanged, doubled = family.ranks.copy(), family.ranks.copy()
        exchanged[0, 0], exchanged[1, 0] = family.ranks[1, 0], family.ranks[0, 0]
        doubled[0, 0] = doubled[0, 1]
        assert "mix ranks" in str(dry_run.groups_fault([replace(family, ranks=exchanged)], grid))
        assert "every rank once" in str(dry_run.groups_fault([replace(family, ranks=doubled)], grid))
        halves = family.ranks.reshape(len(family.ranks) * 2, -1)
        assert dry_run.groups_fault([replace(family, ranks=halves)], grid)


def test_tokens_on_two_ranks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from megamm.mcore import context

    config = _built("tp2-cp2-pp2-dp2")[0]
    monkeypatch.setattr(context, "local_index", lambda length, rank, size, device: torch.arange(length // size))
    assert "tokens of a row" in str(dry_run.tokens_fault(config))


@pytest.mark.parametrize(("precision", "moments"), [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_bytes_of_a_parameter_are_those_of_the_real_optimizer(precision: str, moments: str) -> None:
    from megamm.engine.native import NativeEngine

    config, device = _config({}, {}, precision=precision), choose("cpu")
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"moments": moments})})
    process_groups.start(device)
    engine = NativeEngine(config, VOCABULARY, process_groups.build(config.parallel, 1), device)
    parameters = list(engine.chunks[0].parameters())
    weights = {p.data_ptr() for p in parameters}
    state: list[torch.Tensor] = []
    for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        inner = part.optimizer
        main = [p for group in inner.param_groups for p in group["params"] if precision == "bf16"]
        state += [*main, *(t for s in inner.state.values() for key, t in s.items() if key != "step")]
    assert not weights & {t.data_ptr() for t in state}
    count = sum(p.numel() for p in parameters)
    held = [parameters[0].element_size(), parameters[0].main_grad.element_size()]
    assert (*held, sum(t.numel() * t.element_size() for t in state) / count) == config.bytes_per_parameter
    process_groups.destroy()
    process_groups.stop()


# --- the command ---


@pytest.mark.everything
@pytest.mark.parametrize("example", ["dense_8b", "moe_200b"])
def test_examples_at_16384_ranks(example: str) -> None:
    """It takes at most 60 s of processor time and 8 GiB, without data, a GPU or a network."""
    command = [sys.executable, "-m", "megamm", "train", str(ROOT / "examples" / f"{example}.yaml"), "--dry-run"]
    command += ["--world-size", "16384", "--vocabulary-size", "200000", "--rank", "16383"]
    # In a separate process, whose resource use the kernel reports.
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    printed, errors = process.stdout.read(), process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, errors
    assert used.ru_utime + used.ru_stime < 60
    assert used.ru_maxrss < 8 * 2**20
    assert "world size 16384 = tensor 4 x" in printed
    assert "each element owned once over tensor x pipeline x expert, by" in printed
    assert "rank 16383: tensor 3, context" in printed
    layers = "11-18 29-36" if example == "dense_8b" else "22-24 46-48 71-72 94"
    assert layers in printed


@pytest.mark.parametrize(
    ("example", "world_size", "replica"),
    [("dense_8b", 16, 16), ("dense_8b_8gpus", 8, 2), ("moe_30b", 16, 16), ("moe_200b", 128, 128)],
)
def test_examples_at_their_smallest_world(example: str, world_size: int, replica: int) -> None:
    from megamm.config import load_config

    config = load_config(ROOT / "examples" / f"{example}.yaml")
    layout.check(config, world_size)
    p = config.parallel
    assert max(p.tensor * p.context, p.expert * p.expert_tensor) * p.pipeline == replica


def test_dry_run_of_a_config_with_data(tmp_path: Any) -> None:
    make_data(tmp_path)
    config = write_config(tmp_path, tmp_path / "run", parallel={"tensor": 2})
    # apex and a GPU, which only the job's machines have, are not checked.
    fused = "model.megatron.gradient_accumulation_fusion=true"
    done = megamm("train", config, "train.seed=9", fused, "--nproc", 4, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "seed: 9" in done.stdout
    assert "world size 4 = tensor 2 x pipeline 1 x data 2 x context 1\n" in done.stdout
    assert "256 tokens in 2 microbatches" in done.stdout
    assert not (tmp_path / "run").exists()
    # The start is checked as before a run, without reading the source's tensors.
    start = load_config(config, [f"init_from.checkpoint={tmp_path / 'nowhere'}"])
    with pytest.raises(UserError, match="nowhere"):
        dry_run.report(start, 4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dry-run", "--world-size", "16"], "or add --vocabulary-size to the dry run"),
        (["--dry-run", "--world-size", "24", "--vocabulary-size", "9"], "world size = 24 is not divisible"),
        (["--dry-run", "--world-size", "16", "--vocabulary-size", "9", "--rank", "16"], "give --rank 0 to 15"),
        (["--world-size", "16"], "add --dry-run"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["megamm", "train", str(ROOT / "examples" / "dense_8b.yaml"), *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and said in printed.err, printed.err


def test_an_inconsistent_layout_ends_with_1(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(dry_run, "shards_fault", lambda *_: "tensor x is owned by 2 ranks, not 1")
    path = str(ROOT / "examples" / "cpu_tiny.yaml")
    monkeypatch.setattr(sys, "argv", ["megamm", "train", path, "--dry-run", "--vocabulary-size", "99"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    assert caught.value.code == 1
    assert "inconsistent: tensor x is owned by 2 ranks, not 1" in printed.err
    assert "consistent:" not in printed.out
