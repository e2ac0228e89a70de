"""One rank, from the fork of the template (prefork.py) to its exit code.

The environment is the same as torchrun's, so that torch.distributed finds the job. The job's store listens on a socket
that the agent has opened: no other process can take the port in between.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from megamm.common import exit_codes
from megamm.common.errors import UserError
from megamm.elastic.heartbeat import SLOTS
from megamm.elastic.node_fault import NodeFault
from megamm.elastic.rank_status import Slot, Slots

DUMP_SIGNAL = signal.SIGUSR2
"""Makes a rank write the stacks of all its threads, whatever it is doing."""
_LAST_SECONDS = 60.0
_CODES = {"done": exit_codes.RANK_DONE, "requeue": exit_codes.REQUEUE, "regroup": exit_codes.RANK_REGROUP}


Work = Callable[[dict[str, Any]], Literal["done", "requeue", "regroup"]]
"""What a rank does with the run's config; the result says why it ended without an error."""


@dataclass(frozen=True)
class Seat:
    """A rank's environment, the file for its stacks, and the listening socket of the job's store, or -1."""

    environment: dict[str, str]
    dump: int
    store_socket: int


def run(work: Work, config: dict[str, Any], seat: Seat) -> int:
    """Do a rank's work in its own process; return its exit code."""
    os.environ |= seat.environment
    descriptor, ranks, index = map(int, os.environ[SLOTS].split(":"))
    slot = Slots(descriptor, ranks).ranks[index]
    slot.identify(os.getpid(), threading.get_ident())
    faulthandler.enable()
    faulthandler.register(DUMP_SIGNAL, file=seat.dump, all_threads=True, chain=False)
    try:
        return _with_store(work, config, seat.store_socket)
    except UserError as error:
        slot.set_cause(f"error: {error}")
        if error.is_transient:
            return exit_codes.CRASHED
        # The agent prints the error of the first such rank and kills all ranks. This rank waits for that: if its
        # connections closed, the others would fail as well, each with a long traceback.
        if not error.on_all_ranks or os.environ["RANK"] == "0":
            slot.set_verdict(exit_codes.USER_ERROR)
        time.sleep(_LAST_SECONDS)
        return exit_codes.USER_ERROR
    except NodeFault as fault:
        slot.set_cause(str(fault))
        return code_of(fault)
    except SystemExit as ending:
        return _left(ending, slot)
    except BaseException as error:
        slot.set_cause(_in_one_line(error))
        traceback.print_exc()
        if not isinstance(error, Exception | KeyboardInterrupt):
            raise
        return exit_codes.CRASHED


def _with_store(work: Work, config: dict[str, Any], store_socket: int) -> int:
    import torch.distributed as dist

    # Keep the store until the end: it serves the whole job.
    server = None
    if store_socket >= 0:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        server = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=store_socket)
    ending = work(config)
    del server
    return _CODES[ending]


def code_of(fault: NodeFault) -> int:
    """Return the exit code for a node fault: this node leaves, or continues without others.

    If all nodes are named, the faulty one is unknown: that is a failure.
    """
    guilty, nodes = fault.nodes(int(os.environ["LOCAL_WORLD_SIZE"])), int(os.environ["GROUP_WORLD_SIZE"])
    if len(guilty) == nodes > 1:
        return exit_codes.CRASHED
    return exit_codes.RANK_EVICTED if int(os.environ["GROUP_RANK"]) in guilty else exit_codes.RANK_REGROUP


def _left(ending: SystemExit, slot: Slot) -> int:
    """Exit like the interpreter does, but keep the message as the cause of the failure."""
    if isinstance(ending.code, str):
        print(ending.code, file=sys.stderr)
    slot.set_cause(f"sys.exit({ending.code!r})")
    return ending.code if isinstance(ending.code, int) else int(ending.code is not None)


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({os.path.basename(last.filename)}:{last.lineno})"
