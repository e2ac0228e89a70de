"""Verification of conversions: equal models pass; every kind of damage is found, and its layer is named.

Tests damage a tensor, config.json or the mapping directly, one layer at a time.
"""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from native_folders import convert, edit, make_native, make_pair
from safetensors.torch import load_file, save_file
from tiny_export import make_export

from megamm import checkpoint
from megamm.checkpoint import whole_tensors
from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.convert.families.mapping import TensorRule
from megamm.convert.io.export_folder import write_digests
from megamm.convert.verify import equivalence, logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_pair("llama3", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def pair(llama, tmp_path):
    """Return a run, and a copy of the folder to damage."""
    return llama[0], Path(shutil.copytree(llama[1], tmp_path / "hf"))


def with_one_changed(tensor: torch.Tensor) -> torch.Tensor:
    tensor[1, 2] += 0.5
    return tensor


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3-moe", "mixtral", "deepseek-v3"])
def test_the_same_model_passes(name, tmp_path):
    """Odd sizes, experts, shards, tables with padding, two ranks' files."""
    run, folder = make_pair(name, tmp_path)
    assert len(list(folder.glob("*.safetensors"))) > 1
    report = equivalence.verify_equal(run, folder)
    assert report.passed, report.problems
    assert report.lines[-1].startswith("logits: differ by at most ") and "4 rows" in report.lines[-1]


def test_it_says_what_it_has_compared(llama):
    report = equivalence.verify_equal(*llama)
    assert report.passed, report.problems
    count = 3 * 9 + 3
    assert report.lines[:-1] == [
        "digests: the checkpoint matches its manifest",
        "digests: the folder has no SHA256SUMS",
        f"names and shapes: {count} tensors are on both sides",
        f"tensors: {count} compared, bit for bit",
    ]
    assert float(report.lines[-1].removeprefix("logits: differ by at most ").split()[0]) <= 5e-6


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_changed_tensor_is_found_twice_and_its_layer_named(pair, layer):
    run, folder = pair
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    edit(folder, name, with_one_changed)
    report = equivalence.verify_equal(run, folder)
    said = f"{name}: 1 of {48 * 56:,} differ, by 0.5 at most"
    tensors, logits = report.problems
    assert tensors == f"1 tensors differ, the first layer that differs is layer {layer}: {said}"
    assert f"the first stage that differs is layer {layer}, by " in logits and logits.endswith(f": {said}")


@pytest.mark.parametrize(("name", "where"), [("model.embed_tokens.weight", "embedding"), ("lm_head.weight", "logits")])
def test_a_changed_table_is_found(pair, name, where):
    edit(pair[1], name, lambda tensor: tensor + (torch.arange(len(tensor)) % 2)[:, None])
    tensors, logits = equivalence.verify_equal(*pair).problems
    assert (
        "the first is outside of the layers: " + name in tensors
        and f"the first stage that differs is {where}" in logits
    )


def test_the_smallest_bit_of_a_norm_is_found(pair):
    edit(pair[1], "model.layers.2.input_layernorm.weight", lambda t: torch.nextafter(t, torch.full_like(t, 9.0)))
    (problem,) = equivalence.verify_equal(*pair, logits=False).problems
    assert "layer 2: model.layers.2.input_layernorm.weight: 48 of 48 differ" in problem


def test_another_config_is_found_by_its_key_and_by_logits(pair):
    """The tensors are identical; only the computation differs."""
    values = json.loads((pair[1] / "config.json").read_text())
    values["rope_parameters"]["rope_theta"] = 5e4
    (pair[1] / "config.json").write_text(json.dumps(values))
    config, logits = equivalence.verify_equal(*pair).problems
    assert config == "config.json has rope_base = 50000.0, but the checkpoint has 10000.0"
    assert "the first stage that differs is layer 0" in logits and "its tensors are equal" in logits


def test_heads_of_another_size_are_found_though_every_shape_fits(pair):
    values = json.loads((pair[1] / "config.json").read_text())
    values |= {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20}
    (pair[1] / "config.json").write_text(json.dumps(values))
    *config, logits = equivalence.verify_equal(*pair).problems
    keys = {"num_attention_heads = 3", "num_query_groups = 1", "head_dim = 20"}
    assert keys == {line.removeprefix("config.json has ").split(",")[0] for line in config}
    assert "the first stage that differs is layer 0" in logits


def test_a_mapping_that_is_wrong_both_ways_is_found_by_logits_alone(pair, tmp_path, monkeypatch):
    """Gate and up are swapped both on import and on export: bit-identical tensors, but a different model."""
    join, cut = TensorRule.join, TensorRule.cut
    monkeypatch.setattr(TensorRule, "join", lambda e, t, m: join(e, t[::-1] if e.kind == "rows" else t, m))
    monkeypatch.setattr(TensorRule, "cut", lambda e, t, m: cut(e, t, m)[:: -1 if e.kind == "rows" else 1])
    make_native(pair[1], tmp_path / "run")
    assert equivalence.verify_equal(tmp_path / "run", pair[1], logits=False).passed
    (problem,) = equivalence.verify_equal(tmp_path / "run", pair[1]).problems
    assert "the first stage that differs is layer 0" in problem and "its tensors are equal" in problem


@pytest.mark.parametrize("fault", ["a document is cut in two", "attention crosses documents"])
def test_packing_that_leaks_is_found(llama, monkeypatch, fault):
    plain = logits.Batch.packed_seq_metadata.fget

    def packed_seq_metadata(batch):
        found = plain(batch).clone()
        if fault == "a document is cut in two":
            found[:, 0, 7:] += 1000 * (found[:, 0, 7:] >= 0)
        else:
            found[:, 0] = found[:, 0].clamp(max=0)
        return found

    monkeypatch.setattr(logits.Batch, "packed_seq_metadata", property(packed_seq_metadata))
    report = equivalence.verify_equal(*llama)
    assert not report.passed, report.lines


def test_the_index_is_parsed_once_for_all_tensors(llama, monkeypatch):
    """Parsing the index takes longer than comparing some of the tensors."""
    parsed, plain = [], checkpoint.index.check_index
    monkeypatch.setattr(checkpoint.index, "check_index", lambda folder: parsed.append(folder) or plain(folder))
    monkeypatch.setattr(whole_tensors, "BATCH_BYTES", 1)
    assert equivalence.verify_equal(*llama, logits=False).passed and len(parsed) == 1
    (step,) = (llama[0] / "checkpoints").glob("step_*")
    assert not list(whole_tensors.differences(step, step, whole_tensors.described(step))) and len(parsed) == 4


def die(_sides, _names) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_several_processes_find_what_one_finds(pair, monkeypatch):
    """Each process gets two or three tensors; a killed process is a one-line error."""
    run, folder = pair
    for layer in (2, 0):
        edit(folder, f"model.layers.{layer}.mlp.down_proj.weight", with_one_changed)
    alone = equivalence.verify_equal(run, folder, logits=False, nproc=1)
    assert len(alone.problems) == 1 and "layer 0" in alone.problems[0]
    monkeypatch.setattr(equivalence, "CHUNK_BYTES", 5000)
    together = equivalence.verify_equal(run, folder, logits=False, nproc=2)
    assert (together.lines, together.problems) == (alone.lines, alone.problems)
    monkeypatch.setattr(equivalence, "_compare_share", die)
    with pytest.raises(UserError, match="a process that compares tensors was killed"):
        equivalence.verify_equal(run, folder, logits=False, nproc=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_bits_are_compared_at_every_size_and_place(dtype):
    whole = torch.arange(100).to(dtype)
    for start in range(9):
        for stop in range(start + 1, 20):
            ours, theirs = whole[start:stop], whole.clone()[start:stop]
            assert whole_tensors.difference("same", ours, theirs) is None
            for at in (0, len(ours) - 1):
                theirs = whole.clone()[start:stop]
                theirs[at] += 1
                assert whole_tensors.difference("other", ours, theirs) == whole_tensors.Difference("other", 1, 1.0)


def test_rows_are_whole_packed_and_padded():
    rows = logits.random_rows(301, 48)
    documents = [int(row.segment.max()) + 1 for row in rows]
    assert documents[:2] == [1, 1] and min(documents[2:]) >= 3
    for row in rows:
        for document in range(int(row.segment.max()) + 1):
            places = (row.segment == document).nonzero()[0]
            assert places.tolist() == list(range(places[0], places[-1] + 1))
            assert row.position[0, places].tolist() == list(range(len(places)))
    assert [(row.segment < 0).sum() for row in rows] == [0, 0, 3, 3] and max(row.input_ids.max() for row in rows) > 280


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: None, "is missing"),
        (lambda t: t[:-1], r"has the shape \[47, 56\], the config requires \[48, 56\]"),
        (lambda t: t.to(torch.int32), "has the dtype int32"),
    ],
    ids=["missing", "shape", "integers"],
)
def test_names_and_shapes_are_complete(pair, change, message):
    edit(pair[1], "model.layers.1.mlp.down_proj.weight", change)
    report = equivalence.verify_equal(*pair)
    assert "model.layers.1.mlp.down_proj.weight " in report.problems[0]
    assert re.search(message, report.problems[0])
    assert report.lines[-1] == "logits: check skipped: the tensors of the two sides do not match"


def test_a_tensor_too_many_is_found(pair):
    first = sorted(pair[1].glob("model-*"))[0]
    save_file(load_file(first) | {"model.extra": torch.zeros(2)}, first)
    index = json.loads((pair[1] / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra"] = first.name
    (pair[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    assert equivalence.verify_equal(*pair).problems == ["model.extra is not a tensor of the model"]


@pytest.mark.parametrize(("ours", "theirs"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float16")])
def test_a_conversion_of_dtype_is_said_and_compared_after_it(llama, tmp_path, ours, theirs):
    """One side is the other, rounded; the logits of the rounded weights in float32 must be close."""
    folder = Path(shutil.copytree(llama[1], tmp_path / "hf"))
    for file in folder.glob("*.safetensors"):
        cast = {name: tensor.to(getattr(torch, theirs)) for name, tensor in load_file(file).items()}
        save_file(cast, file, metadata={"format": "pt"})
    make_native(llama[1], tmp_path / "run", lambda tensor: tensor.to(getattr(torch, ours)))
    report = equivalence.verify_equal(tmp_path / "run", folder)
    assert report.passed, report.problems
    assert f"tensors: 30 compared, the checkpoint's {ours} with the folder's {theirs}" in report.lines
    make_native(llama[1], tmp_path / "other", lambda tensor: (tensor * 1.01).to(getattr(torch, ours)))
    assert "30 tensors differ" in equivalence.verify_equal(tmp_path / "other", folder, logits=False).problems[0]


def test_digests_of_both_sides_are_checked(pair, tmp_path):
    write_digests(pair[1])
    assert "digests: the folder matches its SHA256SUMS" in equivalence.verify_equal(*pair, logits=False).lines
    (pair[1] / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"generation_config.json does not match SHA256SUMS"):
        equivalence.verify_equal(*pair, logits=False)
    run = Path(shutil.copytree(pair[0], tmp_path / "run"))
    shard = checkpoint.path_of(run, 0) / "tensors" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"__1_0.distcp is missing or truncated"):
        equivalence.verify_equal(run, pair[1], logits=False)


def test_not_a_number_is_reported_and_logits_left_out(pair, tmp_path, caplog):
    def broken(tensor):
        tensor[0] = float("nan")
        return tensor

    edit(pair[1], "model.layers.1.self_attn.o_proj.weight", broken)
    make_native(pair[1], tmp_path / "run")
    report = equivalence.verify_equal(tmp_path / "run", pair[1])
    assert report.passed and report.lines[-1].startswith("logits: check skipped: weights contain NaN")
    assert "tensors: 1 contain NaN or Inf, the first is model.layers.1.self_attn.o_proj.weight" in caplog.messages


def test_no_room_for_a_model_is_said_first(llama, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(UserError, match=r"the logit check needs 0.0 GB of memory, 0.0 GB are free.*--no-logits"):
        equivalence.check_memory_for_logits(
            equivalence.NativeTensors(equivalence.find_checkpoint(llama[0])).config, 301
        )


# --- the commands ---


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("export"), train=4, heldout=2)


def test_import_and_export_end_with_the_gate(export, tmp_path, caplog):
    caplog.set_level("INFO", "megamm.convert.verify.equivalence")
    assert convert("import", export, tmp_path / "run").exit_code == 0
    assert convert("export", tmp_path / "run", tmp_path / "out").exit_code == 0
    assert sum(line.startswith("logits: differ by at most ") for line in caplog.messages) == 2
    assert "digests: the folder matches its SHA256SUMS" in caplog.messages
    assert not list(tmp_path.glob(".tmp-*"))
    caplog.clear()
    assert convert("export", tmp_path / "run", tmp_path / "again", "--no-logits").exit_code == 0
    assert "logits: check skipped (--no-logits)" in caplog.messages
    for name, tensor in load_file(export / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], tensor)


def test_without_the_gate_nothing_is_compared_and_that_is_said(export, tmp_path, monkeypatch, caplog):
    """The output is written without comparison with its source; memory for models is not checked."""
    monkeypatch.setattr(equivalence, "check_memory_for_logits", lambda *_: pytest.fail("a model was built"))
    cut = TensorRule.cut
    with monkeypatch.context() as patch:
        patch.setattr(TensorRule, "cut", lambda e, t, m: cut(e, t, m)[:: -1 if e.kind == "rows" else 1])
        assert convert("import", export, tmp_path / "wrong", "--no-gate").exit_code == 0
    assert convert("export", tmp_path / "wrong", tmp_path / "out", "--no-gate").exit_code == 0
    assert (
        caplog.messages.count("verification skipped (--no-gate): the result has not been compared with its source") == 2
    )
    checkpoint.verify(checkpoint.newest(tmp_path / "wrong"))
    (problem,) = equivalence.verify_equal(tmp_path / "wrong", export, logits=False).problems
    assert "the first layer that differs is layer 0" in problem
    assert equivalence.verify_equal(tmp_path / "wrong", tmp_path / "out", logits=False).passed


def left_by(done) -> Path:
    """Return where the result is after a command whose verification has failed."""
    assert done.exit_code == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: verification failed: ")]
    return Path(line.rpartition("the result is kept in ")[2])


def test_a_failed_gate_names_nothing_and_deletes_nothing(export, tmp_path, monkeypatch):
    """Exit code 1 with the layer and the path of the complete result; the requested names stay free."""
    assert convert("import", export, tmp_path / "run").exit_code == 0
    before, cut, end = checkpoint.path_of(tmp_path / "run", 0), TensorRule.cut, equivalence.verify_result
    with monkeypatch.context() as patch:  # what was made is not what it is compared as
        patch.setattr(TensorRule, "cut", lambda e, t, m: cut(e, t, m)[:: -1 if e.kind == "rows" else 1])
        done = convert("import", export, tmp_path / "wrong")
    assert "differs is layer 0" in done.stderr
    assert checkpoint.newest(tmp_path / "wrong") is None
    left = left_by(done)
    checkpoint.verify(left if (left / "state.json").is_file() else checkpoint.path_of(left, 0))

    def damaged(native: Path, folder: Path, left: Path, *options) -> None:
        tensors = load_file(left / "model.safetensors")
        with_one_changed(tensors["model.layers.1.mlp.up_proj.weight"])
        save_file(tensors, left / "model.safetensors", metadata={"format": "pt"})
        write_digests(left)
        end(native, folder, left, *options)

    monkeypatch.setattr(equivalence, "verify_result", damaged)
    done = convert("export", tmp_path / "run", tmp_path / "out")
    assert "the first layer that differs is layer 1: model.layers.1.mlp.up_proj.weight: 1 of " in done.stderr
    assert not (tmp_path / "out").exists() and before.is_dir()
    assert (left_by(done) / "model.safetensors").is_file()


def test_the_held_out_rows_of_a_run_go_the_same_way(llama):
    """`megamm eval --run` and the verification compare by the same function."""
    place = choose("cpu")
    row = logits.random_rows(301, 48)[2]
    step = checkpoint.path_of(llama[0], 0)
    with logits.our_model(step, place) as ours, logits.their_model(llama[1], place) as theirs:
        found = logits.relative_differences([ours(row)], [theirs(row)])
    assert list(found) == ["embedding", "layer 0", "layer 1", "layer 2", "logits"] and max(found.values()) <= 1e-5
