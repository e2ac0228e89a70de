"""Sections of a run's page that are based on events: goodput, time line, restarts, checkpoints, other events.

Input: events (megamm/common/events.py) and `Goodput`. Output: HTML. Times are in seconds since the first launch.
"""

import statistics
import time
from collections import Counter
from html import escape
from typing import Any

from megamm.observability.goodput import KINDS, Goodput
from megamm.observability.report import page
from megamm.observability.report.page import Band, Mark, Series, number, plot, timeline

Event = dict[str, Any]
COLOURS = {
    "productive": "#2b8a57",
    "repeated": "#d9822b",
    "data_wait": "#8a3ab9",
    "checkpoint_stall": "#2457c5",
    "evaluation": "#59a8c9",
    "start_up": "#8d99a6",
    "detection": "#c22f2f",
    "teardown": "#e0685f",
    "rendezvous": "#eba9a2",
    "load": "#4b6a88",
    "down": "#3c444c",
    "unknown": "#d5dade",
}
MEANINGS = {
    "productive": "in steps whose result was kept",
    "repeated": "in steps that were run again",
    "data_wait": "rank 0 waited for data",
    "checkpoint_stall": "steps waited for a checkpoint",
    "evaluation": "held-out losses",
    "start_up": "from a launch to its first step",
    "detection": "until a failure was detected",
    "teardown": "stopping the other ranks",
    "rendezvous": "until all ranks had joined",
    "load": "reading the checkpoint",
    "down": "no job was running, or it waited before a restart",
    "unknown": "not recorded",
}
MARKS = {
    "failed": "#c22f2f",
    "hang": "#c22f2f",
    "gave_up": "#c22f2f",
    "evicted": "#c22f2f",
    "loss_guard": "#d9822b",
    "straggler": "#8a3ab9",
    "skipped_checkpoint": "#d9822b",
    "signal": "#3c444c",
    "finished": "#2b8a57",
    "saved": "#2457c5",
}
LISTED = 200
"""Maximum number of rows in a table: the newest; the page shows the total number."""


def duration(seconds: float) -> str:
    """Format a duration: 12.3 s, 5 min 3 s, 3 h 25 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    for unit, size, below, small in (("d", 86400, 3600, "h"), ("h", 3600, 60, "min"), ("min", 60, 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // below)} {small}"
    raise AssertionError(seconds)


def goodput_section(goodput: Goodput) -> str:
    """Return the shares of time as a bar and a table, with notes about unknown time."""
    wall = goodput.wall
    if wall <= 0:
        return page.section("Where the time went", "No record with a time.", "")
    shown = [(kind, goodput.seconds[kind]) for kind in KINDS if goodput.seconds[kind] > 0]
    bar = "".join(
        f'<i style="background:{COLOURS[k]};width:{100 * s / wall:.3f}%" title="{k} {s / wall:.1%}"></i>'
        for k, s in shown
    )
    rows = "".join(
        f'<tr><td><span class="key" style="background:{COLOURS[k]}"></span>{k.replace("_", " ")}</td>'
        f'<td>{s:,.1f}</td><td>{s / wall:.1%}</td><td class="text">{MEANINGS[k]}</td></tr>'
        for k, s in shown
    )
    head = '<tr><th>time</th><th>seconds</th><th>share</th><th class="text"></th></tr>'
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in goodput.notes)
    ratio = f"{goodput.ratio:.1%}" if goodput.ratio is not None else "?"
    note = (
        f"Goodput (effective training time ratio) {ratio}: time in steps whose result was kept, without waiting for "
        "data, divided by the wall time since the first launch. Steps since the last checkpoint count as kept."
    )
    content = f'<div class="stack">{bar}</div><div class="scroll"><table>{head}{rows}</table></div>{notes}'
    return page.section("Where the time went", note, content)


def timeline_section(goodput: Goodput, recorded: list[Event]) -> str:
    """Return the time line: every span in its colour, with events as triangles above."""
    begin, end = goodput.begin, goodput.end
    if end <= begin:
        return ""
    unit, name = (
        (3600.0, "hours") if end - begin > 7200 else (60.0, "minutes") if end - begin > 300 else (1.0, "seconds")
    )
    bands = [
        Band((s.begin - begin) / unit, (s.end - begin) / unit, COLOURS[s.kind], f"{s.kind} {duration(s.end - s.begin)}")
        for s in goodput.spans
    ]
    shown = [e for e in recorded if e["kind"] in MARKS]
    saved = [e for e in shown if e["kind"] == "saved"]
    if len(saved) > LISTED:  # they would hide the rest
        shown = [e for e in shown if e["kind"] != "saved"]
    marks = [(Mark((e["time"] - begin) / unit, _line_of(e)), MARKS[e["kind"]]) for e in shown]
    keys = "".join(
        f'<span class="key" style="background:{COLOURS[kind]}"></span>{kind.replace("_", " ")} &nbsp; '
        for kind in dict.fromkeys(span.kind for span in goodput.spans)
    )
    note = "Triangles: failures and hangs are red, checkpoints blue, loss guard actions orange; hover for details."
    drawn = timeline(bands, marks, end=(end - begin) / unit, x_label=f"{name} since the first launch")
    return page.section("Time line", note, f'{drawn}<p class="soft">{keys}</p>')


def _fields_of(event: Event) -> str:
    """Return an event's fields other than time and kind."""
    return ", ".join(f"{key} {_short(value)}" for key, value in event.items() if key not in ("time", "kind"))


def _line_of(event: Event) -> str:
    return f"{event['kind']}: {_fields_of(event)}"


def _utc(seconds: float) -> str:
    """Return month, day and time, on one line."""
    return time.strftime("%m-%d\u00a0%H:%M:%S", time.gmtime(seconds))


def _short(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def restarts_section(goodput: Goodput) -> str:
    """Return the table of restarts, one row per failure; an empty cell was not recorded."""
    if not goodput.restarts:
        return page.section("Restarts", "No failure was recorded.", "")
    rows = [
        [
            f"{r.time - goodput.begin:,.1f}",
            r.cause,
            "" if r.rank is None else str(r.rank),
            "" if r.step is None else str(r.step),
            r.phase or "",
            *map(_seconds, (r.detection, r.teardown, r.rendezvous, r.load, r.total)),
            "" if r.resumed_step is None else str(r.resumed_step),
        ]
        for r in goodput.restarts[-LISTED:]
    ]
    head = [
        "at",
        "cause",
        "rank",
        "step",
        "phase",
        "detection",
        "teardown",
        "rendezvous",
        "load",
        "total",
        "resumed at",
    ]
    note = f"{len(goodput.restarts)} failures, the newest {len(rows)} shown; seconds, empty where not recorded."
    return page.section("Restarts", note, page.table(head, rows, ["cause", "phase"]))


def checkpoints_section(recorded: list[Event]) -> str:
    """Return stall, time and size of the checkpoints by storage, and the skipped checkpoints."""
    saved = [e for e in recorded if e["kind"] == "saved"]
    rows = []
    for storage in dict.fromkeys(_storage(e) for e in saved):
        stored = [e for e in saved if _storage(e) == storage]
        row = [storage, str(len(stored)), str(max(e.get("step", 0) for e in stored))]
        for key in ("stall", "seconds"):
            known = [e[key] for e in stored if isinstance(e.get(key), int | float)]
            row += [f"{statistics.median(known):.3f}", f"{max(known):.3f}"] if known else ["", ""]
        sizes = [e["bytes"] for e in stored if isinstance(e.get("bytes"), int)]
        rows.append([*row, f"{sizes[-1] / 2**20:,.1f}" if sizes else ""])
    skipped = [_line_of(e) for e in recorded if e["kind"] == "skipped_checkpoint"]
    if not rows and not skipped:
        return page.section("Checkpoints", "None was recorded.", "")
    head = [
        "storage",
        "saved",
        "newest step",
        "stall, median",
        "stall, most",
        "seconds, median",
        "seconds, most",
        "MiB",
    ]
    passed = "".join(f"<p>{escape(line)}</p>" for line in skipped[-LISTED:])
    return page.section("Checkpoints", "Stall: seconds that steps waited.", page.table(head, rows) + passed)


def _storage(saved: Event) -> str:
    """Return the storage of a saved checkpoint: "run", "local" or "remote", which earlier versions call "durable"."""
    tier = str(saved.get("tier", "run"))
    return "remote" if tier == "durable" else tier


def straggler_plot(recorded: list[Event]) -> list[str]:
    """Return a plot of the scores of slow ranks over steps; [] if there are none."""
    found = [e for e in recorded if e["kind"] == "straggler" and isinstance(e.get("score"), int | float)]
    by_rank = Counter(e.get("rank") for e in found)
    colours = list(COLOURS.values())
    series = [
        Series(f"rank {rank}", [(e.get("step", 0), e["score"]) for e in found if e.get("rank") == rank], colour, True)
        for (rank, _), colour in zip(by_rank.most_common(4), colours, strict=False)
    ]
    return [plot("Stragglers", series, x_label="step", y_label="own time / median")] if series else []


def events_section(recorded: list[Event], begin: float) -> str:
    """Return all events except checkpoints, newest last."""
    shown = [e for e in recorded if e["kind"] != "saved"]
    rows = [[f"{e['time'] - begin:,.1f}", _utc(e["time"]), e["kind"], _fields_of(e)] for e in shown[-LISTED:]]
    if not rows:
        return page.section("Events", "None was recorded.", "")
    note = f"{len(shown)} events without saved checkpoints, the newest {len(rows)} shown; times in UTC."
    return page.section("Events", note, page.table(["at, s", "time", "kind", "what"], rows, ["time", "kind", "what"]))
