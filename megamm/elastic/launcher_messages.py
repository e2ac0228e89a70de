"""Messages from the launcher to a node's agent: the plan as one JSON line, then the name of each received signal."""

import json
import os
import select
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamm.common import exit_codes
from megamm.elastic.hang_detector import Limits
from megamm.elastic.rendezvous import Times
from megamm.elastic.restart_policy import Rules


@dataclass(frozen=True)
class LaunchPlan:
    """LaunchPlan of one node. nodes: minimum and maximum; admissible: numbers of nodes that a layout can use.

    launcher_pid: process id of the launcher. endpoint: "host:port" of the rendezvous, None for one node. is_fresh:
    whether this is the first agent of the launcher. grace is in seconds.
    """

    config: dict[str, Any]
    processes: int
    nodes: tuple[int, int]
    admissible: tuple[int, ...]
    endpoint: str | None
    launcher_pid: int
    is_fresh: bool
    rules: Rules
    limits: Limits
    times: Times
    grace: float

    @property
    def run(self) -> Path:
        return Path(self.config["output"])

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "LaunchPlan":
        given = json.loads(text)
        kinds: dict[str, Any] = {"rules": Rules, "limits": Limits, "times": Times}
        given |= {key: kind(**given[key]) for key, kind in kinds.items()}
        # JSON has lists in place of tuples.
        given |= {key: tuple(given[key]) for key in ("nodes", "admissible")}
        return cls(**given)


class LauncherChannel:
    """The pipe from the launcher. When it closes, this process exits at once, without a message to other nodes.

    The kernel does the same (common/processes.py), but closes a dying launcher's files first.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self._buffer = descriptor, b""

    def first_line(self) -> str:
        """Wait for the first line and return it."""
        while b"\n" not in self._buffer:
            self._read()
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def wait(self, seconds: float, others: Iterable[Any] = ()) -> None:
        """Return when a signal can be taken, one of the other files is readable, or the time is up."""
        if b"\n" not in self._buffer:
            # Not select(), which knows only 1,024 descriptors: this process may have one for each node of a job.
            poll = select.poll()
            for one in (self.descriptor, *others):
                poll.register(one, select.POLLIN)
            if any(descriptor == self.descriptor for descriptor, _ in poll.poll(1000 * seconds)):
                self._read()

    def take_signal(self) -> str | None:
        """Return the name of the next signal that the launcher received; None if there is no new one."""
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline:
            return None
        self._buffer = rest
        return line.decode()

    def _read(self) -> None:
        data = os.read(self.descriptor, 65536)
        if not data:
            os._exit(exit_codes.CRASHED)
        self._buffer += data
