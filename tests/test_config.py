"""Configs: overrides, one-line errors that suggest the nearest key, rejection before any process starts."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megamm import cli
from megamm.common.errors import UserError
from megamm.config import (
    RecomputeConfig,
    RunConfig,
    apply_overrides,
    config_from_dict,
    load,
    load_config,
    recompute_override,
    reference,
)
from megamm.config.suite import load_suite
from megamm.model import layout

EXAMPLE = Path(__file__).parents[1] / "examples" / "cpu_tiny.yaml"
MLA = ["model.mla={kv_lora_rank: 8, qk_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8}"]
MOE = ["model.moe.num_experts=4", "model.moe.ffn_hidden_size=64"]
FP8 = ["train.precision=fp8"]


def _config(*overrides: str) -> RunConfig:
    return load_config(EXAMPLE, overrides)


def test_every_example_is_valid():
    for path in EXAMPLE.parent.glob("*.yaml"):
        (load_suite if path.name == "suite.yaml" else load_config)(path)


def test_the_reference_is_written_from_the_schema():
    page = (EXAMPLE.parents[1] / "docs" / "config.md").read_text()
    assert page == reference.page(), "run: python -m megamm.config.reference > docs/config.md"
    assert (
        "| `data.seq_length`" not in page
        and "| `seq_length` | integer ≥ 8 | required | Tokens of a packed row." in page
    )


def test_every_key_is_described_in_a_sentence():
    lines = [line for line in reference.page().splitlines() if line.startswith("| `")]
    assert len(lines) > 120
    for line in lines:
        description = line.rstrip("| ").split(" | ")[-1]
        assert description.endswith(".") and description != "None.", line


def test_overrides_reach_nested_keys_and_keep_types():
    config = _config("optimizer.lr=3e-4", "train.steps=7", "parallel.sequence=true", "loss_weights.image=0.5", *MOE)
    assert (config.optimizer.lr, config.train.steps, config.parallel.sequence) == (3e-4, 7, True)
    assert config.loss_weights["image"] == 0.5 and config.model.moe.num_experts == 4


def test_a_resolved_config_reads_back_equal():
    config = _config("train.steps=7", *MOE)
    again = config_from_dict(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))), where="here")
    assert again == config


EARLIER = {
    "start_from": {"checkpoint": "runs/a", "rules": [{"new": "mtp.*"}]},
    "checkpoint.durable": "file:///copies",
    "train.global_batch": 12,
    "train.micro_batch": 3,
    "parallel.context_exchange": "alltoall",
    "deepspeed.offload": True,
    "resilience.rendezvous.join": 7.0,
    "resilience.rendezvous.last_call": 8.0,
    "resilience.rendezvous.keep_alive": 9.0,
}
"""A value, other than the default, for every key that had another name."""


def _at(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data[part]
    return data


def _put(data: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    *parents, last = key.split(".")
    section = data
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    return data


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Return the lines logged so far; a key is reported once per process."""
    monkeypatch.setattr(load, "_logged", set())
    return lambda: [record.getMessage() for record in caplog.records if record.name == "megamm.config.load"]


def test_every_renamed_key_is_listed():
    keys = set(load._all_keys(RunConfig, ""))
    assert EARLIER.keys() == load.RENAMED.keys()
    assert keys.isdisjoint(load.RENAMED) and keys.issuperset(load.RENAMED.values())


def test_recomputation_of_attention_is_none_today(lines, tmp_path):
    earlier = config_from_dict(yaml.safe_load(EXAMPLE.read_text()), "new").model_dump(mode="json")
    earlier["train"]["recompute"] = "selective"
    assert config_from_dict(earlier, "state.json").train.recompute == "none"
    assert lines() == ["state.json: train.recompute=selective is now none"]
    assert _config("train.recompute=selective").train.recompute == "none"


def test_recomputed_modules_replace_a_word_of_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(EXAMPLE.read_text())
    for word in ("train.recompute=full", "train.recompute={modules: [mlp]}"):
        found = load_config(path, [word, "train.recompute.modules=[norms,activation]"]).train.recompute
        assert found == RecomputeConfig(modules=["norms", "activation"])
        assert load_config(path, [recompute_override(found)]).train.recompute == found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.recompute=attention", "train.recompute: unknown value 'attention'; set it to none, full or {modules"),
        ("train.recompute=[mlp]", "train.recompute: unknown value ['mlp']"),
        ("train.recompute.modules=[mpl]", "train.recompute.modules.0: Input should be 'norms', 'activation', 'mlp' or"),
        ("train.recompute.modules=[]", "train.recompute.modules: List should have at least 1 item"),
        ("train.recompute.layers=[1]", "unknown key train.recompute.layers"),
    ],
)
def test_wrong_recomputation_is_one_line(override, message):
    with pytest.raises(UserError) as caught:
        _config(override)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("old", EARLIER)
def test_an_earlier_key_sets_the_new_one(old, lines, tmp_path):
    new, value, path = load.RENAMED[old], EARLIER[old], tmp_path / "run.yaml"
    example = yaml.safe_load(EXAMPLE.read_text())
    earlier = config_from_dict(example, "new").model_dump(mode="json")
    for key in (old, new):  # remove today's key: a stored config of the earlier version lacks it
        *parents, last = key.split(".")
        _at(earlier, ".".join(parents)).pop(last, None) if parents else earlier.pop(last, None)
    expected = config_from_dict(_put(copy.deepcopy(earlier), new, value), "new")
    assert not lines()

    assert config_from_dict(_put(earlier, old, value), "state.json") == expected
    inner = [f".{key}" for key in value] if isinstance(value, dict) else [""]
    assert lines() == [f"state.json: the key {old}{key} is now {new}{key}" for key in inner]
    assert _at(earlier, old) == value, "the caller's mapping is as it was"
    assert config_from_dict(earlier, "state.json") == expected and len(lines()) == len(inner), "reported once"

    path.write_text(yaml.safe_dump(earlier))
    assert load_config(path) == expected
    overrides = [f"{old}{key}={json.dumps(_at(EARLIER[old], key[1:]) if key else value)}" for key in inner]
    path.write_text(yaml.safe_dump({key: inside for key, inside in earlier.items() if key != old}))
    assert load_config(path, overrides) == expected


@pytest.mark.parametrize("old", EARLIER)
def test_a_key_under_both_names_is_one_error(old):
    new, data = load.RENAMED[old], yaml.safe_load(EXAMPLE.read_text())
    with pytest.raises(UserError, match=f"^{old} and {new} are both given .run.yaml.; remove {old}"):
        config_from_dict(_put(_put(data, old, EARLIER[old]), new, EARLIER[old]), "run.yaml")


def test_overrides_win_over_a_file_with_earlier_keys(lines):
    data = {"train": {"global_batch": 4, "micro_batch": 1}, "start_from": {}}
    apply_overrides(data, ["train.global_batch_size=8", "train.micro_batch=2", "train.micro_batch_size=4"], "run.yaml")
    assert data == {"train": {"global_batch_size": 8, "micro_batch_size": 4}, "init_from": {}}
    apply_overrides(data, ["start_from.checkpoint=a", "init_from.rules=[]"])
    assert data["init_from"] == {"checkpoint": "a", "rules": []}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stpes=3"], "unknown key train.stpes (EXAMPLE); the nearest valid key is train.steps"),
        (["trian.steps=3"], "unknown key trian (EXAMPLE); the nearest valid key is train"),
        (["model.moe.topk=3"], "the nearest valid key is model.moe.top_k"),
        (["data.sources=[{pth: x}]"], "the nearest valid key is data.sources.path"),
        (["train.steps=many"], "train.steps: Input should be a valid integer"),
        (["train.precision=fp4"], "train.precision: Input should be 'fp32', 'bf16' or 'fp8'"),
        (["train.steps=0"], "train.steps: Input should be greater than or equal to 1"),
        (["metrics.profile={steps: [13, 10]}"], "metrics.profile.steps [13, 10] end before they begin"),
        (["metrics.profile={steps: [13]}"], "metrics.profile.steps: List should have at least 2 items"),
        (["train.steps"], "override 'train.steps' is not key=value"),
        (["train.steps.x=1"], "steps is not a section"),
    ],
)
def test_wrong_keys_and_values_are_one_line(overrides, message):
    with pytest.raises(UserError) as caught:
        _config(*overrides)
    assert message.replace("EXAMPLE", str(EXAMPLE)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("world", "overrides", "message"),
    [
        (3, ["parallel.tensor=2"], "world size = 3 is not divisible by tensor x pipeline x context = 2"),
        (1, ["parallel.pipeline=2"], "world size = 1 is not divisible"),
        (8, ["parallel.tensor=8"], "model.num_attention_heads = 4 is not divisible by parallel.tensor = 8"),
        (
            4,
            ["parallel.tensor=4", "model.num_attention_heads=12", "model.num_query_groups=6"],
            "model.num_query_groups = 6 is not divisible by parallel.tensor = 4",
        ),
        (
            12,
            ["parallel.tensor=12", "model.num_attention_heads=12", "model.num_query_groups=1", "model.head_dim=8"],
            "rows of keys and values, 2 x num_query_groups x head_dim = 16 is not divisible by parallel.tensor = 12",
        ),
        (5, ["parallel.pipeline=5"], "model.num_layers = 4 is less than the 5 chunks of the pipeline"),
        (2, ["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline needs parallel.pipeline > 1"),
        (2, ["parallel.pipeline=2", "parallel.layers_per_chunk=[4]"], "does not split 4 layers into 2 chunks"),
        (
            2,
            [
                "parallel.pipeline=2",
                "parallel.virtual_pipeline=2",
                "train.global_batch_size=9",
                "train.micro_batch_size=3",
            ],
            "microbatches of a step = 3 is not divisible by parallel.pipeline = 2",
        ),
        (2, ["parallel.tensor=2", "parallel.sequence=true", "data.seq_length=255"], "data.seq_length = 255"),
        (2, ["parallel.sequence=true"], "parallel.sequence needs parallel.tensor > 1"),
        (2, ["parallel.context=2", "data.seq_length=254"], "data.seq_length = 254 is not divisible by parts of a row"),
        (4, ["parallel.context=4", "parallel.tensor=2", "parallel.cp_comm_type=alltoall"], "world size = 4"),
        (
            8,
            ["parallel.context=4", "parallel.tensor=2", "parallel.cp_comm_type=alltoall"],
            "attention heads of a tensor rank = 2 is not divisible by parallel.context (alltoall) = 4",
        ),
        (2, ["parallel.expert=2"], "parallel.expert > 1 needs a model with experts"),
        (
            3,
            ["parallel.expert=3", "train.micro_batch_size=1", "train.global_batch_size=9", *MOE],
            "model.moe.num_experts = 4",
        ),
        (
            1,
            ["parallel.expert=4", *MOE],
            "data x context x tensor = 1 is not divisible by parallel.expert x expert_tensor = 4",
        ),
        (1, ["model.moe.num_experts=4"], "model.moe.ffn_hidden_size is not set"),
        (1, [*MOE, "model.moe.top_k=5"], "model.moe.top_k > model.moe.num_experts"),
        (1, [*MOE, "model.moe.top_k=1"], "model.moe.top_k = 1: a softmax over one score gives the router no gradient"),
        (1, [*MOE, "model.moe.bias_update_rate=0.1"], "model.moe.bias_update_rate needs independent scores"),
        (1, ["model.rope_axes=3", "model.head_dim=4"], "model.rope_axes = 3 with model.head_dim = 4"),
        (
            1,
            [*FP8, "model.ffn_hidden_size=72"],
            "model.ffn_hidden_size is 72, and FP8 products need a multiple of 16",
        ),
        (
            1,
            [*FP8, *MOE, "model.moe.ffn_hidden_size=40"],
            "a rank's part of model.moe.ffn_hidden_size is 40, and FP8 products need a multiple of 16",
        ),
        (
            1,
            [*FP8, *MLA, "model.num_query_groups=4"],
            "model.mla.kv_lora_rank is 8, and FP8 products need a multiple of 16",
        ),
        (1, [*FP8, "train.fp8.first_layers_bf16=3"], "leave none of 4 layers in FP8"),
        (1, [*FP8, "engine=deepspeed"], "engine=deepspeed does not support train.precision=fp8"),
        (1, ["model.mla.kv_lora_rank=8"], "model.mla.qk_head_dim is not set"),
        (
            2,
            ["model.mtp.num_layers=1", "model.hidden_size=33", "parallel.tensor=2"],
            "model.hidden_size with multi-token prediction = 33 is not divisible by parallel.tensor = 2",
        ),
        (
            2,
            [*MLA, "model.mla.kv_lora_rank=7", "parallel.tensor=2"],
            "model.mla.kv_lora_rank + qk_rope_head_dim = 15 is not divisible by parallel.tensor = 2",
        ),
        (
            2,
            [*MLA, "model.mla.q_lora_rank=9", "parallel.tensor=2"],
            "model.mla.q_lora_rank = 9 is not divisible by parallel.tensor = 2",
        ),
        (2, ["engine=deepspeed", "parallel.tensor=2"], "engine=deepspeed supports only data parallelism"),
        (2, [*MOE, "parallel.tensor=2"], "MoE with parallel.tensor > 1 needs sequence parallel"),
        (3, ["train.micro_batch_size=1"], "is not divisible by micro_batch_size x data parallel = 3"),
        (1, ["optimizer.warmup_steps=100000"], "optimizer.warmup_steps=100000 must be less than"),
        (1, ["optimizer.schedule=wsd"], "optimizer.schedule=wsd needs decay_steps"),
        (1, ["optimizer.min_lr=1"], "optimizer.min_lr > optimizer.lr"),
        (1, ["train.recompute.modules=[moe]"], "train.recompute: moe is in no layer of the model"),
        (1, [*MOE, "train.recompute.modules=[norms, mlp]"], "train.recompute: mlp is in no layer of the model"),
        (1, ["train.recompute.modules=[activation]", "model.activation=gelu_tanh"], "activation is for SwiGLU"),
        (1, ["train.recompute.modules=[norms]", "engine=deepspeed"], "engine=deepspeed recomputes whole layers only"),
        (1, ["optimizer.moments=bf16", "optimizer.beta2=0.999"], "optimizer.moments=bf16 with beta2 = 0.999"),
        (
            1,
            ["modalities.image.attention=span", "engine=deepspeed"],
            "engine=deepspeed does not support modalities.image",
        ),
        (1, ["optimizer.offload_moments=true", "engine=deepspeed"], "does not support optimizer.moments and offload_m"),
    ],
)
def test_impossible_layouts_are_refused(world, overrides, message):
    with pytest.raises(UserError) as caught:
        layout.check(_config(*overrides), world)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "error: no such config file (nowhere.yaml)"),
        (["train", str(EXAMPLE), "train.stpes=3"], "error: unknown key train.stpes"),
        (["train", str(EXAMPLE), "parallel.tensor=2"], "error: world size = 1 is not divisible"),
        (["train", str(EXAMPLE), "tokenizers={text: nowhere}"], "error: "),
    ],
)
def test_the_command_prints_one_line_and_exits_with_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["megamm", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.err.startswith(message) and printed.err.count("\n") == 1 and not printed.out
