"""lm-evaluation-harness on an export: numbers equal those of its own `hf` model on the same folder."""

import json
import math
from types import SimpleNamespace

import pytest
import yaml
from tiny_export import make_export, open_tiny

from megamm.common.errors import UserError
from megamm.config.suite import SuiteConfig, TaskConfig
from megamm.convert.extras.card import write_digests
from megamm.evaluation.suite import run_suite
from megamm.inference.export_subject import ExportSubject
from megamm.inference.harness import HarnessTask, harness_model, read_tasks

TEXTS = ["a red ellipse", "a blue rectangle and a green one", "black", "a red box " * 12]
PAIRS = [("a red", " ellipse"), ("a", " blue rectangle"), ("", "green"), ("a red ", "box"), ("x" * 90, " end")]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    # Log-likelihoods are sums of large logits otherwise, and float32 has seven digits.
    return make_export(tmp_path_factory.mktemp("harness"), heldout=4, init_std=0.05)


@pytest.fixture(scope="module")
def subject(export):
    write_digests(export)
    return ExportSubject(open_tiny(export))


def _theirs(export, **options):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(export), device="cpu", batch_size=2, max_length=64, dtype="float32", **options)


def _requests(arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def test_log_likelihoods_equal_the_hf_model(subject, export):
    ours = harness_model(subject).loglikelihood(_requests(PAIRS), disable_tqdm=True)
    theirs = _theirs(export).loglikelihood(_requests(PAIRS), disable_tqdm=True)
    for (mine, is_greedy), (wanted, is_their_greedy) in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(wanted, rel=1e-5) and is_greedy == is_their_greedy


def test_rolling_log_likelihoods_equal_the_hf_model(subject, export):
    texts = [(text,) for text in TEXTS]
    ours = harness_model(subject).loglikelihood_rolling(_requests(texts))
    theirs = _theirs(export, add_bos_token=False).loglikelihood_rolling(_requests(texts), disable_tqdm=True)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_greedy_is_noticed(subject):
    model = harness_model(subject)
    (made,) = model.generate_until(_requests([("a red", {"until": ["\n"], "max_gen_toks": 3})]))
    ids = model.tok_encode("a red"), model.tok_encode(made, add_special_tokens=False)
    ((_, is_greedy),) = model._loglikelihood_tokens([("", *ids)])
    assert is_greedy
    ((_, is_greedy),) = model._loglikelihood_tokens([("", ids[0], [(ids[1][0] + 1) % 200, *ids[1][1:]])])
    assert not is_greedy


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    lines = [
        {"text": text, "question": f"a thing: {text[:5]}", "choices": ["red", "blue"], "answer": i % 2}
        for i, text in enumerate(TEXTS)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "data.jsonl"}}, "test_split": "test"}
    perplexity = data | {
        "task": "texts",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    }
    choice = data | {
        "task": "choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    }
    for task in (perplexity, choice):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


def test_a_suite_runs_task_files(subject, tasks, tmp_path):
    suite = SuiteConfig(tasks=[TaskConfig(metrics=["harness"], harness_tasks=tasks)], n=3)
    result = run_suite(subject, suite, tmp_path / "report", "-", harness=HarnessTask)
    found = {figure["metric"]: figure for figure in result["figures"]}
    rolling = harness_model(subject).loglikelihood_rolling(_requests([(text,) for text in TEXTS[:3]]))
    bits = -sum(rolling) / sum(len(text.encode()) for text in TEXTS[:3]) / math.log(2)
    assert found["harness texts bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-6)
    model = harness_model(subject)
    right = 0
    for i, text in enumerate(TEXTS[:3]):
        pairs = [(f"a thing: {text[:5]}", f" {choice}") for choice in ("red", "blue")]
        scores = [score for score, _ in model.loglikelihood(_requests(pairs), disable_tqdm=True)]
        right += scores.index(max(scores)) == i % 2
    assert found["harness choice acc"]["value"] == pytest.approx(right / 3)
    assert all(figure["n"] == 3 and "lm_eval" in figure["versions"] for figure in found.values())


def test_task_files_are_checked(tmp_path, tasks, subject):
    with pytest.raises(UserError, match="no task files"):
        read_tasks(tmp_path)
    for text, said in (
        ("task: a\ndoc_to_text: 'Question: '\n", "ends in a space"),
        ("task: a\nprocess_docs: !function a.b\n", "not executed"),
        ("[1]", "not a task"),
    ):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(UserError, match=said):
            read_tasks(tmp_path)
    with pytest.raises(UserError, match="has no tasks"):
        HarnessTask(subject, TaskConfig(metrics=["harness"]))
    suite = SuiteConfig(tasks=[TaskConfig(metrics=["harness"], harness_tasks=tasks)])
    with pytest.raises(UserError, match="on exports only"):
        run_suite(subject, suite, tmp_path / "report", "-")
