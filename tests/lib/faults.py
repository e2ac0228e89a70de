"""Faults for real runs, on a cluster or in a test; megamm itself does not know them.

From outside, on the host of the rank, when it is in that phase and at that step or later:

    python tests/lib/faults.py RUN --kind sigstop --phase step --step 300 --rank 5

From inside, for faults that need the process itself, at an exact place: `environment("sigkill@step:3:1:0,...")`
returns a run's environment: kind@phase:step:rank:attempt, each of the last three a number or *. A rank whose
heartbeat reaches this place (before the phase's work) has the fault, once. "a>b": b only after a; "a>>b": in a later
attempt than a. The phase "write" is a save whose temporary folder exists. The event "injected" is recorded first, so
that detection and recovery can be timed.
"""

import argparse
import os
import socket
import sys
import threading
import time
from pathlib import Path

import fault_kinds

FAULTS, FOLDER = "MEGAMM_FAULTS", "MEGAMM_FAULTS_FOLDER"
HOOK = Path(__file__).parent / "fault_hook"
TEMPORARY = ".tmp-step_*"


def environment(faults: str, base: dict[str, str], folder: Path | None = None) -> dict[str, str]:
    """Return base with the faults and the hook that installs them.

    folder: for the rows that every rank reads (fault_kinds.record_rows) and the clock that "clock" sets.
    """
    path = os.pathsep.join([str(HOOK), str(HOOK.parent), base.get("PYTHONPATH", "")])
    where = {} if folder is None else {FOLDER: str(folder)}
    return base | {FAULTS: faults, "PYTHONPATH": path} | where


class Planned:
    """One fault. turn: after how many others, None for any time; is_later: in a later attempt than those."""

    def __init__(self, text, turn, is_later):
        self.kind, _, place = text.partition("@")
        assert self.kind in fault_kinds.INSIDE or self.kind in fault_kinds.OUTSIDE, self.kind
        self.phase, *self.place = place.split(":")
        self.turn, self.is_later, self.is_done = turn, is_later, False

    def matches(self, heart, phase, step):
        if self.is_done or phase != {"write": "save"}.get(self.phase, self.phase):
            return False
        have = (str(step), str(heart.rank), str(heart.attempt))
        return all(want in ("*", is_) for want, is_ in zip(self.place, have, strict=True)) and self.is_due(heart)

    def is_due(self, heart):
        from megamm.common import events

        if self.turn is None:
            return True
        before = [event["attempt"] for event in events.read(heart.run) if event["kind"] == "injected"]
        return len(before) == self.turn and not (self.is_later and heart.attempt in before)

    def begin(self, heart, step):
        self.is_done = True
        if self.phase == "write":
            before = set((heart.run / "checkpoints").glob(TEMPORARY))
            threading.Thread(target=self._in_write, args=(heart, step, before), daemon=True).start()
        else:
            self._inject(heart, step)

    def _in_write(self, heart, step, before):
        while not set((heart.run / "checkpoints").glob(TEMPORARY)) - before:
            time.sleep(0.0002)
        self._inject(heart, step)

    def _inject(self, heart, step):
        record(heart.run, self.kind, self.phase, step, heart.rank, heart.attempt)
        inside = fault_kinds.INSIDE.get(self.kind)
        inside(heart) if inside else fault_kinds.OUTSIDE[self.kind](heart.run, os.getpid())


def parse(text):
    """Parse the faults in the environment."""
    found = []
    for chain in text.split(","):
        parts = chain.split(">")
        faults = [i for i, part in enumerate(parts) if part]
        for turn, i in enumerate(faults):
            found.append(Planned(parts[i], turn if len(parts) > 1 else None, i > 0 and not parts[i - 1]))
    return found


def record(run, kind, phase, step, rank, attempt):
    from megamm.common import events

    events.record(run, "injected", fault=kind, phase=phase, step=step, rank=rank, attempt=attempt)


def install():
    """Wrap the heartbeat of this process's runs."""
    from megamm.elastic.heartbeat import Heartbeat

    planned = parse(os.environ[FAULTS])
    plain_init, plain_beat = Heartbeat.__init__, Heartbeat.beat
    # It may name variables: elements of an array of jobs differ in nothing else.
    folder = Path(os.path.expandvars(os.environ[FOLDER])) if FOLDER in os.environ else None
    if folder is not None:
        fault_kinds.follow_clock(folder)

    def init(self, run, *arguments):
        plain_init(self, run, *arguments)
        self.run, self.folder = run, folder
        if any(fault.kind == "nan" for fault in planned):  # it imports Megatron, which a single process cannot do yet
            fault_kinds.remember_engine(self)
        if folder is not None:
            fault_kinds.record_rows(self)

    def beat(self, phase, step):
        plain_beat(self, phase, step)
        fault_kinds.empty_disk(self.run)
        for fault in planned:
            if fault.matches(self, phase, step):
                fault.begin(self, step)

    Heartbeat.__init__, Heartbeat.beat = init, beat


def main():
    """Run the command line (see the module's docstring)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the run's output folder")
    parser.add_argument("--kind", required=True, choices=sorted(fault_kinds.OUTSIDE))
    parser.add_argument("--phase", default="step", help="start, resume, data, step, evaluate, save or end")
    parser.add_argument("--step", type=int, default=0, help="that one or a later one")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds to wait for phase and step")
    chosen = parser.parse_args()
    from megamm.elastic import heartbeat

    # "data" and "step" alternate faster than heartbeat files are written.
    phases = ("data", "step") if chosen.phase in ("data", "step") else (chosen.phase,)
    end = time.monotonic() + chosen.timeout
    while True:
        beats = [b for b in heartbeat.read(chosen.run) if b.rank == chosen.rank and Path(f"/proc/{b.pid}").exists()]
        if beats and beats[0].host != socket.gethostname():
            sys.exit(f"rank {chosen.rank} is on {beats[0].host}: start this there")
        if beats and beats[0].phase in phases and beats[0].step >= chosen.step:
            break
        if time.monotonic() > end:
            sys.exit(f"rank {chosen.rank} was not seen in {chosen.phase} at step {chosen.step}")
        time.sleep(0.01)
    beat = beats[0]
    record(chosen.run, chosen.kind, beat.phase, beat.step, beat.rank, beat.attempt)
    fault_kinds.OUTSIDE[chosen.kind](chosen.run, beat.pid)
    print(f"{chosen.kind}: rank {beat.rank} (process {beat.pid}), {beat.phase}, step {beat.step}")


if __name__ == "__main__":
    main()
