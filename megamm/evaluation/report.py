"""The report of a suite: a page with figures and samples, TensorBoard scalars, and blind pairs for people.

REPORT/report.html      figures with their errors, and the first samples of each generating task
REPORT/tensorboard      each figure as a scalar at the step of the weights
REPORT/human/pairs.html blind pairs; judgements go into pairs.csv, one line each, and key.csv resolves the sides
"""

import base64
import csv
import io
import json
import mimetypes
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megamm.common.errors import UserError
from megamm.common.files import new_file
from megamm.config.suite import HumanConfig, SuiteConfig
from megamm.evaluation.made_task import MadeTask
from megamm.evaluation.suite import read_records
from megamm.evaluation.tasks import EvaluationTask, Record
from megamm.observability.report import page

PAGE, HUMAN = "report.html", "human"
SHOWN = 8
"""Samples of each task on the page."""
_ANGLE = 0.6
"""View of a cloud, in radians about the vertical axis."""
STYLE = ".sample { border: 1px solid var(--line); border-radius: 8px; padding: .6rem } .sample img { max-width: 100% }"
Tasks = Sequence[tuple[str, EvaluationTask]]


def write(report: Path, model: str, tasks: Tasks, suite: SuiteConfig, result: dict[str, Any]) -> None:
    """Write the page, the scalars and, if the suite wants them, the blind pairs."""
    made = [(name, task) for name, task in tasks if isinstance(task, MadeTask)]
    if suite.human is not None:
        _write_pairs(report, made, suite.human, suite.seed)
    _write_scalars(report, result)
    samples = "".join(
        page.section(name, f"The first of {task.count} samples.", _samples(report, name, task)) for name, task in made
    )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    body = f"<h1>{escape(model)}, step {result['step']}</h1>{_table(result['figures'])}{samples}"
    body += page.section("Versions", versions, "")
    page.write(report / PAGE, f"Evaluation of {model}", body, STYLE)


def _table(figures: Sequence[dict[str, Any]]) -> str:
    head = ("metric", "direction", "source", "value", "standard error", "n", "left out", "seed", "note")
    rows = [
        (
            figure["metric"],
            figure.get("direction", ""),
            figure.get("source", ""),
            _number(figure["value"]),
            _number(figure["standard_error"]),
            str(figure["n"]),
            ", ".join(f"{count} ({reason})" for reason, count in figure.get("left_out", {}).items()),
            str(figure["seed"]),
            figure.get("note", "") + (f" floor {figure['floor']:.4g}" if figure.get("floor") is not None else ""),
        )
        for figure in figures
    ]
    return page.section("Figures", "", page.table(head, rows, ("direction", "source", "left out", "note")))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _samples(report: Path, name: str, task: MadeTask) -> str:
    cards = "".join(_card(report, name, task, record) for record in read_records(report, name, task)[:SHOWN])
    return f'<div class="grid">{cards}</div>'


def _card(report: Path, name: str, task: MadeTask, record: Record) -> str:
    prompt = "".join(_shown(part, task.medium(part, record["key"])) for part in task.given)
    real = _shown(task.target, task.medium(task.target, record["key"]))
    values = ", ".join(
        f"{metric} {value:.4g}" if isinstance(value, float) else f"{metric}: {value}"
        for metric, value in record["values"].items()
    )
    made = _shown(task.target, made_medium(report, name, record))
    return (
        f'<div class="sample"><p class="soft">{escape(record["key"])}, seed {record["seed"]}</p>'
        f"<b>prompt</b>{prompt}<b>generated</b>{made}<b>real</b>{real}<p class='soft'>{escape(values)}</p></div>"
    )


def made_medium(report: Path, name: str, record: Record) -> tuple[bytes, str]:
    """Return the bytes and the extension of what was generated."""
    if "made" in record:
        return record["made"].encode(), "txt"
    file = report / "made" / name / record["file"]
    return file.read_bytes(), file.suffix[1:]


def _shown(modality: str, medium: tuple[bytes, str]) -> str:
    """Return a medium as HTML that loads no other file."""
    data, extension = medium
    if modality == "text":
        return f"<p>{escape(data.decode(errors='replace'))}</p>"
    if modality == "points":
        data, extension = _picture_of(data, extension), "png"
    kind = mimetypes.guess_type(f"a.{extension}")[0] or "application/octet-stream"
    uri = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    if kind.startswith("image/"):
        return f'<p><img alt="" src="{uri}"></p>'
    tag = "audio" if modality == "audio" else "video"
    return f'<p><{tag} controls src="{uri}"></{tag}></p>'


def _picture_of(data: bytes, extension: str) -> bytes:
    from PIL import Image

    from megamm.media.point_clouds import render
    from megamm.media.points_file import read_points

    file = io.BytesIO()
    Image.fromarray(render(read_points(data, extension, 2048)[0], _ANGLE, 192)).save(file, format="PNG")
    return file.getvalue()


def _write_scalars(report: Path, result: dict[str, Any]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    if (report / "tensorboard").exists():
        return
    with SummaryWriter(str(report / "tensorboard")) as board:
        for name, value in scalars(result["figures"]).items():
            board.add_scalar(name, value, result["step"])


def scalars(figures: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the figures that have a value, by "eval/METRIC SOURCE DIRECTION" without what is not set."""
    named = {}
    for figure in figures:
        words = [figure["metric"], figure.get("source"), figure.get("direction")]
        if figure["value"] is not None:
            named["eval/" + "/".join(word.replace(" ", "_") for word in words if word)] = figure["value"]
    return named


def _write_pairs(report: Path, made: Sequence[tuple[str, MadeTask]], human: HumanConfig, seed: int) -> None:
    """Write blind pairs: what was generated beside the real sample, or what another model generated."""
    rng = np.random.default_rng([seed, 3])
    cards: list[str] = []
    key: list[tuple[str, ...]] = [("pair", "left", "right", "task", "sample")]
    for name, task in made:
        others = _others(human.against, name)
        for record in read_records(report, name, task)[: human.pairs]:
            if others is not None and record["key"] not in others:
                continue
            other = task.medium(task.target, record["key"])
            if others is not None and human.against is not None:
                other = made_medium(human.against, name, others[record["key"]])
            sides = [("model", made_medium(report, name, record)), ("real" if others is None else "other", other)]
            if rng.random() < 0.5:
                sides.reverse()
            number = f"{len(cards):04d}"
            prompt = "".join(_shown(part, task.medium(part, record["key"])) for part in task.given)
            left, right = (_shown(task.target, medium) for _, medium in sides)
            cards.append(
                f'<div class="sample"><p>pair {number}</p>{prompt}<div class="grid"><div>left{left}</div>'
                f"<div>right{right}</div></div></div>"
            )
            key.append((number, sides[0][0], sides[1][0], name, record["key"]))
    folder = report / HUMAN
    folder.mkdir(exist_ok=True)
    note = "<h1>Which one is better?</h1><p>Write left, right or equal for each pair into pairs.csv.</p>"
    page.write(folder / "pairs.html", "Pairs", note + "".join(cards), STYLE)
    _write_csv(folder / "pairs.csv", [("pair", "better"), *((row[0], "") for row in key[1:])])
    _write_csv(folder / "key.csv", key)


def _others(against: Path | None, name: str) -> dict[str, Record] | None:
    """Return the records of the same task in another report, by key. UserError if there are none."""
    if against is None:
        return None
    files = sorted((against / "items" / name).glob("*.jsonl"))
    if not files:
        remedy = "give the report of the same suite for another model"
        raise UserError(f"no samples of {name} to compare with", where=against, remedy=remedy)
    records = (json.loads(line) for file in files for line in file.read_text().splitlines())
    return {record["key"]: record for record in records}


def _write_csv(file: Path, rows: Sequence[Sequence[str]]) -> None:
    if file.exists():
        return  # people may have filled it in
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    with new_file(file) as output:
        output.write(text.getvalue().encode())
