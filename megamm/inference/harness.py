"""Tasks of EleutherAI's lm-evaluation-harness on an export, from task files in a folder; nothing is downloaded.

Texts have the form of training: `<document_start>`, then the text's ids. So log-likelihoods are those of the harness's
`hf` model on the export, whose tokenizer adds the same start, and rolling ones those of `hf` with add_bos_token=False,
which puts the start in front of the first window alone. A task file is YAML without `!function`, as nothing that is
read from a file is executed; paths of its `data_files` are relative to its folder.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from megamm.common.errors import UserError
from megamm.config.suite import TaskConfig
from megamm.evaluation.packages import require, versions
from megamm.evaluation.statistics import MetricFigure
from megamm.evaluation.subject import Subject
from megamm.evaluation.suite import HARNESS
from megamm.evaluation.tasks import Record
from megamm.inference.export_subject import ExportSubject
from megamm.inference.generate import Sampling, generate_from

MAX_NEW_TOKENS = 256
"""The harness's default length of a generated answer."""


class HarnessTask:
    """megamm.evaluation.tasks.EvaluationTask whose items are the tasks of a folder."""

    chunk = 1

    def __init__(self, subject: Subject, config: TaskConfig) -> None:
        if config.harness_tasks is None:
            remedy = "set `harness_tasks` to a folder of task files (docs/evaluation.md)"
            raise UserError("harness has no tasks", remedy=remedy)
        self.config, self.folder = config, config.harness_tasks
        require("lm_eval")
        self.tasks = read_tasks(self.folder)
        self.count = len(self.tasks)

    def compute(self, subject: Subject, items: Sequence[int], folder: Path) -> list[Record]:
        """Run each task of the items on its own."""
        assert isinstance(subject, ExportSubject), "a run's suite has no tasks of the harness"
        # It reads these when `datasets` is imported: tasks must not wait for a network.
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        evaluate = require("lm_eval.evaluator").simple_evaluate
        manager = require("lm_eval.tasks").TaskManager(include_defaults=False)
        records = []
        for i in items:
            with tempfile.TemporaryDirectory() as cache_folder:
                task = dict(self.tasks[i])
                task["dataset_kwargs"] = dict(task.get("dataset_kwargs") or {}) | {"cache_dir": cache_folder}
                seed = self.config.seed or 0
                found = evaluate(
                    model=harness_model(subject),
                    tasks=[task],
                    task_manager=manager,
                    limit=self.config.n,
                    log_samples=False,
                    bootstrap_iters=1000,
                    **dict.fromkeys(
                        ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed
                    ),
                )
            name = task["task"]
            numbers = {key: value for key, value in found["results"][name].items() if isinstance(value, int | float)}
            records.append({"key": name, "n": found["n-samples"][name]["effective"], "values": numbers})
        return records

    def figures(self, records: Sequence[Record]) -> Iterator[MetricFigure]:
        """Return the metrics of every task, with the harness's own standard errors."""
        for record in records:
            for key, value in record["values"].items():
                metric, comma, which = key.partition(",")
                if not comma or metric.endswith("_stderr"):
                    continue
                error = record["values"].get(f"{metric}_stderr,{which}")
                yield MetricFigure(
                    f"{HARNESS} {record['key']} {metric}" + (f" {which}" if which != "none" else ""),
                    float(value),
                    None if error is None else float(error),
                    record["n"],
                    self.config.seed or 0,
                    versions=versions("lm_eval"),
                )


def read_tasks(folder: Path) -> list[dict[str, Any]]:
    """Read every task file of a folder. UserError for one that is not a task, or whose prompts end in a space."""
    tasks = []
    for file in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        try:
            task = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            remedy = "correct it; `!function` is not supported, as files are not executed"
            raise UserError(
                f"cannot read the task: {' '.join(str(error).split())}", where=file, remedy=remedy
            ) from None
        if not isinstance(task, dict) or not isinstance(task.get("task"), str):
            raise UserError("not a task of lm-evaluation-harness", where=file, remedy="add `task: NAME`")
        prompt = task.get("doc_to_text")
        if isinstance(prompt, str) and prompt != prompt.rstrip():
            # The harness moves it into the answer, which has other tokens then.
            remedy = "remove the space at the end of doc_to_text; target_delimiter adds one"
            raise UserError(
                "the prompt ends in a space, which would be scored as a part of the answer", where=file, remedy=remedy
            )
        arguments = task.get("dataset_kwargs") or {}
        if "data_files" in arguments:
            task["dataset_kwargs"] = arguments | {"data_files": _inside(file.parent, arguments["data_files"])}
        tasks.append(task)
    if not tasks:
        raise UserError("no task files", where=folder, remedy="give a folder of NAME.yaml")
    return tasks


def _inside(folder: Path, files: Any) -> Any:
    """Return paths of data files relative to the task's folder."""
    if isinstance(files, dict):
        return {split: _inside(folder, file) for split, file in files.items()}
    if isinstance(files, list):
        return [_inside(folder, file) for file in files]
    return str(folder / files)


def harness_model(subject: ExportSubject) -> Any:
    """Return an export as a model of the harness."""
    return _model_class()(subject)


@cache
def _model_class() -> type:
    """Define the class when it is needed: its base is in an optional package."""
    base: Any = require("lm_eval.api.model").TemplateLM
    utils = require("lm_eval.utils")

    class ExportModel(base):
        """An export behind the harness's interface."""

        def __init__(self, subject: ExportSubject) -> None:
            super().__init__()
            self.export = subject.export
            form = self.export.prompt_form
            self.start, self.logits = list(form.start), subject.logits
            self.prefix = form.start[-1] if form.start else form.ends[0]
            self.first_id = self.export.vocabulary["text"].start

        @property
        def eot_token_id(self) -> int:
            return int(self.prefix)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids = [int(i) + self.first_id for i in self.export.modalities["text"].encode([string])[0]]
            return ids if add_special_tokens is False else [*self.start, *ids]

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            found: dict[int, tuple[float, bool]] = {}
            # As the harness: what is too long loses its beginning, and the last token is only predicted.
            inputs = [(before + after)[-(self.export.longest + 1) :][:-1] for _, before, after in requests]
            order = sorted(range(len(requests)), key=lambda i: -len(inputs[i]))
            while order:
                longest = len(inputs[order[0]])
                size = max(1, self.logits // (self.export.vocabulary.size * longest))
                batch, order = order[:size], order[size:]
                for i, scores_SV in zip(batch, self._scores([inputs[i] for i in batch], longest), strict=True):
                    after = torch.tensor(requests[i][2], device=scores_SV.device)
                    scores_SV = scores_SV[len(inputs[i]) - len(after) : len(inputs[i])].log_softmax(-1)
                    chosen = scores_SV.gather(1, after[:, None])
                    found[i] = float(chosen.sum()), bool((scores_SV.argmax(-1) == after).all())
            return [found[i] for i in range(len(requests))]

        @torch.inference_mode()
        def _scores(self, inputs: list[list[int]], longest: int) -> torch.Tensor:
            """Return logits float32 `[B, S, V]`; rows are padded on the right, which causal attention does not see."""
            ids = torch.full((len(inputs), longest), self.export.prompt_form.padding)
            mask = torch.zeros_like(ids)
            for row, given in enumerate(inputs):
                ids[row, : len(given)], mask[row, : len(given)] = torch.tensor(given), 1
            device = self.export.device
            logits: torch.Tensor = self.export.model(ids.to(device), attention_mask=mask.to(device)).logits
            return logits.float()

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                windows = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                    prefix_token=self.eot_token_id,
                    max_seq_len=self.export.longest,
                    context_len=1,
                )
                parts = [("", *utils.make_disjoint_window(window)) for window in windows]
                totals.append(sum(total for total, _ in self._loglikelihood_tokens(parts)))
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            answers = []
            for request in requests:
                context, options = request.args
                until = options.get("until") or []
                stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
                temperature = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
                most = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
                sampling = Sampling(temperature, max_tokens=most, stop=stops)
                answers += generate_from(self.export, [[("text", context)]], "text", sampling)
            return answers

    return ExportModel
