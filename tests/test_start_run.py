"""Runs that start from others as a user starts them: a text model adds images and continues; Qwen3 is the backbone.

Logits are compared with those of the source's own model, and of transformers.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoint_folders import generator_states, save_now
from run_folders import TRAIN, read_tensors, step_folder
from tiny_run import make_data, megamm, numbers, write_config

from megamm import checkpoint
from megamm.common import events
from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.common.sample import IGNORE_LABEL, Batch, Row
from megamm.config import RunConfig, load_config
from megamm.convert.export import export
from megamm.convert.families.config import family_for, to_config
from megamm.data.pipeline.run_data import RunData, open_run_data
from megamm.engine.build import build_engine
from megamm.init_from.initialize import _check_function, check, init_from
from megamm.mcore import process_groups
from megamm.parity.worlds import WorldFailure

SHORT = TRAIN | {"eval_every": 0, "stop_after": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


def _config(data: Path, name: str, *, text_alone: bool = False, **sections: dict[str, Any]) -> Path:
    path = write_config(data, data / name, train=SHORT, **sections)
    if text_alone:
        values = yaml.safe_load(path.read_text())
        del values["tokenizers"]["visual"]
        path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def text_run(data) -> Path:
    done = megamm("train", _config(data, "text", text_alone=True), "resilience.max_restarts=0")
    assert done.returncode == 0, done.stderr
    return data / "text"


def test_a_text_run_grows_by_images_and_trains_on(data, text_run):
    config, run = _config(data, "grown", init_from={"checkpoint": str(text_run)}), data / "grown"
    done = megamm("train", config, "parallel.tensor=2", "train.stop_after=3", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert f"started from {step_folder(text_run, 4)}\n" in done.stdout
    said = [line.partition("vocabulary: ")[2] for line in done.stderr.splitlines() if "megamm.init_from" in line]
    assert said[:3] == ["text: 300 kept", "control: 32 kept", "visual: 25 new (not in the source)"]
    lines, before = numbers(run), numbers(text_run)
    assert (lines[0]["step"], lines[0]["lr"]) == (1, before[0]["lr"])
    assert lines[0]["loss/text"] < before[0]["loss/text"] - 0.1
    assert lines[2]["loss/image"] < lines[0]["loss/image"]
    # From here on the run is resumed, without reading the source.
    done = megamm("train", config, f"init_from.checkpoint={data / 'nowhere'}", "resilience.max_restarts=0")
    assert done.returncode == 0 and "resumed" in done.stdout and "started from" not in done.stdout
    kinds = [event["kind"] for event in events.read(run)]
    assert [kind for kind in kinds if kind in ("started_from", "resumed")] == ["started_from", "resumed"]
    again = megamm("train", config, f"output={text_run}", "resilience.max_restarts=0")
    assert again.returncode == 2
    assert f"or another `output` with init_from.checkpoint={step_folder(text_run, 4)}" in again.stderr


def _logits(engine: Any, rows: list[Any]) -> list[torch.Tensor]:
    """Return logits of each row, `[S, V]`."""
    model = engine.chunks[0].eval()
    with torch.no_grad():
        batches = [Batch.stack([row]) for row in rows]
        return [model.module(batch.input_ids, None, batch.packed_seq_metadata)[0] for batch in batches]


def _built(path: Path) -> tuple[RunConfig, RunData, Any]:
    config = load_config(path)
    opened = open_run_data(config)
    process_groups.destroy()
    groups = process_groups.build(config.parallel, config.train.seed)
    return config, opened, build_engine(config, opened.vocabulary.size, groups, choose("cpu"))


def _started(path: Path) -> tuple[RunData, Any]:
    config, opened, engine = _built(path)
    assert config.init_from is not None
    init_from(config, opened.vocabulary, engine, config.init_from)
    return opened, engine


def text_logits(paths: tuple[Path, Path, Path]) -> tuple[float, float]:
    """On held-out text, compare before and after: largest difference of old ids' logits, and of the cross entropy."""
    text, run, grown = paths
    if not (run.parent / "export").exists():
        export(run, run.parent / "export")
    _, opened, source = _built(text)
    source.load(step_folder(run, 4) / "tensors", 4, with_optimizer=False)
    rows, ids = opened.heldout_rows, opened.vocabulary.size
    theirs = _logits(source, rows)
    ours = [logits[:, :ids] for logits in _logits(_started(grown)[1], rows)]
    assert len(rows) and max(float(t.abs().max()) for t in theirs) > 0.1
    labels = [torch.from_numpy(row.labels) for row in rows]
    off = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    losses = zip(*(map(torch.nn.functional.cross_entropy, side, labels) for side in (ours, theirs)), strict=True)
    return off, max(float((a - b).abs()) for a, b in losses)


@pytest.mark.parametrize(
    "place", ["{run}", "{run}/checkpoints/step_00000004", "file://{run}/checkpoints", "{data}/export"]
)
def test_text_is_read_as_by_the_source(data, text_run, worlds, place, tmp_path):
    """The text is read equally from every form of source."""
    start = {"checkpoint": place.format(run=text_run, data=data)}
    grown = _config(data, tmp_path.name, init_from=start)
    done = worlds.run(1, text_logits, (data / "text.yaml", text_run, grown), timeout=60)
    assert not isinstance(done, WorldFailure), done.lines()
    ((off, loss_off),) = done
    assert off <= 1e-6 and loss_off <= 1e-6, done
    assert {path.name for path in (data / tmp_path.name).iterdir()} == {"events.jsonl"}, "a copy was left behind"


def _qwen3(folder: Path, data: Path, config: RunConfig) -> Path:
    """Write a model as from a hub: random weights in two shards, more rows than tokenizer ids, and the tokenizer."""
    from transformers import AutoModelForCausalLM

    theirs = to_config(family_for(config.model), config.model, 320, 128, {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(theirs, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size="60KB")
    shutil.copy(data / "tokenizers" / "text" / "tokenizer.json", folder)
    return folder


def _row(ids: np.ndarray) -> Row:
    """Return a row of ids alone, without the marks of a document."""
    empty, zeros = np.full_like(ids, IGNORE_LABEL), np.zeros_like(ids)
    return Row(ids, empty, zeros.astype(np.float32), zeros, np.tile(np.arange(len(ids)), (3, 1)), zeros, zeros - 1)


def qwen3_logits(paths: tuple[Path, Path]) -> tuple[float, float]:
    """Return, over text documents, the largest difference from transformers' logits, and the largest logit."""
    from transformers import AutoModelForCausalLM

    folder, path = paths
    opened, engine = _started(path)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    off, largest, ids = 0.0, 0.0, opened.vocabulary["text"].size
    for text in opened.modalities["text"].encode(["a red box", "the green fish and the black kite"]):
        (ours,) = _logits(engine, [_row(text)])
        with torch.no_grad():
            wanted = theirs(torch.from_numpy(text)[None]).logits[0]
        off = max(off, float((ours[:, :ids] - wanted[:, :ids]).abs().max()))
        largest = max(largest, float(wanted.abs().max()))
    return off, largest


def started_tensors(job: tuple[Path, Path]) -> None:
    """Start and save."""

    path, out = job
    config = load_config(path)
    _, engine = _started(path)
    state = checkpoint.TrainState(0, 0, 1, {}, [], config.model_dump(mode="json"), versions={})
    save_now(out, state, engine.blocks(), generator_states(), choose("cpu"))


MOE = {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 40}}


@pytest.mark.parametrize(
    "model",
    [
        pytest.param({}, id="dense", marks=pytest.mark.everything),
        pytest.param({"tie_embeddings": True}, id="tied", marks=pytest.mark.everything),
        pytest.param(MOE, id="moe", marks=pytest.mark.everything),
    ],
)
def test_qwen3_becomes_the_backbone_at_every_layout(data, worlds, tmp_path, model):
    """Read layer by layer from two shards; one rank has transformers' logits, other layouts have its bits."""
    layout = {"expert": 2, "pipeline": 2} if "moe" in model else {"tensor": 2, "pipeline": 2}
    folder = tmp_path / "hub"
    start = {"checkpoint": str(folder)}
    one = _config(data, f"one{tmp_path.name}", model=model, init_from=start)
    _qwen3(folder, data, load_config(one))
    assert len(list(folder.glob("*.safetensors"))) > 1
    done = worlds.run(1, qwen3_logits, (folder, one), timeout=60)
    assert not isinstance(done, WorldFailure), done.lines()
    ((off, largest),) = done
    assert largest > 0.1 and off <= 1e-5 * largest, done
    other = _config(data, f"other{tmp_path.name}", model=model, init_from=start, parallel=layout)
    for world, path in ((1, one), (4, other)):
        failed = worlds.run(world, started_tensors, (path, tmp_path / path.stem), timeout=60)
        assert not isinstance(failed, WorldFailure), failed.lines()
    ours, theirs = (read_tensors(step_folder(tmp_path / path.stem, 0)) for path in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name][: len(tensor)], tensor), name


LAYERS = {n: {"num_hidden_layers": n, "layer_types": ["full_attention"] * n} for n in (1, 3)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "cannot express attention_bias = True"),
        ({"hidden_act": "gelu"}, "cannot express hidden_act = gelu"),
        ({"model_type": "gpt_oss"}, "model_type gpt_oss is not supported"),
        ({"num_hidden_layers": 3}, "unreadable config: Class validation error"),
        (LAYERS[3], "the weights do not fit config.json: 'model.layers.2.input_layernorm.weight'"),
        (LAYERS[1], "tensors are unknown to the backbone, the first is model.layers.1."),
        ({"rms_norm_eps": 1e-5}, "model.norm_eps is 1e-05 in the source, but 1e-06 in the config"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_folder_that_does_not_fit_is_refused_before_any_process_starts(data, tmp_path, changes, message):
    config = load_config(_config(data, "refused", init_from={"checkpoint": str(tmp_path / "hub")}))
    folder = _qwen3(tmp_path / "hub", data, config)
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        check(config, open_run_data(config).vocabulary)
    assert message in str(caught.value)


def test_what_changes_the_function_of_weights_is_admitted_by_name(data, tmp_path, caplog):
    start = {"checkpoint": str(tmp_path / "hub"), "model_changes": ["rope_base"]}
    config = load_config(_config(data, "longer", model={"rope_base": 5e6}, init_from=start))
    _qwen3(tmp_path / "hub", data, load_config(_config(data, "before")))
    with caplog.at_level("INFO", logger="megamm"):
        origin = check(config, open_run_data(config).vocabulary)
    assert origin is not None and origin["config"]["model_type"] == "qwen3"
    assert "model.rope_base: 1000000.0 in the source, now 5000000.0: allowed" in caplog.text


def test_a_source_older_than_a_key_had_what_is_its_default(data):
    config = load_config(_config(data, "newer"))
    older = config.model.model_dump(mode="json")
    del older["zero_centered_norm"], older["rope_scaling"]["beta_fast"]
    _check_function(older, config, [])
    gemma = load_config(_config(data, "gemma", model={"zero_centered_norm": True}))
    with pytest.raises(UserError, match=r"model\.zero_centered_norm is False in the source, but True in the config"):
        _check_function(older, gemma, [])
