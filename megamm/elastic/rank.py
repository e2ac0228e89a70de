"""One rank, from its fork (prefork.py) to its exit code, and the exception for faulty hardware.

The environment is the same as torchrun's, so that torch.distributed finds the job. The job's store listens on a socket
that the agent has opened: no other process can take the port in between.
"""

import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.common import events, exit_codes
from megamm.common.errors import UserError
from megamm.elastic import flight_record
from megamm.elastic.rank_status import ExitReason, HeartbeatPage, RankStatus

log = logging.getLogger(__name__)
DUMP_SIGNAL = signal.SIGUSR2
"""Makes a rank write the stacks of all its threads, whatever it is doing."""
_LAST_SECONDS = 60.0
"""Seconds for which a rank with a user error waits to be killed."""
_CODES: dict[ExitReason, int] = {
    "done": exit_codes.RANK_DONE,
    "requeue": exit_codes.REQUEUE,
    "regroup": exit_codes.RANK_REGROUP,
}


RankProgram = Callable[[dict[str, Any]], ExitReason]
"""The program of a rank: it gets the run's config, and returns why it ended without an error."""


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


@dataclass(frozen=True)
class RankEnvironment:
    """A rank's variables, the file for its stacks, and the listening socket of the job's store, or -1."""

    variables: dict[str, str]
    dump: int
    store_socket: int


def run(program: RankProgram, config: dict[str, Any], environment: RankEnvironment) -> int:
    """Run a rank's program in this process; return its exit code."""
    os.environ |= environment.variables
    shared = HeartbeatPage.of_this_rank()
    assert shared is not None, "the prefork parent sets it"
    status = shared[1]
    status.identify(os.getpid(), threading.get_ident())
    faulthandler.enable()
    faulthandler.register(DUMP_SIGNAL, file=environment.dump, all_threads=True, chain=False)
    flight_record.serve(environment.dump)
    try:
        return _with_store(program, config, environment.store_socket)
    except UserError as error:
        status.set_cause(f"error: {error}")
        if error.is_transient:
            return exit_codes.CRASHED
        # The agent prints the error of the first such rank and kills all ranks. This rank waits for that: if its
        # connections closed, the others would fail as well, each with a long traceback.
        if not error.on_all_ranks or os.environ["RANK"] == "0":
            status.set_verdict(exit_codes.USER_ERROR)
        time.sleep(_LAST_SECONDS)
        return exit_codes.USER_ERROR
    except NodeFault as fault:
        status.set_cause(str(fault))
        return code_of(fault)
    except SystemExit as left:
        return _code_of_exit(left, status)
    except BaseException as error:
        status.set_cause(_in_one_line(error))
        traceback.print_exc()
        if not isinstance(error, Exception | KeyboardInterrupt):
            raise
        return exit_codes.CRASHED


def _with_store(program: RankProgram, config: dict[str, Any], store_socket: int) -> int:
    import torch.distributed as dist

    # Keep the store until the end: it serves the whole job.
    store = None
    if store_socket >= 0:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=store_socket)
    exit_reason = program(config)
    del store
    return _CODES[exit_reason]


def code_of(fault: NodeFault) -> int:
    """Return the exit code for a node fault: this node leaves, or continues without others.

    If all nodes are named, the faulty one is unknown: that is a failure.
    """
    guilty, nodes = fault.nodes(int(os.environ["LOCAL_WORLD_SIZE"])), int(os.environ["GROUP_WORLD_SIZE"])
    if len(guilty) == nodes > 1:
        return exit_codes.CRASHED
    return exit_codes.RANK_EVICTED if int(os.environ["GROUP_RANK"]) in guilty else exit_codes.RANK_REGROUP


def report_eviction(run: Path, why: str, step: int | None, attempt: int) -> None:
    """Record and print that this node leaves the job, for people and for the scheduler, which may drain it."""
    node = socket.gethostname()
    try:
        events.record(run, "evicted", node=node, why=why, step=step, attempt=attempt)
    except OSError as error:
        log.warning("cannot record the eviction: %s", error)
    print(f"error: node {node} is evicted: {why}; check its hardware, then restart it", file=sys.stderr, flush=True)


def _code_of_exit(left: SystemExit, status: RankStatus) -> int:
    """Return the code with which the interpreter would exit; keep the message as the cause of the failure."""
    if isinstance(left.code, str):
        print(left.code, file=sys.stderr)
    status.set_cause(f"sys.exit({left.code!r})")
    return left.code if isinstance(left.code, int) else int(left.code is not None)


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({os.path.basename(last.filename)}:{last.lineno})"
