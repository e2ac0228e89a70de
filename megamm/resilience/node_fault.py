"""The one exception for hardware that the run should go on without, and what it makes of a node."""

import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from megamm.resilience import events

log = logging.getLogger(__name__)


class NodeFault(Exception):
    """These ranks compute wrongly or too slowly. Every rank raises it at the same step boundary, a checkpoint written.

    Their nodes leave the job, the others start again without them (agent.py).
    """

    def __init__(self, ranks: Sequence[int], why: str) -> None:
        self.ranks, self.why = list(ranks), why
        super().__init__(f"rank {', '.join(map(str, ranks))}: {why}")

    def nodes(self, ranks_per_node: int) -> set[int]:
        """Group ranks of the nodes of these ranks."""
        return {rank // ranks_per_node for rank in self.ranks}


def tell(run: Path, why: str, step: int | None, attempt: int) -> None:
    """Record and print that this node leaves the job: for people, and for the launcher that may drain it."""
    node = socket.gethostname()
    try:
        events.record(run, "evicted", node=node, why=why, step=step, attempt=attempt)
    except OSError as error:
        log.warning("the eviction could not be recorded: %s", error)
    print(f"error: node {node} is evicted: {why}; look at its hardware, then start again", file=sys.stderr, flush=True)
