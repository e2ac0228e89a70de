"""What the command tells a node's agent: the plan first, then which signals it has got; one JSON value a line."""

import json
import os
import select
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamm.resilience import exit_codes
from megamm.resilience.hang import Limits
from megamm.resilience.membership import Times
from megamm.resilience.policy import Rules


@dataclass(frozen=True)
class Plan:
    """Of one node. nodes: least and most; admissible: numbers of nodes that a layout can use; command: its process.

    rendezvous: "host:port", None for one node. is_fresh: the first agent of this command. grace in seconds.
    """

    config: dict[str, Any]
    processes: int
    nodes: tuple[int, int]
    admissible: tuple[int, ...]
    rendezvous: str | None
    command: int
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
    def from_json(cls, text: str) -> "Plan":
        given = json.loads(text)
        kinds: dict[str, Any] = {"rules": Rules, "limits": Limits, "times": Times}
        given |= {key: kind(**given[key]) for key, kind in kinds.items()}
        given |= {key: tuple(given[key]) for key in ("nodes", "admissible")}
        return cls(**given)


class Commands:
    """The pipe from the command. Its end ends this process at once, without a word to other nodes.

    The kernel does the same (processes.py), but closes a dying command's files first.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self._buffer = descriptor, b""

    def first_line(self) -> str:
        """Waits for it."""
        while b"\n" not in self._buffer:
            self._read()
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def wait(self, seconds: float, others: Iterable[Any] = ()) -> None:
        """Return when there is something to take, one of the other files is readable, or time is up."""
        if b"\n" not in self._buffer:
            watched: Sequence[Any] = [self.descriptor, *others]
            readable, _, _ = select.select(watched, [], [], seconds)
            if self.descriptor in readable:
                self._read()

    def take(self) -> str | None:
        """The name of a signal that the command has got, once for each; None if there is none new."""
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
