"""`evaluation:` of a run: figures at several layouts are those of the export, and an interrupted one continues."""

import json
import shutil

import pytest
import tiny_run
import torch
import yaml

from megamm.config.suite import load_suite
from megamm.convert.io.export_folder import open_export
from megamm.evaluation.suite import run_suite
from megamm.inference.export_subject import ExportSubject
from megamm.observability import metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_run.make_data(folder)
    source = str(folder / "shards" / "drawn")
    tasks = [
        {"metrics": ["loss", "bits_per_byte"], "source": source},
        {"metrics": "pair_gain", "source": source, "n": 20},
        {"metrics": "recall", "source": source, "direction": "text_to_image", "candidates": 4, "k": [1]},
    ]
    (folder / "suite.yaml").write_text(yaml.safe_dump({"n": 40, "tasks": tasks}))
    return folder


def _train(config, *overrides, processes=2):
    done = tiny_run.megamm("train", config, *overrides, "resilience.max_restarts=0", "--nproc", processes)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    return done


def _config(data, run, steps):
    evaluation = {"suite": str(data / "suite.yaml"), "every": 2}
    return tiny_run.write_config(data, run, train={"steps": steps, "stop_after": 2}, evaluation=evaluation)


def _of_export(data, run, tmp_path):
    done = tiny_run.megamm("convert", "export", run, tmp_path / "export", "--no-gate")
    assert done.returncode == 0, done.stderr
    subject = ExportSubject(open_export(tmp_path / "export", torch.device("cpu")))
    return run_suite(subject, load_suite(data / "suite.yaml"), tmp_path / "report", "-")["figures"]


ALL = pytest.mark.everything


@pytest.mark.parametrize(
    ("layout", "processes"),
    [
        pytest.param(["parallel.tensor=2"], 2, id="tp2"),
        pytest.param(["parallel.pipeline=2"], 4, id="pp2xdp2", marks=ALL),
        pytest.param([], 2, id="dp2", marks=ALL),
        pytest.param(["parallel.context=2"], 2, id="cp2", marks=ALL),
    ],
)
def test_figures_are_those_of_the_export(data, tmp_path, layout, processes):
    run = tmp_path / "run"
    _train(_config(data, run, 4), *layout, processes=processes)
    found = json.loads((run / "evaluations" / "step_00000002" / "eval.json").read_text())
    wanted = _of_export(data, run, tmp_path)
    assert found["step"] == 2 and len(found["figures"]) == len(wanted) == 7
    for ours, theirs in zip(found["figures"], wanted, strict=True):
        assert (ours["metric"], ours["n"], ours.get("direction")) == (
            theirs["metric"],
            theirs["n"],
            theirs.get("direction"),
        )
        assert ours["value"] == pytest.approx(theirs["value"], rel=1e-4, abs=1e-5), ours["metric"]
    line = next(line for line in metrics.read_lines(run) if "eval/bits_per_byte/drawn" in line)
    assert line["eval/bits_per_byte/drawn"] == next(
        f["value"] for f in found["figures"] if f["metric"] == "bits_per_byte"
    )
    assert line["evaluation_seconds"] > 0


def test_an_interrupted_evaluation_continues(data, tmp_path):
    run = tmp_path / "run"
    config = _config(data, run, 4)
    _train(config, processes=1)
    report = run / "evaluations" / "step_00000002"
    wanted = (report / "eval.json").read_bytes()
    # As a kill leaves it: without the last figures and one chunk, and without a checkpoint of this step.
    (report / "eval.json").unlink()
    (lost,) = (report / "items" / "02-recall-text_to_image").glob("00001.jsonl")
    lost.unlink()
    kept = {path: path.stat().st_mtime_ns for path in (report / "items").rglob("*.jsonl")}
    shutil.rmtree(run / "checkpoints")
    _train(config, processes=1)
    assert (report / "eval.json").read_bytes() == wanted
    assert lost.is_file() and all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_suite_that_generates_is_refused_before_the_first_step(data, tmp_path):
    task = {"metrics": "psnr", "source": str(data / "shards" / "drawn"), "direction": "text_to_image"}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"tasks": [task]}))
    evaluation = {"suite": str(tmp_path / "suite.yaml"), "every": 2}
    config = tiny_run.write_config(data, tmp_path / "run", evaluation=evaluation)
    done = tiny_run.megamm("train", config, "resilience.max_restarts=0")
    assert done.returncode == 2 and "generates" in done.stderr, done.stderr
