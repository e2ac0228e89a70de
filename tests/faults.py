"""Faults injected into a real run from outside: nothing in megamm knows of them.

`environment("sigkill@step:3:1:0,...")` gives what a run's environment must have: kind@phase:step:rank:attempt, each of
the last three a number or *. A rank that beats its heart there (before the phase's work) suffers the fault, once. The
event "injected" is recorded first, so that detection and recovery can be timed.
"""

import ctypes
import os
import signal
import struct
import sys
import threading
import time
from pathlib import Path

FAULTS = "MEGAMM_FAULTS"
HOOK = Path(__file__).parent / "fault_hook"


class InjectedError(RuntimeError):
    """What "exception" raises."""


def environment(faults: str, base: dict[str, str]) -> dict[str, str]:
    """base with the faults and the hook that installs them."""
    path = os.pathsep.join([str(HOOK), str(HOOK.parent), base.get("PYTHONPATH", "")])
    return base | {FAULTS: faults, "PYTHONPATH": path}


def _exception():
    raise InjectedError("injected")


def _user_error():
    from megamm.errors import UserError

    raise UserError("an injected mistake", remedy="mend it")


def _deadlock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def parent(process):
    """Its parent's process id."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def _kill(process):
    """Kill it, and wait for what that does to this process."""
    os.kill(process, signal.SIGKILL)
    signal.pause()


def _until_asked(heart):
    """No fault: wait until the agent asks for a stop."""
    while struct.unpack_from("q", heart.slot.memory, 0)[0] == 0:
        time.sleep(0.01)


OF_HEARTS = {"until_asked": _until_asked}
"""Those that take the heartbeat."""
KINDS = {
    "sigkill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sigstop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sigsegv": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "exception": _exception,
    "user_error": _user_error,
    "exit0": lambda: sys.exit(0),
    "_exit0": lambda: os._exit(0),
    "deadlock": _deadlock,
    "hold_gil": lambda: sum(range(10**15)),  # one long call that neither gives up the GIL nor looks for signals
    "kill_template": lambda: _kill(os.getppid()),
    "kill_agent": lambda: _kill(parent(os.getppid())),
    "kill_command": lambda: _kill(parent(parent(os.getppid()))),
    "own_signal": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "sigterm": lambda: os.kill(parent(parent(os.getppid())), signal.SIGTERM),
}


def install():
    """Wrap the heartbeat of this process's runs."""
    from megamm.resilience import events
    from megamm.resilience.heartbeat import Heartbeat

    planned = [_parse(text) for text in os.environ[FAULTS].split(",")]
    plain_init, plain_beat = Heartbeat.__init__, Heartbeat.beat

    def init(self, run, *arguments):
        plain_init(self, run, *arguments)
        self.run = run

    def beat(self, phase, step):
        plain_beat(self, phase, step)
        here = (phase, str(step), str(self.rank), str(self.attempt))
        for fault in planned:
            kind, *place = fault
            if all(want in ("*", have) for want, have in zip(place, here, strict=True)):
                planned.remove(fault)
                events.record(self.run, "injected", fault=kind, phase=phase, step=step, rank=self.rank)
                OF_HEARTS[kind](self) if kind in OF_HEARTS else KINDS[kind]()

    Heartbeat.__init__, Heartbeat.beat = init, beat


def _parse(text):
    kind, _, place = text.partition("@")
    assert kind in KINDS or kind in OF_HEARTS, kind
    return kind, *place.split(":")
