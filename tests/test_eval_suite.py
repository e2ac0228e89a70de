"""Suites: numbers equal a plain computation, a killed suite continues, reports, the card, and what users get wrong."""

import csv
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import yaml
from tiny_export import make_export, open_tiny
from typer.testing import CliRunner

from megamm.cli import app
from megamm.common.errors import UserError
from megamm.config.suite import SamplingConfig, load_suite
from megamm.convert.extras.card import write_digests
from megamm.evaluation import losses, report
from megamm.evaluation.made_task import MadeTask
from megamm.evaluation.suite import open_tasks, read_records, run_suite
from megamm.evaluation.tasks import recall_at
from megamm.inference.export_subject import ExportSubject
from megamm.shards.folder import ShardFolder

SUITE = {
    "seed": 3,
    "n": 10,
    "sampling": {"temperature": 0.7, "max_tokens": 8},
    "human": {"pairs": 4},
    "tasks": [
        {"metrics": ["loss", "perplexity", "bits_per_byte"], "source": "shards/shapes"},
        {"metrics": "pair_gain", "source": "shards/shapes", "n": 12},
        {"metrics": "recall", "source": "shards/shapes", "direction": "text_to_image", "candidates": 5, "k": [1, 2]},
        {"metrics": ["bleu", "chrf", "wer"], "source": "shards/shapes", "direction": "image_to_text"},
        {
            "metrics": ["psnr", "ssim", "fid", "kid"],
            "source": "shards/shapes",
            "direction": "text_to_image",
            "extractor": "pixels",
            "n": 20,
        },
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    write_digests(make_export(folder, heldout=20))
    (folder / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    return folder


@pytest.fixture(scope="module")
def subject(folder):
    return ExportSubject(open_tiny(folder / "export"))


@pytest.fixture(scope="module")
def done(folder):
    """Return the output of the command, and the figures by metric and direction."""
    words = ["eval", str(folder / "export"), "--suite", str(folder / "suite.yaml"), "--to", str(folder / "report")]
    done = CliRunner().invoke(app, [*words, "--device", "cpu"])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output, json.loads((folder / "report" / "eval.json").read_text())


def _figure(result, metric, direction=None):
    return next(f for f in result["figures"] if f["metric"] == metric and f.get("direction") == direction)


def test_every_metric_has_a_figure_with_its_number_of_samples(done):
    output, result = done
    found = {(f["metric"], f.get("direction")): f["n"] for f in result["figures"]}
    assert found == {
        ("loss text", None): 10,
        ("loss image", None): 10,
        ("perplexity text", None): 10,
        ("perplexity image", None): 10,
        ("bits_per_byte", None): 10,
        ("pair_gain", "text_to_image"): 12,
        ("pair_gain", "image_to_text"): 12,
        ("recall@1", "text_to_image"): 10,
        ("recall@2", "text_to_image"): 10,
        ("recall@1", "image_to_text"): 10,
        ("recall@2", "image_to_text"): 10,
        ("bleu", "image_to_text"): 10,
        ("chrf", "image_to_text"): 10,
        ("wer", "image_to_text"): 10,
        ("psnr", "text_to_image"): 20,
        ("ssim", "text_to_image"): 20,
        ("fid@pixels", "text_to_image"): 20,
        ("kid@pixels", "text_to_image"): 20,
    }
    assert "fid@pixels text_to_image shapes: not measured" in output and "needs at least 1536 samples" in output
    assert all(f["standard_error"] is not None for f in result["figures"] if f["metric"] != "fid@pixels")
    assert all(f["seed"] == 3 for f in result["figures"])
    assert result["step"] == 0 and "torch" in result["versions"]
    assert _figure(result, "bleu", "image_to_text")["versions"].keys() == {"sacrebleu"}


def test_losses_are_those_of_the_plain_evaluation(subject, folder, done):
    suite = load_suite(folder / "suite.yaml")
    everything = suite.model_copy(update={"tasks": suite.tasks[:2], "n": 20, "human": None})
    everything = everything.model_copy(update={"tasks": [t.model_copy(update={"n": 20}) for t in everything.tasks]})
    result = run_suite(subject, everything, folder / "losses", "-")
    wanted = losses.evaluate(subject, [folder / "shards" / "shapes"], seed=3)
    for name in ("text", "image"):
        assert _figure(result, f"loss {name}")["value"] == pytest.approx(wanted.loss[name], rel=1e-6)
        assert _figure(result, f"perplexity {name}")["value"] == pytest.approx(math.exp(wanted.loss[name]), rel=1e-5)
    for direction, gain in wanted.pair_gain.items():
        found = _figure(result, "pair_gain", direction)
        assert found["value"] == pytest.approx(gain.mean, rel=1e-5)
        assert found["standard_error"] == pytest.approx(gain.standard_error, rel=1e-5)
    captions = folder / "shards" / "shapes" / "heldout" / "text"
    size = 2 * sum(len(ShardFolder(captions).read(i)) for i in range(20))  # both orders
    bits = wanted.loss["text"] * wanted.tokens["text"] / math.log(2) / size
    assert _figure(result, "bits_per_byte")["value"] == pytest.approx(bits, rel=1e-6)


def test_recall_ranks_by_the_gain_in_probability(subject, folder, done):
    suite = load_suite(folder / "suite.yaml")
    name, task = open_tasks(subject, suite, folder / "report")[2]
    record = read_records(folder / "report", name, task)[0]
    group = task.groups[0]
    # By hand: the loss of every image after every caption, and without one.
    for i, j in ((0, 0), (1, 3)):
        joint = losses.Document("", (group[i].parts[0], group[j].parts[1]))
        alone = losses.Document("", (group[j].parts[1],))
        sums = []
        for document in (joint, alone):
            ((_, _, loss_S),) = subject.token_losses([document])
            sums.append(-loss_S[losses.last_part(document)].sum(dtype=np.float64))
        assert record["scores"][0][i][j] == pytest.approx(sums[0] - sums[1], abs=1e-3)


def test_recall_counts_ties_and_equal_contents():
    scores = np.array([[1.0, 2.0, 0.0], [0.5, 0.5, 0.5], [3.0, 0.0, 3.0]])
    assert recall_at(1, scores, [0, 1, 2]) == [0.0, pytest.approx(1 / 3), 0.5]
    assert recall_at(2, scores, [0, 1, 2]) == [1.0, pytest.approx(2 / 3), 1.0]
    assert recall_at(1, scores, [0, 0, 2])[0] == 1.0  # the better one is the same answer


def test_a_complete_report_is_not_computed_again(folder, done):
    before = {path: path.stat().st_mtime_ns for path in (folder / "report" / "items").rglob("*.jsonl")}
    words = ["eval", str(folder / "export"), "--suite", str(folder / "suite.yaml"), "--to", str(folder / "report")]
    again = CliRunner().invoke(app, [*words, "--device", "cpu"])
    assert again.exit_code == 0 and again.output == done[0]
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "report" / "items").rglob("*.jsonl")}


def test_the_report_has_samples_and_blind_pairs(folder, done):
    text = (folder / "report" / "report.html").read_text()
    assert text.count("data:image/png;base64,") >= 2 * report.SHOWN and "psnr" in text and "pair_gain" in text
    human = folder / "report" / "human"
    with (human / "key.csv").open() as file:
        key = list(csv.DictReader(file))
    assert len(key) == 8 and {row["left"] for row in key} == {"model", "real"}
    assert "model" not in (human / "pairs.html").read_text()
    assert [row["pair"] for row in key] == [
        line.split(",")[0] for line in (human / "pairs.csv").read_text().split()[1:]
    ]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "report" / "tensorboard"))
    board.Reload()
    (scalar,) = board.Scalars("eval/psnr/shapes/text_to_image")
    assert scalar.value == pytest.approx(_figure(done[1], "psnr", "text_to_image")["value"])


def test_pairs_against_another_report(subject, folder, done, tmp_path):
    suite = load_suite(folder / "suite.yaml")
    human = suite.human.model_copy(update={"against": folder / "report"})
    suite = suite.model_copy(update={"tasks": suite.tasks[-1:], "human": human})
    with pytest.raises(UserError, match="no samples of 00-psnr"):
        result = run_suite(subject, suite, tmp_path / "other", "-")
        report.write(tmp_path / "other", "m", open_tasks(subject, suite, tmp_path / "other"), suite, result)


def test_the_model_card_takes_the_figures(folder, done):
    words = ["convert", "card", str(folder / "export"), str(folder / "report" / "eval.json")]
    made = CliRunner().invoke(app, words)
    assert made.exit_code == 0, (made.output, made.exception)
    card = (folder / "export" / "README.md").read_text()
    psnr = _figure(done[1], "psnr", "text_to_image")
    assert f"| psnr | text_to_image | shapes | {psnr['value']:.4g} | {psnr['standard_error']:.4g} | 20 |" in card
    from huggingface_hub import ModelCard

    named = {r.metric_name: r.metric_value for r in ModelCard(card).data.eval_results}
    assert named["psnr text_to_image"] == psnr["value"] and "fid@pixels text_to_image" not in named
    test_a_complete_report_is_not_computed_again(folder, done)  # the card does not count as another model


KILLED = """
import os, signal, sys
from pathlib import Path
from tiny_export import open_tiny
from megamm.config.suite import load_suite
from megamm.evaluation import suite as module
from megamm.inference.export_subject import ExportSubject
from megamm.shards.folder import ShardFolder
folder, left = Path(sys.argv[1]), int(sys.argv[2])
new_file = module.new_file
def counting(path):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return new_file(path)
module.new_file = counting
module.run_suite(ExportSubject(open_tiny(folder / "export")), load_suite(folder / "suite.yaml"), Path(sys.argv[3]), "-")
"""


def test_a_killed_suite_continues_and_gives_the_same_numbers(subject, folder, tmp_path):
    suite = load_suite(folder / "suite.yaml")
    path = os.pathsep.join(["tests/lib", os.environ.get("PYTHONPATH", "")])
    # Killed at its fifth file, in the middle of the tasks, and again two files later.
    for files in (5, 2):
        words = [sys.executable, "-c", KILLED, str(folder), str(files), str(tmp_path / "report")]
        killed = subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "report" / "items").rglob("*.jsonl")}
    assert len(before) >= 4 and not (tmp_path / "report" / "eval.json").exists()
    result = run_suite(subject, suite, tmp_path / "report", "-")
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())  # nothing twice
    whole = run_suite(subject, suite, tmp_path / "whole", "-")
    assert result == whole
    for name, task in open_tasks(subject, suite, tmp_path / "report"):
        records = read_records(tmp_path / "report", name, task)
        assert records == read_records(tmp_path / "whole", name, task) and len(records) == task.count


def test_bad_media_and_texts_are_left_out_with_a_reason(subject, folder, tmp_path):
    """A subject that makes NaN, nothing, or pictures of another size."""

    class Bad(ExportSubject):
        def generate(self, prompts, target, sampling, first_seed):
            if target == "text":
                return ["" for _ in prompts]
            return [np.zeros((8 if i % 2 else 32,) * 2 + (3,), dtype=np.uint8) for i in range(len(prompts))]

    suite = load_suite(folder / "suite.yaml").model_copy(update={"human": None})
    tasks = [suite.tasks[3].model_copy(update={"n": 1}), suite.tasks[4].model_copy(update={"metrics": ["psnr"]})]
    result = run_suite(Bad(subject.export), suite.model_copy(update={"tasks": tasks}), tmp_path / "report", "-")
    assert _figure(result, "wer", "image_to_text")["value"] == 1.0
    assert _figure(result, "bleu", "image_to_text")["standard_error"] is None  # one sample
    psnr = _figure(result, "psnr", "text_to_image")
    assert psnr["n"] == 10 and psnr["left_out"] == {"pictures of different sizes": 10}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metrics": ["bleu", "psnr"]}, "psnr is not a metric of text"),
        ({"metrics": ["loss", "bleu"]}, "loss is computed from other data"),
        ({"metrics": ["nonsense"]}, "nonsense is not a metric of text"),
        ({"direction": "image_to_smell"}, "no direction 'image_to_smell'"),
        ({"direction": "audio_to_text"}, "the model has no modality 'audio'"),
        ({"source": "shards/none"}, "the source has no image"),
        ({"source": None}, "has no source"),
        ({"metrics": ["caption_similarity"]}, "caption_similarity needs a network"),
        ({"metrics": ["caption_similarity"], "weights": "shards"}, "transformers cannot load it"),
        ({"metrics": ["inception_score"], "direction": "text_to_image", "extractor": "pixels"}, "with classes"),
        ({"metrics": ["fid"], "direction": "text_to_image", "extractor": "nowhere"}, "no such extractor"),
        ({"metrics": ["recall"], "direction": "text+image_to_text"}, "recall ranks one modality"),
        ({"n": 0}, "tasks.0.n"),
        ({"metrics": ["bleu", "bleu"]}, "listed twice"),
        ({"what": 1}, "tasks.0.what"),
    ],
)
def test_what_is_wrong_in_a_suite_is_named(subject, folder, change, said):
    task = {"metrics": ["bleu"], "source": "shards/shapes", "direction": "image_to_text"} | change
    (folder / "wrong.yaml").write_text(yaml.safe_dump({"tasks": [task]}))
    with pytest.raises(UserError, match=said):
        tasks = open_tasks(subject, load_suite(folder / "wrong.yaml"), folder)
        assert all(isinstance(task, MadeTask) and task.network for _, task in tasks)


def test_a_report_belongs_to_one_suite_and_model(subject, folder, done, tmp_path):
    suite = load_suite(folder / "suite.yaml")
    with pytest.raises(UserError, match="belongs to another suite or model"):
        run_suite(subject, suite, folder / "report", "another")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a report"):
        run_suite(subject, suite, tmp_path, "-")
    for options in (["--suite", "s.yaml"], ["--suite", "s.yaml", "--to", "x", "shards"], ["--to", "x"], []):
        done = CliRunner().invoke(app, ["eval", "export", *options])
        assert isinstance(done.exception, UserError), options


def test_sampling_of_a_task_comes_before_that_of_the_suite(subject, folder):
    suite = load_suite(folder / "suite.yaml")
    own = SamplingConfig(temperature=0)
    tasks = [suite.tasks[3], suite.tasks[3].model_copy(update={"sampling": own})]
    opened = open_tasks(subject, suite.model_copy(update={"tasks": tasks}), folder)
    assert [task.sampling for _, task in opened] == [suite.sampling, own]
