"""Heartbeats: where every rank is, and when it last said so.

RUN/heartbeats/rank_00000.json is for people and other machines: written when the phase changes, and within the
alternation of "data" and "step" at most once a second. What this node's agent watches for hangs is shared memory
(slots.py), written at every beat. A rank that no agent has started writes the file only.
"""

import json
import os
import socket
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megamm.resilience import events
from megamm.resilience.slots import PHASES, Slot, Slots

HEARTBEATS = "heartbeats"
SLOTS, ATTEMPT = "MEGAMM_SLOTS", "MEGAMM_ATTEMPT"
"""Environment of a rank: "descriptor:ranks:index" of its slot, and the number of the attempt, from 0."""
_RECORD, _RECENT, _SECONDS = 1024, 32, 1.0


@dataclass(frozen=True)
class Beat:
    """A rank's last written heartbeat; time in Unix seconds, count is of its beats in this attempt.

    longest: recent seconds between two beats by what of TIMED they were for, of earlier attempts where need be.
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


class Heartbeat:
    """A rank's own; beats come from its main thread, so that they stop when it does."""

    def __init__(self, run: Path, rank: int, attempt: int, slot: Slot | None = None) -> None:
        path = run / HEARTBEATS / f"rank_{rank:05d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        before = _read(path) if attempt > 0 else None  # attempt 0 is another launch's successor, maybe of another job
        self.longest = dict(before.longest) if before is not None else {}
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self.rank, self.attempt, self.slot, self.host = rank, attempt, slot, socket.gethostname()
        self.count, self.written, self.since = 0, 0.0, time.monotonic()
        self.phase, self.first_step, self.is_warm = "", 0, False
        self.spent: dict[str, float] = {}
        """Seconds in each phase so far."""
        self._recent: dict[str, deque[float]] = {}

    def beat(self, phase: str, step: int) -> None:
        """This rank is alive and now in that phase of PHASES; step is the one in progress, else the last one done."""
        assert phase in PHASES, phase
        now, loop = time.monotonic(), ("data", "step")
        self.count += 1
        if self.phase in loop and self.first_step == 0:
            self.first_step = step
        self._measure(now - self.since)
        self.is_warm = self.is_warm or (self.first_step > 0 and (step > self.first_step or phase not in loop))
        changes = phase != self.phase and not (phase in loop and self.phase in loop)
        self.phase, self.since = phase, now
        if self.slot is not None:
            self.slot.write(self.count, phase, step, now, self.is_warm)
        if changes or now - self.written >= _SECONDS:
            self.written = now
            who = self.rank, os.getpid(), self.host
            beat = Beat(*who, phase, step, self.count, time.time(), self.attempt, self.longest)
            # One write of one length: a reader never sees half of it.
            os.pwrite(self.file, json.dumps(asdict(beat)).ljust(_RECORD - 1).encode() + b"\n", 0)

    def _measure(self, seconds: float) -> None:
        """The time since the last beat belongs to the phase that it began."""
        if not self.phase:
            return
        self.spent[self.phase] = self.spent.get(self.phase, 0.0) + seconds
        what = self.phase if self.is_warm or self.phase not in ("data", "step") else "first"
        recent = self._recent.setdefault(what, deque(maxlen=_RECENT))
        recent.append(seconds)
        self.longest[what] = round(max(recent), 3)
        if self.slot is not None:
            self.slot.set_longest(what, max(recent))

    def tell_first_step(self, run: Path, step: int) -> None:
        """Record that the attempt has done its first step, and how long everything until then took."""
        spent = self.spent | {self.phase: time.monotonic() - self.since}
        seconds = {phase: round(value, 3) for phase, value in spent.items()}
        events.record(run, "first_step", step=step, attempt=self.attempt, seconds=seconds)

    def close(self) -> None:
        os.close(self.file)


def of_this_rank(run: Path) -> Heartbeat:
    """This process's, as its environment says."""
    slot = None
    if SLOTS in os.environ:
        descriptor, ranks, index = map(int, os.environ[SLOTS].split(":"))
        slot = Slots(descriptor, ranks).ranks[index]
    return Heartbeat(run, int(os.environ.get("RANK", "0")), int(os.environ.get(ATTEMPT, "0")), slot)


def read(run: Path) -> list[Beat]:
    """The last heartbeat of every rank that ever wrote one to this run; what is not whole is left out."""
    found = [_read(path) for path in sorted((run / HEARTBEATS).glob("rank_*.json"))]
    return [beat for beat in found if beat is not None]


def _read(path: Path) -> Beat | None:
    try:
        return Beat(**json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError, TypeError):
        return None


def longest(run: Path) -> dict[str, float]:
    """Of all ranks that have written since the run was launched: Beat.longest. Empty if no launch is recorded."""
    launches = [event["time"] for event in events.read(run) if event["kind"] == "launched"]
    known: dict[str, float] = {}
    for beat in read(run):
        if launches and beat.time >= launches[-1]:
            known |= {what: max(seconds, known.get(what, 0.0)) for what, seconds in beat.longest.items()}
    return known
