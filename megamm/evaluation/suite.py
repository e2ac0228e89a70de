"""Runs a suite on a subject: chunks of items, each written once; a suite that was killed continues with the rest.

    REPORT/suite.json                the suite, the model's step and digest: a report belongs to one of each
    REPORT/items/00-loss/00000.jsonl the records of a chunk, written atomically: a chunk is complete or absent
    REPORT/made/00-psnr/00000.png    generated media
    REPORT/eval.json                 all figures; the last file, so that it is there only if the report is complete

With several ranks, chunk i belongs to data rank i modulo their number; rank 0 writes the figures when all have arrived.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megamm.common.errors import UserError
from megamm.common.files import new_file
from megamm.config.suite import SuiteConfig, TaskConfig
from megamm.evaluation.made_task import MadeTask
from megamm.evaluation.packages import versions
from megamm.evaluation.statistics import MetricFigure
from megamm.evaluation.subject import Subject
from megamm.evaluation.tasks import (
    LOSS_METRICS,
    PAIR_GAIN,
    RECALL,
    EvaluationTask,
    LossTask,
    PairGainTask,
    RecallTask,
    Record,
)

log = logging.getLogger(__name__)
IDENTITY, FIGURES = "suite.json", "eval.json"
HARNESS = "harness"
"""The metric of tasks of lm-evaluation-harness."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the items; `barrier` waits for all of them."""

    data_rank: int = 0
    data_size: int = 1
    is_writer: bool = True
    """Whether it writes the records of its data rank; other tensor or pipeline ranks compute the same."""
    is_first: bool = True
    """Whether it writes the figures."""
    barrier: Callable[[], None] = lambda: None
    beat: Callable[[], None] = lambda: None
    """Called before each chunk."""


OpenTask = Callable[[Subject, TaskConfig], EvaluationTask]


def open_tasks(
    subject: Subject, suite: SuiteConfig, report: Path, harness: OpenTask | None = None
) -> list[tuple[str, EvaluationTask]]:
    """Return the tasks with their names. UserError for a metric, source or network that does not exist.

    harness: opens tasks of lm-evaluation-harness; None where they cannot run.
    """
    opened: list[tuple[str, EvaluationTask]] = []
    for number, given in enumerate(suite.tasks):
        seed, n = suite.seed if given.seed is None else given.seed, suite.n if given.n is None else given.n
        config = given.model_copy(update={"seed": seed, "n": n})
        name = "-".join([f"{number:02d}", config.metrics[0], *([config.direction] if config.direction else [])])
        task = _open_task(subject, config, suite, harness)
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
        if isinstance(task, MadeTask):
            task.made_folder = report / "made" / name
        opened.append((name, task))
    return opened


def _open_task(subject: Subject, config: TaskConfig, suite: SuiteConfig, harness: OpenTask | None) -> EvaluationTask:
    wanted = set(config.metrics)
    if wanted <= set(LOSS_METRICS):
        return LossTask(subject, config)
    if wanted == {PAIR_GAIN}:
        return PairGainTask(subject, config)
    if wanted == {RECALL}:
        return RecallTask(subject, config)
    if wanted == {HARNESS}:
        if harness is None:
            raise UserError("tasks of lm-evaluation-harness run on exports only", remedy="remove the task")
        return harness(subject, config)
    scores = wanted & {*LOSS_METRICS, PAIR_GAIN, RECALL, HARNESS}
    if scores and len(wanted) > 1:
        remedy = "make it a task of its own"
        raise UserError(f"{sorted(scores)[0]} is computed from other data than the rest of its task", remedy=remedy)
    return MadeTask(subject, config, suite.sampling)


def run_suite(
    subject: Subject,
    suite: SuiteConfig,
    report: Path,
    digest: str,
    ranks: Ranks = Ranks(),
    harness: OpenTask | None = None,
) -> dict[str, Any]:
    """Compute what is missing in the folder `report`, and return the contents of its eval.json.

    digest: of the weights. UserError if the folder belongs to another suite or model.
    """
    identity = {"suite": suite.model_dump(mode="json"), "step": subject.step, "model": digest}
    if ranks.is_first:
        _begin(report, identity)
    ranks.barrier()
    tasks = open_tasks(subject, suite, report, harness)
    for name, task in tasks:
        compute(subject, task, report, name, ranks)
    ranks.barrier()
    if ranks.is_first and not (report / FIGURES).is_file():
        figures = [
            _finite(figure).to_json() | {"task": name}
            for name, task in tasks
            for figure in task.figures(read_records(report, name, task))
        ]
        result = {"step": subject.step, "model": digest, "seed": suite.seed, "figures": figures}
        result["versions"] = versions("megamm", "torch", "numpy", "transformers")
        with new_file(report / FIGURES) as file:
            file.write((json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    ranks.barrier()
    return dict(json.loads((report / FIGURES).read_bytes()))


def _begin(report: Path, identity: dict[str, Any]) -> None:
    file = report / IDENTITY
    if file.is_file():
        if json.loads(file.read_bytes()) != identity:
            remedy = "give another folder, or remove this one"
            raise UserError("the report belongs to another suite or model", where=report, remedy=remedy)
        return
    if report.exists() and any(report.iterdir()):
        remedy = "give another folder"
        raise UserError("the folder has files, but is not a report", where=report, remedy=remedy)
    report.mkdir(parents=True, exist_ok=True)
    with new_file(file) as output:
        output.write(json.dumps(identity, indent=1).encode())


def _chunks(task: EvaluationTask) -> list[range]:
    return [range(first, min(first + task.chunk, task.count)) for first in range(0, task.count, task.chunk)]


def _file(report: Path, name: str, chunk: int) -> Path:
    return report / "items" / name / f"{chunk:05d}.jsonl"


def compute(subject: Subject, task: EvaluationTask, report: Path, name: str, ranks: Ranks) -> None:
    """Compute this rank's missing chunks; every rank computes in every round, if only nothing, as layers need all."""
    chunks = _chunks(task)
    missing = [number for number in range(len(chunks)) if not _file(report, name, number).is_file()]
    ranks.barrier()  # all have looked before anything is written, so that all have the same list
    if done := len(chunks) - len(missing):
        log.info("%s: %d of %d chunks are there already", name, done, len(chunks))
    for first in range(0, len(missing), ranks.data_size):
        mine = missing[first + ranks.data_rank :][:1] if first + ranks.data_rank < len(missing) else []
        ranks.beat()
        items = chunks[mine[0]] if mine else range(0)
        records = task.compute(subject, items, report / "made" / name)
        if mine and ranks.is_writer:
            file = _file(report, name, mine[0])
            file.parent.mkdir(parents=True, exist_ok=True)
            with new_file(file) as output:
                output.write("".join(json.dumps(record) + "\n" for record in records).encode())


def read_records(report: Path, name: str, task: EvaluationTask) -> list[Record]:
    """Return the records of all items, in order."""
    files = [_file(report, name, number) for number in range(len(_chunks(task)))]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def _finite(figure: MetricFigure) -> MetricFigure:
    if figure.value is not None and not math.isfinite(figure.value):
        return replace(figure, value=None, standard_error=None, note="the value is not finite")
    if figure.standard_error is not None and not math.isfinite(figure.standard_error):
        return replace(figure, standard_error=None)
    return figure


def lines(figures: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Format figures for people."""
    for figure in figures:
        where = " ".join(str(figure[key]) for key in ("direction", "source") if figure.get(key))
        value = "not measured" if figure["value"] is None else f"{figure['value']:.4f}"
        error = "" if figure["standard_error"] is None else f" ± {figure['standard_error']:.4f}"
        left_out = sum(figure.get("left_out", {}).values())
        more = [f"n={figure['n']}", *([f"{left_out} left out"] if left_out else [])]
        more += [figure["note"]] if figure.get("note") else []
        yield f"{figure['metric']}{f' {where}' if where else ''}: {value}{error} ({', '.join(more)})"
