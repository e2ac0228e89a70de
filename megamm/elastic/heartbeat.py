"""Heartbeats: phase and step of every rank, and when it last reported them.

RUN/heartbeats/node_00000.json is for people and other machines: one file a node, with a line of JSON of constant length
for each of its ranks. A rank writes its line when the phase changes, and while "data" and "step" alternate at most once
a second. On a shared file system of a large job that is one file a node, which no other node writes. To detect hangs,
this node's agent reads shared memory (rank_status.py), which is written at every beat.
"""

import contextlib
import json
import os
import socket
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megamm.common import events
from megamm.elastic.rank_status import PHASES, HeartbeatPage, RankStatus

HEARTBEATS = "heartbeats"
ATTEMPT = "MEGAMM_ATTEMPT"
"""Variable in a rank's environment: the number of the attempt, from 0."""
GPU_WARM_UP = 3
"""First steps of an attempt on a GPU that do not show how long a step takes: kernels are compiled and loaded."""
_LINE_BYTES, _RECENT, _SECONDS = 1024, 32, 1.0
"""Bytes of a line, number of recent beats, and the shortest time between two writes while steps alternate with data."""
_FILES = ("node_*.json", "rank_*.json")
"""Names of files with heartbeats; runs of version 0.2 and earlier have one a rank."""


@dataclass(frozen=True)
class Beat:
    """A rank's last written heartbeat. time: Unix seconds; count: number of its beats in this attempt.

    longest: the longest recent seconds between two beats, by name in TIMED; from earlier attempts if not yet known.
    """

    rank: int
    pid: int
    host: str
    phase: str
    step: int
    count: int
    time: float
    attempt: int
    longest: dict[str, float] = field(default_factory=dict)
    is_compiling: bool = False


class Heartbeat:
    """Writes this rank's heartbeat. Beats come from the main thread, so that they stop when it stops."""

    def __init__(
        self,
        run: Path,
        rank: int,
        attempt: int,
        status: RankStatus | None = None,
        on_node: tuple[int, int] | None = None,
    ) -> None:
        """on_node: number of the node, and of the rank on it; None: all ranks write to one file."""
        node, self.line = on_node or (0, rank)
        path = run / HEARTBEATS / f"node_{node:05d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Before attempt 0 it is from another launch, perhaps another job.
        before = next((beat for beat in _read(path) if beat.rank == rank), None) if attempt > 0 else None
        self.longest = dict(before.longest) if before is not None else {}
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self.rank, self.attempt, self.status, self.host = rank, attempt, status, socket.gethostname()
        self.count, self.written, self.since = 0, 0.0, time.monotonic()
        self.phase, self.step, self.first_step, self.is_warm, self.is_compiling = "", 0, 0, False, False
        self.warm_up = 1
        """Number of first steps after which the usual time of a step is known."""
        self.spent: dict[str, float] = {}
        """Seconds in each phase so far."""
        self._recent: dict[str, deque[float]] = {}
        self._compiling_since = 0.0
        self._callbacks: Any = None
        """Torch's handler of compilations, which calls this object."""

    def beat(self, phase: str, step: int) -> None:
        """Report that this rank is alive and in this phase of PHASES. step: the one in progress, else the last done."""
        assert phase in PHASES, phase
        now, loop = time.monotonic(), ("data", "step")
        self.count += 1
        if self.phase in loop and self.first_step == 0:
            self.first_step = step
        self._measure(now - self.since)
        # Warm once the first steps are done: the next step begins, or a phase outside the loop follows the last one.
        done = step - self.first_step + (phase not in loop)
        self.is_warm = self.is_warm or (self.first_step > 0 and done >= self.warm_up)
        changes = phase != self.phase and not (phase in loop and self.phase in loop)
        self.phase, self.step, self.since = phase, step, now
        if self.status is not None:
            self.status.write(self.count, phase, step, now, self.is_warm)
        if changes or now - self.written >= _SECONDS:
            self._write(now)

    def _write(self, now: float) -> None:
        self.written = now
        beat = Beat(
            self.rank,
            os.getpid(),
            self.host,
            self.phase,
            self.step,
            self.count,
            time.time(),
            self.attempt,
            self.longest,
            self.is_compiling,
        )
        # A single write of constant length: a reader never sees half of it.
        text = json.dumps(asdict(beat)).ljust(_LINE_BYTES - 1).encode() + b"\n"
        os.pwrite(self.file, text, self.line * _LINE_BYTES)

    def set_on_gpu(self) -> None:
        """Report that this rank computes on a GPU: its first steps take longer, and its limits are longer."""
        self.warm_up = GPU_WARM_UP
        if self.status is not None:
            self.status.set_on_gpu()

    def watch_compilations(self) -> None:
        """Report every compilation of torch from now on: its time is not that of the step in which it happens."""
        from torch._dynamo.callback import callback_handler

        self._callbacks = callback_handler
        callback_handler.register_start_callback(self._begin_compilation)
        callback_handler.register_end_callback(self._end_compilation)

    def _begin_compilation(self, _: Any = None) -> None:
        self._compiling_since = time.monotonic()
        self._set_compiling(True)

    def _end_compilation(self, _: Any = None) -> None:
        self.since += time.monotonic() - self._compiling_since
        self._set_compiling(False)

    def _set_compiling(self, is_compiling: bool) -> None:
        self.is_compiling = is_compiling
        self.count += 1
        if self.status is not None:
            self.status.set_compiling(is_compiling, self.count)
        if self.is_warm:  # before that, the other nodes' limit is that of a start
            self._write(time.monotonic())

    def _measure(self, seconds: float) -> None:
        """Add the time since the last beat to the phase that it began."""
        if not self.phase:
            return
        self.spent[self.phase] = self.spent.get(self.phase, 0.0) + seconds
        what = self.phase if self.is_warm or self.phase not in ("data", "step") else "first"
        recent = self._recent.setdefault(what, deque(maxlen=_RECENT))
        recent.append(seconds)
        self.longest[what] = round(max(recent), 3)
        if self.status is not None:
            self.status.set_longest(what, max(recent))

    def tell_first_step(self, run: Path, step: int) -> None:
        """Record that the attempt has done its first step, and the seconds spent in each phase until then."""
        spent = self.spent | {self.phase: time.monotonic() - self.since}
        seconds = {phase: round(value, 3) for phase, value in spent.items()}
        events.record(run, "first_step", step=step, attempt=self.attempt, seconds=seconds)

    def ignore_compilations(self) -> None:
        """End `watch_compilations`."""
        if self._callbacks is not None:
            self._callbacks.remove_start_callback(self._begin_compilation)
            self._callbacks.remove_end_callback(self._end_compilation)
        self._callbacks = None

    def close(self) -> None:
        self.ignore_compilations()
        os.close(self.file)


def of_this_rank(run: Path) -> Heartbeat:
    """Return this process's heartbeat, configured by its environment."""
    shared = HeartbeatPage.of_this_rank()
    status = shared[1] if shared is not None else None
    rank, attempt = int(os.environ.get("RANK", "0")), int(os.environ.get(ATTEMPT, "0"))
    node, line = os.environ.get("GROUP_RANK"), os.environ.get("LOCAL_RANK")
    # A launcher that does not number nodes may start ranks on several: then the line is that of the rank in the job.
    on_node = (int(node), int(line)) if node is not None and line is not None else None
    return Heartbeat(run, rank, attempt, status, on_node)


def read(run: Path) -> list[Beat]:
    """Return the last heartbeat of every rank that ever wrote one to this run, by rank; incomplete ones are skipped."""
    last: dict[int, Beat] = {}
    for path in (path for name in _FILES for path in (run / HEARTBEATS).glob(name)):
        for beat in _read(path):
            # In another attempt a rank may have been on another node.
            if beat.rank not in last or beat.time > last[beat.rank].time:
                last[beat.rank] = beat
    return [last[rank] for rank in sorted(last)]


def _read(path: Path) -> list[Beat]:
    try:
        # Lines that no rank has written yet are zero bytes.
        lines = path.read_bytes().replace(b"\0", b"").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError, TypeError):
            found.append(Beat(**json.loads(line)))
    return found


def longest(run: Path) -> dict[str, float]:
    """Return the maximum of Beat.longest over all ranks that have written since the last recorded launch."""
    launches = [event["time"] for event in events.read(run) if event["kind"] == "launched"]
    known: dict[str, float] = {}
    for beat in read(run):
        if launches and beat.time >= launches[-1]:
            known |= {what: max(seconds, known.get(what, 0.0)) for what, seconds in beat.longest.items()}
    return known
