"""`megamm runs` and `megamm attach`: status of runs, and a run's events and metrics as they are written.

Runs are only read, from their folders, so this works on any machine that sees the folders. Input: RUN/events.jsonl,
heartbeats/, metrics.jsonl, metrics_dropped.jsonl, metrics.prom; a restart replaces metrics.jsonl. Output: `Status`, or
lines of text. Losses are in nats per token, times in Unix seconds, ages in seconds.
"""

import json
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megamm.common import events, redact
from megamm.common.errors import UserError
from megamm.elastic import heartbeat
from megamm.observability import metrics
from megamm.observability.goodput import account
from megamm.observability.prometheus import TEXTFILE

if TYPE_CHECKING:
    from rich.table import Table

State = Literal["waiting", "running", "silent", "stopping", "stopped", "done", "failed"]
FINAL = ("stopped", "done", "failed")
LIFE = ("launched", "restarting", "resumed", "started", "signal", "failed", "evicted", "finished", "gave_up")
SILENT_SECONDS, STARTUP_SECONDS = 60.0, 600.0
"""Seconds without a heartbeat after which a run counts as silent: within steps (three of its steps if that is longer),
and in phases that may take long. A failure without a restart is final after the latter time."""
_NOT_RUNS = ("checkpoints", "heartbeats", "tensorboard", "hangs")
_TARGET = re.compile(r"^megamm_target_steps(?:\{.*\})? ([0-9.e+]+)$", re.MULTILINE)
POLL = 0.5
"""Seconds between two polls; each poll reads two file sizes from a shared file system."""
STATUS_SECONDS = 5.0
MANY = 1000
"""Number of runs from which on several processes read them."""
BEFORE = 10
"""Number of earlier lines that are shown first."""


@dataclass(frozen=True)
class Status:
    """Status of one run.

    why: reason for the state; steps: total number of steps, None if unknown; age: age of the oldest rank's heartbeat;
    log: its newest log file, or its event file.
    """

    run: str
    state: State
    why: str
    step: int
    steps: int | None
    losses: dict[str, float | None]
    goodput: float | None
    restarts: int
    age: float | None
    log: str


def find(folders: list[Path]) -> list[Path]:
    """Return the runs that these folders are or contain, at any depth; UserError if one is not a folder."""
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError("no such folder", where=folder, remedy="give a run's output folder, or one above it")
        found |= dict.fromkeys(_below(folder))
    return list(found)


def _below(folder: Path) -> Iterator[Path]:
    for path, inner, files in os.walk(folder):
        # os.walk descends only into what is left in `inner`: a run's own folders hold no runs.
        inner[:] = sorted(name for name in inner if name not in _NOT_RUNS and not name.startswith("."))
        if events.EVENTS in files or metrics.METRICS in files:
            yield Path(path)


def statuses(found: list[Path]) -> list[Status]:
    """Return the status of each run; of many runs, several processes read the folders."""
    at_once = partial(status, now=time.time())
    if len(found) < MANY:
        return [at_once(run) for run in found]
    # Spawned: a fork copies one thread only, and this process may have others, with locks held. Pipes and not a pool,
    # whose semaphores would stay in /dev/shm until this process exits.
    context, readers = multiprocessing.get_context("spawn"), min(len(os.sched_getaffinity(0)), 8)
    shares = [context.Pipe(duplex=False) for _ in range(readers)]
    for first, (_, send) in enumerate(shares):
        context.Process(target=_send_statuses, args=(send, at_once, found[first::readers]), daemon=True).start()
        send.close()
    read = [receive.recv() for receive, _ in shares]
    return [read[i % readers][i // readers] for i in range(len(found))]


def _send_statuses(send: Connection, at_once: Callable[[Path], Status], found: list[Path]) -> None:
    send.send([at_once(run) for run in found])


def status(run: Path, now: float | None = None) -> Status:
    """Return the status of a run at `now`, in Unix seconds."""
    now = time.time() if now is None else now
    recorded, lines = events.read(run), metrics.read_lines(run)
    beats = _newest_attempt(heartbeat.read(run))
    steps = _target(run)
    state, why = _state(recorded, beats, _silent_after(beats, lines), steps, now)
    account_of = account(recorded, metrics.with_dropped(run, lines))
    losses: dict[str, Any] = next((line for line in reversed(lines) if any(k.startswith("loss/") for k in line)), {})
    return Status(
        run=str(run),
        state=state,
        why=redact.text(why),
        step=max((line["step"] for line in lines), default=0),
        steps=steps,
        losses={key.split("/", 1)[1]: value for key, value in losses.items() if key.startswith("loss/")},
        goodput=account_of.ratio,
        restarts=max(account_of.attempts - 1, 0),
        age=max(now - min(beat.time for beat in beats), 0.0) if beats else None,
        log=str(_log(run)),
    )


def _newest_attempt(beats: list[heartbeat.Beat]) -> list[heartbeat.Beat]:
    """Return the heartbeats of the last attempt: earlier launches may have had more ranks."""
    newest = max(beats, key=lambda beat: beat.time, default=None)
    return [b for b in beats if newest is not None and b.attempt == newest.attempt]


def _target(run: Path) -> int | None:
    path = run / TEXTFILE
    found = _TARGET.search(path.read_text()) if path.exists() else None
    return int(float(found[1])) if found else None


def _silent_after(beats: list[heartbeat.Beat], lines: list[dict[str, Any]]) -> float:
    """Return the seconds of silence after which a run counts as silent in its ranks' current phase."""
    if any(beat.phase not in ("data", "step") for beat in beats) or not lines:
        return STARTUP_SECONDS
    known = [line["step_seconds"] / line["steps"] for line in lines[-20:] if line.get("steps")]
    return max(SILENT_SECONDS, 3 * statistics.median(known)) if known else STARTUP_SECONDS


def _state(
    recorded: list[dict[str, Any]], beats: list[heartbeat.Beat], limit: float, steps: int | None, now: float
) -> tuple[State, str]:
    """Return the state and its reason: by the last event of the run's life if that decides, else by the heartbeats."""
    life = [event for event in recorded if event["kind"] in LIFE]
    last: dict[str, Any] = life[-1] if life else {"kind": "none", "time": 0.0}
    heard = max((beat.time for beat in beats), default=0.0)
    ended = bool(beats) and all(beat.phase == "end" for beat in beats)
    match last["kind"]:
        case "finished":
            return "done", "finished"
        case "gave_up":
            return "failed", f"gave up: {last.get('why', '')}"
        case "failed" | "evicted":
            return _after_failure(last, life, now)
        case "signal":
            # The run was asked to stop; if its ranks were killed meanwhile, no "end" heartbeat will come.
            if ended or now - last["time"] > STARTUP_SECONDS:
                return "stopped", f"{last.get('signal', 'a signal')}: run it again to continue"
            return "stopping", f"{last.get('signal', 'a signal')}: writing a checkpoint, then exiting"
        case "launched" | "restarting" if now - max(last["time"], heard) <= STARTUP_SECONDS:
            return "waiting", f"{last['kind']}, no step yet"
    # From here on, the run makes steps or should do so.
    age = now - min((beat.time for beat in beats), default=last["time"])
    has_agent = any(event["kind"] == "launched" for event in life)
    if ended and not (has_agent and age <= SILENT_SECONDS):  # an agent records the end, a moment later
        is_done = steps is not None and max(beat.step for beat in beats) >= steps
        return ("done", "all ranks ended") if is_done else ("stopped", "all ranks ended: run it again to continue")
    # The oldest heartbeat counts: one hung rank holds up all others.
    if age > limit:
        slowest = min(beats, key=lambda beat: beat.time, default=None)
        who = f"rank {slowest.rank} on {slowest.host}, in {slowest.phase}" if slowest else "no heartbeat"
        return "silent", f"since {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(now - age))} UTC: {who}"
    return "running", f"in {beats[0].phase}" if beats else "no heartbeat yet"


def _after_failure(last: dict[str, Any], life: list[dict[str, Any]], now: float) -> tuple[State, str]:
    """Return the state after a failure: a restart follows, unless the user must fix an error or had stopped the run."""
    cause = str(last.get("cause") or f"{last['kind']}: {last.get('why', '')}")
    # Events of earlier launches say nothing about the end of this one.
    since_launch = life[max((i for i, e in enumerate(life) if e["kind"] in ("launched", "restarting")), default=0) :]
    is_final = cause.startswith("error: ") or any(event["kind"] == "signal" for event in since_launch)
    if is_final or now - last["time"] > STARTUP_SECONDS:
        return "failed", cause
    return "waiting", f"for a restart after: {cause}"


def _log(run: Path) -> Path:
    logs = [path for pattern in ("*.log", "*.out", "logs/*") for path in run.glob(pattern) if path.is_file()]
    return max(logs, key=lambda path: path.stat().st_mtime, default=run / events.EVENTS)


def table(found: list[Status]) -> "Table":
    """Return a table with one row per run."""
    from rich.table import Table
    from rich.text import Text

    from megamm.observability.report.timeline import duration

    rows = Table("run", "state", "step", "loss", "goodput", "restarts", "heartbeat", "log", box=None, pad_edge=False)
    for one in found:
        losses = " ".join(f"{name} {value:.3f}" for name, value in one.losses.items() if value is not None)
        cells = (
            one.run,
            one.state,
            f"{one.step}/{'?' if one.steps is None else one.steps}",
            losses or "-",
            "-" if one.goodput is None else f"{one.goodput:.1%}",
            str(one.restarts),
            "-" if one.age is None else f"{duration(one.age)} ago",
            one.log,
        )
        rows.add_row(*map(Text, cells))
    return rows


class Tail:
    """Reads new complete lines of a JSON-lines file. A replaced file is read again; known lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inode, self.offset, self.newest = -1, 0, float("-inf")

    def read(self) -> list[dict[str, Any]]:
        """Return the lines since the last call, oldest first."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                # A restart replaces metrics.jsonl (os.replace): another inode, whose first lines are known already.
                if found.st_ino != self.inode or found.st_size < self.offset:
                    self.inode, self.offset, known = found.st_ino, 0, self.newest
                else:
                    known = float("-inf")
                file.seek(self.offset)
                text = file.read()
        except FileNotFoundError:
            return []
        # The rest is a line that is being written; the next call reads it as a whole.
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        lines = [line for line in map(_parsed, whole.splitlines()) if line.get("time", 0.0) > known]
        self.newest = max([self.newest, *(line.get("time", 0.0) for line in lines)])
        return lines


def _parsed(text: bytes) -> dict[str, Any]:
    """Parse a line; {} for one that a kill cut off and that the next writer continued."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def follow(run: Path) -> Iterator[dict[str, Any]]:
    """Yield events and lines of metrics sorted by time, starting with the last earlier ones; end with the run."""
    tails = [Tail(run / events.EVENTS), Tail(run / metrics.METRICS)]
    is_first, looked = True, float("-inf")
    while True:
        new = sorted((line for tail in tails for line in tail.read() if line), key=lambda line: line.get("time", 0.0))
        yield from redact.values(new[-BEFORE:] if is_first else new)
        is_first = False
        if new or time.monotonic() - looked > STATUS_SECONDS:
            looked = time.monotonic()
            # More lines may have been written since the last read: read them before the end.
            if status(run).state in FINAL:
                yield from redact.values([line for tail in tails for line in tail.read() if line])
                return
        time.sleep(POLL)


def format_line(line: dict[str, Any]) -> str:
    """Format a line for people: time (UTC), then the fields."""
    at = time.strftime("%m-%d %H:%M:%S", time.gmtime(line.get("time", 0.0)))
    if "kind" in line:
        fields = ", ".join(f"{key} {value}" for key, value in line.items() if key not in ("time", "kind", "reports"))
        return f"{at}  {line['kind']}  {fields}".replace("\n", " ")
    losses = " ".join(f"{k} {v:.4f}" for k, v in line.items() if k.startswith(("loss/", "heldout/")) and v is not None)
    speed = f"  {line['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in line else ""
    goodput = f"  goodput {line['goodput']:.1%}" if "goodput" in line else ""
    return f"{at}  step {line['step']}  {losses}{speed}{goodput}"
