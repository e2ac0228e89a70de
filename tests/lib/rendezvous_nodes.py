"""Nodes of a rendezvous in this process, and helpers that wait for what they see."""

import contextlib
import time

from megamm.elastic.rendezvous import AttemptPlan, Times
from megamm.elastic.rendezvous_client import MultiNode

TIMES = Times(join_timeout=60, lost_timeout=60, last_call_timeout=0.05, keep_alive_interval=0.2)
PLAN = AttemptPlan(attempt=0, nodes=1, pause=0.0, address="127.0.0.1", port=1)


class Node(MultiNode):
    """A node with the name of a test; closing it leaves the job and ends its server."""

    def close(self):
        self.leave()
        if self._server is not None:
            self._server.stop()


def node(endpoint, nodes=(1, 2), times=TIMES, job=None):
    return Node(endpoint, nodes, times, job if job is not None else {"name": "job"})


@contextlib.contextmanager
def joined(endpoint, **options):
    """A first node in a round of its own; it hosts the server."""
    with contextlib.closing(node(endpoint, **options)) as first:
        assert first.join(is_fresh=True) == (0, 1)
        yield first


def wait_for(what, seconds=60.0):
    """Return the first true value of what()."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)
    return found
