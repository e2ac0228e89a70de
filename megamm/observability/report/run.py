"""`megamm report RUN`: the page of one run, whether finished, running or interrupted.

Input: RUN/events.jsonl, metrics.jsonl, metrics_dropped.jsonl, the newest checkpoint's state.json; the page says what is
missing. Output: one HTML file that loads no other files. Losses are in nats per token, times in seconds.
"""

import json
import statistics
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from megamm.common import events, redact
from megamm.common.errors import UserError
from megamm.observability import metrics
from megamm.observability.goodput import Goodput, account
from megamm.observability.report import page, timeline
from megamm.observability.report.page import Mark, Series, number, plot

REPORT = "report.html"
TRAIN, HELDOUT = "#2457c5", "#c2541b"


@dataclass(frozen=True)
class Record:
    """All data of a run. lines: the valid metrics; state: of the newest checkpoint, {} without one."""

    run: Path
    events: list[dict[str, Any]]
    lines: list[dict[str, Any]]
    goodput: Goodput
    state: dict[str, Any]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run's output folder to `out` (default RUN/report.html). UserError if there is no run."""
    recorded, lines = events.read(run), metrics.read_lines(run)
    if not recorded and not lines:
        raise UserError("no events and no metrics of a run", where=run, remedy="name the `output` folder of a run")
    recorded, lines = redact.values(recorded), redact.values(lines)
    record = Record(run, recorded, lines, account(recorded, redact.values(metrics.read_all_lines(run))), _state(run))
    body = "".join(
        (
            _head(record),
            timeline.goodput_section(record.goodput),
            timeline.timeline_section(record.goodput, record.events),
            _losses(record),
            _speed(record),
            timeline.restarts_section(record.goodput),
            timeline.checkpoints_section(record.events),
            timeline.events_section(record.events, record.goodput.begin),
            _setup(record),
        )
    )
    path = out or run / REPORT
    page.write(path, f"megamm: {run.resolve().name}", body)
    return path


def _state(run: Path) -> dict[str, Any]:
    """Return state.json of the newest checkpoint that has a valid one."""
    for path in sorted(run.glob("checkpoints/step_*/state.json"), reverse=True):
        try:
            state: dict[str, Any] = redact.values(json.loads(path.read_text()))
        except (OSError, json.JSONDecodeError):
            continue
        return state
    return {}


def _head(record: Record) -> str:
    steps = [line["step"] for line in record.lines]
    speeds = [line["tokens_per_s"] for line in record.lines if "tokens_per_s" in line]
    total = record.state.get("config", {}).get("train", {}).get("steps")
    ratio = record.goodput.ratio
    how = {"finished": "finished", "gave_up": "gave up", "failed": "failed", "signal": "stopped by a signal"}
    how |= {"evicted": "its node was evicted"}
    last = next((e for e in reversed(record.events) if e["kind"] in how), None)
    later = last is not None and any(e["time"] > last["time"] and e["kind"] == "started" for e in record.events)
    entries = [
        (f"{max(steps, default=0):,}" + (f" / {total:,}" if total else ""), "steps"),
        ("?" if ratio is None else f"{ratio:.1%}", "goodput (effective training time)"),
        (timeline.duration(record.goodput.wall), "wall time since the first launch"),
        (str(max(record.goodput.attempts - 1, 0)), "restarts"),
        (f"{statistics.median(speeds):,.0f}" if speeds else "?", "tokens/s (median)"),
        (how[last["kind"]] if last is not None and not later else "no end recorded", "state"),
    ]
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.goodput.end))
    title = f"<h1>{escape(record.run.resolve().name)}</h1>"
    return f'{title}<p class="soft">A run of megamm, as recorded until {when}.</p>{page.cards(entries)}'


def _points(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return (step, value); a step without a value becomes a gap."""
    return [(line["step"], float("nan") if line[key] is None else line[key]) for line in lines if key in line]


def _resumptions(record: Record) -> list[Mark]:
    """Return the steps at which the run resumed after a restart."""
    found = [e for e in record.events if e["kind"] == "resumed" and isinstance(e.get("step"), int) and e["step"]]
    return [Mark(e["step"], f"resumed at step {e['step']}") for e in found]


def _losses(record: Record) -> str:
    names = list(dict.fromkeys(k.split("/", 1)[1] for line in record.lines for k in line if k.startswith("loss/")))
    marks, plots, rows = _resumptions(record), [], []
    for name in names:
        train, heldout = _points(record.lines, f"loss/{name}"), _points(record.lines, f"heldout/{name}")
        values, held = ([y for _, y in points if y == y] for points in (train, heldout))
        if not values and not held:
            continue
        series = [Series("training", train, TRAIN)] + ([Series("held-out", heldout, HELDOUT, True)] if held else [])
        plots.append(plot(name, series, x_label="step", y_label="nats/token", marks=marks))
        ends = [f"{ends[i]:.4f}" if ends else "" for ends, i in ((values, 0), (values, -1), (held, -1))]
        rows.append([name, *ends])
    if not plots:
        return page.section("Losses", "No losses recorded yet.", "")
    heads = ["modality", "first", "last", "held-out, last"]
    note = "Mean cross entropy. A dotted line marks where the run resumed after a restart."
    return page.section("Losses", note, f'<div class="grid">{"".join(plots)}</div>{page.table(heads, rows)}')


def _speed(record: Record) -> str:
    marks, lines = _resumptions(record), record.lines
    wait = [(step, 100 * share) for step, share in _points(lines, "data_wait_share")]
    stalls = [(step, s) for step, s in _points(lines, "checkpoint_stall_seconds") if s > 0]
    per_step = [(line["step"], line["step_seconds"] / line["steps"]) for line in lines if line.get("steps")]
    plots = [
        plot(title, [Series(title, points, TRAIN, dots)], x_label="step", y_label=unit, marks=marks, from_zero=zero)
        for title, points, unit, zero, dots in (
            ("Throughput", _points(lines, "tokens_per_s"), "tokens/s", True, False),
            ("Time of a step", per_step, "s", True, False),
            ("Gradient norm", _points(lines, "grad_norm"), "before clipping", False, False),
            ("Learning rate", _points(lines, "lr"), "per step", True, False),
            ("Waiting for data", wait, "% of the time of steps, rank 0", True, False),
            ("Checkpoint stall", stalls, "s since the last report", True, True),
        )
        if points
    ]
    plots += timeline.straggler_plot(record.events)
    note = "Times exclude held-out losses and checkpoints, which are in the time line."
    return page.section("Speed and health", note, f'<div class="grid">{"".join(plots)}</div>')


def _setup(record: Record) -> str:
    state = record.state
    if not state:
        return page.section("Configuration", "No checkpoint yet; configuration and versions are read from it.", "")
    versions = " · ".join(f"{name} {version}" for name, version in sorted(state.get("versions", {}).items()))
    layout = ", ".join(f"{name} {value}" for name, value in state.get("layout", {}).items())
    rows = [["checkpoint", f"step {number(state['step'])}"], ["ranks", str(state.get("world_size", "?"))]]
    rows += [["layout", layout], ["versions", versions]]
    config = yaml.safe_dump(state.get("config", {}), sort_keys=False)
    content = page.table(["", "of the newest checkpoint"], rows, ["of the newest checkpoint"])
    return page.section("Configuration", "Secrets are removed.", content + page.folded("the whole config", config))
