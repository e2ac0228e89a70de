"""Shared memory between a node's agent and its ranks: the progress of each rank, and the step after which all stop.

It is one anonymous file, created by the agent and mapped by every rank: a header of the agent, then the status of each
local rank. Every field is one aligned 8-byte word with a single writer, so no lock is needed: a reader sees the old or
the new value, never a mixture. Times are seconds of CLOCK_MONOTONIC, which all processes of a machine share.
"""

import mmap
import os
import struct
from typing import Literal

PHASES = ("start", "resume", "data", "step", "evaluate", "save", "wait", "end")
TIMED = (*PHASES, "first")
"""Names with a typical duration: the phases, and "first", all until the first step is done (it includes warm-up)."""
NO_STEP = -1
HEARTBEAT_PAGE = "MEGAMM_SLOTS"
"""Variable in a rank's environment: "descriptor:ranks:index" of its status."""
_NAMES = ("count", "step", "phase", "since", "entered", "pid", "thread", "warm", "verdict", "gpu", "compiling")
# A status: an integer for each of _NAMES, a float for each of TIMED, then a text (length and UTF-8). The header: why to
# stop (index in _WHY; 0 for no stop), and the last step + 1 (0 while it is not known).
_WORDS = 8 * (len(_NAMES) + len(TIMED))
_STATUS_BYTES = 4096
"""Size of the header and of each status: one memory page."""
_TEXT = _STATUS_BYTES - _WORDS - 8
_FIELDS = {name: 8 * i for i, name in enumerate(_NAMES)}
_LONGEST = 8 * len(_NAMES)

ExitReason = Literal["done", "requeue", "regroup"]
"""Why a rank's training ends: all steps are done, a signal, or a change of the job's nodes."""
_WHY: tuple[ExitReason, ...] = ("done", "requeue", "regroup")


class RankStatus:
    """Progress of one rank. The rank writes it, the agent reads it."""

    def __init__(self, memory: mmap.mmap, index: int) -> None:
        self.memory, self.begin = memory, _STATUS_BYTES * (index + 1)

    def _integer(self, name: str) -> int:
        return struct.unpack_from("q", self.memory, self.begin + _FIELDS[name])[0]

    def _set_integer(self, name: str, value: int) -> None:
        struct.pack_into("q", self.memory, self.begin + _FIELDS[name], value)

    def clear(self) -> None:
        """Clear it for a new attempt."""
        self.memory[self.begin : self.begin + _STATUS_BYTES] = bytes(_STATUS_BYTES)
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
        """Write the progress: beats so far, phase, step, time of the beat, and whether the first step is done.

        The count comes last: a reader that sees a new count also sees the other new fields.
        """
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

    def set_on_gpu(self) -> None:
        """Write that the rank computes on a GPU."""
        self._set_integer("gpu", 1)

    @property
    def is_on_gpu(self) -> bool:
        return bool(self._integer("gpu"))

    def set_compiling(self, is_compiling: bool, count: int) -> None:
        """Write the begin or end of a compilation, which counts as a beat."""
        self._set_integer("compiling", int(is_compiling))
        self._set_integer("count", count)

    @property
    def is_compiling(self) -> bool:
        return bool(self._integer("compiling"))

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
        offset = self.begin + _WORDS
        struct.pack_into("q", self.memory, offset, len(data))
        self.memory[offset + 8 : offset + 8 + len(data)] = data

    def set_verdict(self, code: int) -> None:
        """Set the exit code with which the rank will exit, for the cause set before."""
        self._set_integer("verdict", code)

    @property
    def verdict(self) -> int:
        """The announced exit code; 0 if the rank did not set one."""
        return self._integer("verdict")

    @property
    def cause(self) -> str:
        offset = self.begin + _WORDS
        length = struct.unpack_from("q", self.memory, offset)[0]
        return self.memory[offset + 8 : offset + 8 + length].decode(errors="replace")


class HeartbeatPage:
    """The status of all ranks of a node, and the stop request of its agent (graceful_stop.py)."""

    def __init__(self, descriptor: int, ranks: int) -> None:
        self.descriptor = descriptor
        self.memory = mmap.mmap(descriptor, _STATUS_BYTES * (ranks + 1))
        self.ranks = [RankStatus(self.memory, index) for index in range(ranks)]

    @classmethod
    def create(cls, ranks: int) -> "HeartbeatPage":
        """Create a new, cleared file in memory; its descriptor can be passed to other processes."""
        descriptor = os.memfd_create("megamm-ranks")
        os.ftruncate(descriptor, _STATUS_BYTES * (ranks + 1))
        page = cls(descriptor, ranks)
        page.clear()
        return page

    @classmethod
    def of_this_rank(cls) -> "tuple[HeartbeatPage, RankStatus] | None":
        """Map the memory of the agent that started this rank; None for a rank that no agent started."""
        if HEARTBEAT_PAGE not in os.environ:
            return None
        descriptor, ranks, index = map(int, os.environ[HEARTBEAT_PAGE].split(":"))
        page = cls(descriptor, ranks)
        return page, page.ranks[index]

    def clear(self) -> None:
        """Clear all for a new attempt: no stop request, no progress."""
        self.memory[:_STATUS_BYTES] = bytes(_STATUS_BYTES)
        for status in self.ranks:
            status.clear()

    def ask_to_stop(self, why: ExitReason) -> None:
        """Request a stop (first half): from now on a rank about to begin a step waits until the last step is known."""
        struct.pack_into("q", self.memory, 0, _WHY.index(why))

    def stop_after(self, step: int) -> None:
        """Set the last step (second half): ranks continue to the end of this step (0 and up)."""
        struct.pack_into("q", self.memory, 8, step + 1)  # 0 means that it is not known

    @property
    def asked(self) -> ExitReason | None:
        """Why to stop, None to continue."""
        why = struct.unpack_from("q", self.memory, 0)[0]
        return _WHY[why] if why else None

    @property
    def last_step(self) -> int | None:
        """The step to stop after, None while it is not known."""
        step = struct.unpack_from("q", self.memory, 8)[0]
        return step - 1 if step else None
