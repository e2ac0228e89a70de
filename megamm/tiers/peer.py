"""A process of each node beside the local tier: serves the node's files, copies new parts to a peer, removes old steps.

    python -m megamm.tiers.peer PARENT      (started by local.py; settings as JSON lines on stdin, its port on stdout)

A step may go when `keep` newer ones are complete on all nodes, replicas included; the first node's process counts.
Memory is bounded all the same: where replicas are slower than saves, the oldest steps go.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.tiers import parts, wire
from megamm.tiers.wire import Address, WireError

log = logging.getLogger(__name__)
POLL = 0.2
"""Seconds between looks for new parts."""
SLACK = 2
"""Steps that are kept beyond `keep` while they are not yet complete everywhere."""


@dataclass(frozen=True)
class Settings:
    """What the process is told once all nodes' processes have started. order: node ids; ranks: of this node."""

    node: str
    order: list[str]
    addresses: dict[str, Address]
    ranks: list[int]
    save: str
    keep: int
    replicate: bool

    @property
    def replica_node(self) -> str | None:
        """Where this node's parts are copied to."""
        if not self.replicate or len(self.order) == 1:
            return None
        return self.order[(self.order.index(self.node) + 1) % len(self.order)]


class Counter:
    """At the first node: the steps that every node has."""

    def __init__(self) -> None:
        self._have: dict[str, set[int]] = {}
        self._lock = threading.Lock()

    def told(self, request: dict[str, Any]) -> dict[str, Any]:
        """Note one node's steps ({"node", "steps", "nodes": how many there are}); those complete everywhere."""
        with self._lock:
            self._have[str(request["node"])] = set(request["steps"])
            if len(self._have) < int(request["nodes"]):
                return {"complete": []}
            return {"complete": sorted(set.intersection(*self._have.values()))}


class Keeper:
    """One node's loop."""

    def __init__(self, root: Path, key: bytes, settings: Settings) -> None:
        self.root, self.key, self.settings = root, key, settings
        self._copied: set[int] = set()
        self._complaint = ""

    def once(self) -> None:
        """Copy what is new, tell the first node, remove what may go."""
        try:
            written = self._written()
            self._replicate(written)
            ready = written if self.settings.replica_node is None else written & self._copied
            request = {"node": self.settings.node, "steps": sorted(ready), "nodes": len(self.settings.order)}
            first = self.settings.addresses[self.settings.order[0]]
            complete = wire.ask(first, self.key, {"do": "have"} | request)["complete"]
            self._complaint = ""
        except WireError as error:
            complete = []
            if error.where != self._complaint:
                log.warning("local tier: %s", error)
                self._complaint = str(error.where)
        self._remove_old(complete)

    def _written(self) -> set[int]:
        """Steps of which all of this node's ranks have written their part in this attempt."""
        s = self.settings
        wanted = set(s.ranks)
        return {step for step in parts.steps_in(self.root) if wanted <= {p.rank for p in self._own(step)}}

    def _own(self, step: int) -> list[parts.Part]:
        s = self.settings
        found = parts.parts_in(self.root / f"step_{step:08d}")
        return [part for part in found if part.node == s.node and part.save == s.save]

    def _replicate(self, written: set[int]) -> None:
        """The newest step that the peer has not got: if saves are faster than the line, those in between are left."""
        target = self.settings.replica_node
        missing = set(sorted(written)[-self.settings.keep :]) - self._copied
        if target is None or not missing:
            return
        step = max(missing)
        try:
            for part in self._own(step):
                wire.put(self.settings.addresses[target], self.key, self.root, step, part)
        except FileNotFoundError:
            return  # removed meanwhile
        self._copied.add(step)

    def _remove_old(self, complete: Sequence[int]) -> None:
        keep, steps = self.settings.keep, parts.steps_in(self.root)
        oldest = complete[-keep] if len(complete) >= keep else -1
        bounded = steps[: -(keep + SLACK)]
        for step in steps:
            if step < oldest or step in bounded:
                if step >= oldest:
                    log.warning("local tier: step %d goes before it was replicated; raise checkpoint.local_every", step)
                parts.remove(self.root, step)


def main(arguments: Sequence[str]) -> int:
    """Run until the parent ends or closes stdin."""
    parent = int(arguments[0])
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    first = json.loads(sys.stdin.readline())
    root, key = Path(first["root"]), bytes.fromhex(first["key"])
    server = wire.Server(root, key, first["host"], Counter().told)
    print(json.dumps({"port": server.port}), flush=True)
    line = sys.stdin.readline()
    if not line:
        return 1
    told = json.loads(line)
    told["addresses"] = {node: (host, int(port)) for node, (host, port) in told["addresses"].items()}
    keeper = Keeper(root, key, Settings(**told))
    while os.getppid() == parent:
        keeper.once()
        time.sleep(POLL)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
