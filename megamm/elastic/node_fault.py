"""The exception for faulty hardware that the run should continue without, and the eviction of its node."""

import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from megamm.common import events

log = logging.getLogger(__name__)


class NodeFault(Exception):
    """These ranks compute wrong results or are too slow. Every rank raises it at the same step, after a checkpoint.

    Their nodes leave the job; the others restart without them (agent.py).
    """

    def __init__(self, ranks: Sequence[int], why: str) -> None:
        self.ranks, self.why = list(ranks), why
        super().__init__(f"rank {', '.join(map(str, ranks))}: {why}")

    def nodes(self, ranks_per_node: int) -> set[int]:
        """Return the group ranks of the nodes of these ranks."""
        return {rank // ranks_per_node for rank in self.ranks}


def tell(run: Path, why: str, step: int | None, attempt: int) -> None:
    """Record and print that this node leaves the job, for people and for the launcher, which may drain it."""
    node = socket.gethostname()
    try:
        events.record(run, "evicted", node=node, why=why, step=step, attempt=attempt)
    except OSError as error:
        log.warning("cannot record the eviction: %s", error)
    print(f"error: node {node} is evicted: {why}; check its hardware, then restart it", file=sys.stderr, flush=True)
