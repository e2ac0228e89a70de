"""`export: required`: a run that cannot be exported is refused before its first step; the dry run names the class.

The right answers are those of the export itself (the same model or tokenizer is given to it), of the tokenizers library
(which id a new token gets), and of transformers (the logits of an export without its prediction modules).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_folders import step_folder
from tiny_run import make_data, megamm, write_config
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from typer.testing import CliRunner

from megamm import checkpoint, cli
from megamm.common.errors import UserError
from megamm.config import RunConfig, load_config
from megamm.convert import exportable
from megamm.convert.export import export
from megamm.convert.import_folder import import_
from megamm.convert.io.export_folder import export_tokenizer
from megamm.convert.verify import weights
from megamm.model.vocabulary import Range, Vocabulary

MOE = "num_experts: 4, ffn_hidden_size: 16"
TINY = Path(__file__).parents[1] / "examples" / "cpu_tiny.yaml"


def train(*arguments: str) -> tuple[int, str, str]:
    """Exit code, output and the message of `megamm train`."""
    done = CliRunner().invoke(cli.app, ["train", *arguments])
    return done.exit_code, done.output, str(done.exception or "")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.rope_axes=3", "Qwen3ForCausalLM cannot express model.rope_axes"),
        (f"model.moe={{{MOE}, shared_ffn_hidden_size: 32}}", "cannot express model.moe.shared_ffn_hidden_size"),
        (f"model.moe={{{MOE}, score: sigmoid}}", "cannot express model.moe.score"),
        (f"model.moe={{{MOE}, dense_layers: 1}}", "cannot express model.moe.dense_layers"),
        ("model.megatron={add_bias_linear: true}", "cannot express model.megatron.add_bias_linear"),
    ],
)
def test_a_model_without_a_class_is_refused_unless_export_is_off(override: str, named: str) -> None:
    with pytest.raises(UserError) as refused:
        exportable.check(load_config(TINY, [override]))
    message = str(refused.value)
    assert named in message and "set export: off" in message and "\n" not in message
    line = exportable.check(load_config(TINY, [override, "export=off"]))
    assert line.startswith("export: not possible: ") and named in line


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], "export: Qwen3ForCausalLM of transformers"),
        (["model.qk_norm=false"], "export: LlamaForCausalLM of transformers"),
        ([f"model.moe={{{MOE}}}"], "export: Qwen3MoeForCausalLM of transformers"),
        (
            ["model.mtp.num_layers=1"],
            "export: Qwen3ForCausalLM of transformers, without the modules of multi-token prediction",
        ),
        (["model.megatron={gradient_accumulation_fusion: true}"], "export: Qwen3ForCausalLM of transformers"),
    ],
)
def test_the_class_is_named(overrides: list[str], line: str) -> None:
    assert exportable.check(load_config(TINY, overrides)) == line


def test_the_dry_run_names_the_class_or_refuses() -> None:
    done = megamm("train", TINY, "--dry-run", "--vocabulary-size", 99)
    assert done.returncode == 0 and "\nexport: Qwen3ForCausalLM of transformers\n" in done.stdout, done.stderr
    done = megamm("train", TINY, "model.rope_axes=3", "--dry-run", "--vocabulary-size", 99)
    assert done.returncode == 2 and "set export: off" in done.stderr


@pytest.mark.parametrize("value", ["off", "false", "no"])
def test_off_is_read_as_yaml_reads_it(value: str) -> None:
    assert load_config(TINY, [f"export={value}"]).export == "off"
    with pytest.raises(UserError, match="export"):
        load_config(TINY, ["export=maybe"])


def with_tokenizer(folder: Path, ids: dict[str, int]) -> tuple[RunConfig, Vocabulary]:
    """A run with this text tokenizer, and its vocabulary with ten reserved control ids behind it."""
    folder.mkdir()
    Tokenizer(WordLevel(ids, unk_token="a")).save(str(folder / "tokenizer.json"))
    size = max(ids.values()) + 1
    ranges = [Range("text", 0, size, "x", ("text",)), Range("control", size, 64, "control", ())]
    return load_config(TINY, [f"tokenizers={{text: {folder}}}"]), Vocabulary(tuple(ranges))


def test_a_tokenizer_with_a_hole_in_its_ids_is_refused(tmp_path: Path) -> None:
    config, vocabulary = with_tokenizer(tmp_path / "text", {"a": 0, "b": 1, "c": 3})
    with pytest.raises(UserError, match=r"no token with id 2 \(1 of 4 ids\).*set export: off"):
        exportable.check(config, vocabulary)
    off = config.model_copy(update={"export": "off"})
    assert exportable.check(off, vocabulary).startswith(
        "export: not possible: the text tokenizer has no token with id 2"
    )
    # The library counts tokens: the next one gets id 3, which is taken, so that no export could follow.
    tokenizer = Tokenizer.from_file(str(tmp_path / "text" / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<new>")])
    assert tokenizer.token_to_id("<new>") != vocabulary["control"].start
    with pytest.raises(UserError, match="does not match"):
        export_tokenizer(tmp_path / "text", vocabulary, tmp_path)


def test_a_tokenizer_that_has_the_name_of_a_control_id_is_refused(tmp_path: Path) -> None:
    config, vocabulary = with_tokenizer(tmp_path / "text", {"a": 0, "<|image_start|>": 1, "c": 2})
    with pytest.raises(UserError, match=r"has a token <\|image_start\|>, which is the name of a control"):
        exportable.check(config, vocabulary)
    with pytest.raises(AssertionError):
        export_tokenizer(tmp_path / "text", vocabulary, tmp_path)
    good, vocabulary = with_tokenizer(tmp_path / "good", {"a": 0, "b": 1, "c": 2})
    assert exportable.check(good, vocabulary) == "export: Qwen3ForCausalLM of transformers"
    export_tokenizer(tmp_path / "good", vocabulary, tmp_path)


def test_a_run_is_refused_before_processes_start_and_continues_once_it_has_checkpoints(tmp_path: Path) -> None:
    make_data(tmp_path)
    sections: dict[str, Any] = {"train": {"steps": 4, "stop_after": 2}, "model": {"rope_axes": 3}}
    path = write_config(tmp_path, tmp_path / "run", **sections)
    _, _, message = train(str(path), "--nproc", "2")
    assert "Qwen3ForCausalLM cannot express model.rope_axes" in message and "\n" not in message
    assert not (tmp_path / "run").exists()
    step = step_folder(tmp_path / "run", 2)
    step.mkdir(parents=True)
    assert "not possible" in exportable.check(load_config(path, []))


def test_prediction_modules_are_left_out_of_an_export(tmp_path: Path) -> None:
    """The gate of the export compares its logits with those of the run; the imported run has no such modules."""
    make_data(tmp_path)
    sections: dict[str, Any] = {"train": {"steps": 4, "stop_after": 1}, "model": {"mtp": {"num_layers": 1}}}
    done = megamm("train", write_config(tmp_path, tmp_path / "run", **sections))
    assert done.returncode == 0, done.stderr
    assert weights.verify(tmp_path / "run").problems == []
    out = export(tmp_path / "run", tmp_path / "out", nproc=1)
    names = json.loads((out / "config.json").read_text())
    assert names["architectures"] == ["Qwen3ForCausalLM"]
    shutil.copytree(out, tmp_path / "moved")
    step = import_(tmp_path / "moved", tmp_path / "again", nproc=1)
    assert checkpoint.read_state(step).config["model"]["mtp"]["num_layers"] == 0
