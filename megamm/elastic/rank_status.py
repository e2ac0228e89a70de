"""Shared memory between a node's agent and its ranks: the progress of each rank, and the step after which all stop.

It is one anonymous file, created by the agent and mapped by every rank: a header, then one slot per local rank. Every
field is one aligned 8-byte word with a single writer. Times are seconds of CLOCK_MONOTONIC, which all processes of a
machine share.
"""

import mmap
import os
import struct
from typing import Literal

PHASES = ("start", "resume", "data", "step", "evaluate", "save", "wait", "end")
TIMED = (*PHASES, "first")
"""Names with a typical duration: the phases, and "first", all until the first step is done (it includes warm-up)."""
NO_STEP = -1
_NAMES = ("count", "step", "phase", "since", "entered", "pid", "thread", "warm", "verdict")
_WORDS = 8 * (len(_NAMES) + len(TIMED))
_SLOT = 4096
_TEXT = _SLOT - _WORDS - 8
_FIELDS = {name: 8 * i for i, name in enumerate(_NAMES)}
_LONGEST = 8 * len(_NAMES)

Ending = Literal["done", "requeue", "regroup"]
"""Why a rank's training ends: all steps are done, a signal, or a change of the job's nodes."""
_WHY: tuple[Ending, ...] = ("done", "requeue", "regroup")


class Slot:
    """Slot of one rank. The rank writes it, the agent reads it."""

    def __init__(self, memory: mmap.mmap, index: int) -> None:
        self.memory, self.begin = memory, _SLOT * (index + 1)

    def _integer(self, name: str) -> int:
        return struct.unpack_from("q", self.memory, self.begin + _FIELDS[name])[0]

    def _set_integer(self, name: str, value: int) -> None:
        struct.pack_into("q", self.memory, self.begin + _FIELDS[name], value)

    def clear(self) -> None:
        """Clear the slot for a new attempt."""
        self.memory[self.begin : self.begin + _SLOT] = bytes(_SLOT)
        self._set_integer("step", NO_STEP)
        self._set_integer("entered", NO_STEP)

    def identify(self, pid: int, thread: int) -> None:
        """Set the rank's process id and the identifier of its main thread (threading.get_ident)."""
        self._set_integer("pid", pid)
        self._set_integer("thread", thread)

    @property
    def pid(self) -> int:
        return self._integer("pid")

    @property
    def thread(self) -> int:
        return self._integer("thread")

    def write(self, count: int, phase: str, step: int, since: float, is_warm: bool) -> None:
        """Write the progress: beats so far, phase, step, time of the beat, and whether the first step is done."""
        self._set_integer("step", step)
        self._set_integer("phase", PHASES.index(phase))
        self._set_integer("warm", int(is_warm))
        struct.pack_into("d", self.memory, self.begin + _FIELDS["since"], since)
        self._set_integer("count", count)

    @property
    def count(self) -> int:
        return self._integer("count")

    @property
    def step(self) -> int | None:
        """The step in progress or last done; None before the run knows."""
        step = self._integer("step")
        return None if step == NO_STEP else step

    @property
    def phase(self) -> str:
        return PHASES[self._integer("phase")]

    @property
    def is_warm(self) -> bool:
        return bool(self._integer("warm"))

    def set_longest(self, what: str, seconds: float) -> None:
        """Set the longest recent time between two beats, for one of TIMED."""
        struct.pack_into("d", self.memory, self.begin + _LONGEST + 8 * TIMED.index(what), seconds)

    def longest(self) -> dict[str, float]:
        """Return the longest times measured in this attempt."""
        values = struct.unpack_from(f"{len(TIMED)}d", self.memory, self.begin + _LONGEST)
        return {name: value for name, value in zip(TIMED, values, strict=True) if value}

    def enter(self, step: int) -> None:
        """Write that this step begins next, before checking for a stop request."""
        self._set_integer("entered", step)

    @property
    def entered(self) -> int:
        return self._integer("entered")

    def set_cause(self, text: str) -> None:
        """Set the reason why the rank exits, in one line."""
        data = text.encode()[:_TEXT]
        place = self.begin + _WORDS
        struct.pack_into("q", self.memory, place, len(data))
        self.memory[place + 8 : place + 8 + len(data)] = data

    def set_verdict(self, code: int) -> None:
        """Set the exit code with which the rank will exit, for the cause set before."""
        self._set_integer("verdict", code)

    @property
    def verdict(self) -> int:
        """The announced exit code; 0 if the rank did not set one."""
        return self._integer("verdict")

    @property
    def cause(self) -> str:
        place = self.begin + _WORDS
        length = struct.unpack_from("q", self.memory, place)[0]
        return self.memory[place + 8 : place + 8 + length].decode(errors="replace")


class Slots:
    """All slots of a node, and the stop request of its agent."""

    def __init__(self, descriptor: int, ranks: int) -> None:
        self.descriptor = descriptor
        self.memory = mmap.mmap(descriptor, _SLOT * (ranks + 1))
        self.ranks = [Slot(self.memory, index) for index in range(ranks)]

    @classmethod
    def create(cls, ranks: int) -> "Slots":
        """Create a new, cleared file in memory; its descriptor can be passed to other processes."""
        descriptor = os.memfd_create("megamm-ranks")
        os.ftruncate(descriptor, _SLOT * (ranks + 1))
        slots = cls(descriptor, ranks)
        slots.clear()
        return slots

    def clear(self) -> None:
        """Clear all for a new attempt: no stop request, no progress."""
        self.memory[:_SLOT] = bytes(_SLOT)
        for slot in self.ranks:
            slot.clear()

    def ask_to_stop(self, why: Ending) -> None:
        """Request a stop (first half): from now on a rank about to begin a step waits until the last step is known."""
        struct.pack_into("q", self.memory, 0, _WHY.index(why))

    def stop_after(self, step: int) -> None:
        """Set the last step (second half): ranks continue to the end of this step (0 and up)."""
        struct.pack_into("q", self.memory, 8, step + 1)

    @property
    def asked(self) -> Ending | None:
        """Why to stop, None to continue."""
        why = struct.unpack_from("q", self.memory, 0)[0]
        return _WHY[why] if why else None

    @property
    def last_step(self) -> int | None:
        """The step to stop after, None while it is not known."""
        step = struct.unpack_from("q", self.memory, 8)[0]
        return step - 1 if step else None
