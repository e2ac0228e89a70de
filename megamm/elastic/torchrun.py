"""Starts the processes of a command on this machine with torch's elastic launcher, and reports how they exited.

It is for short commands that can simply be run again; training runs use elastic/launcher.py.
"""

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence

from megamm.common.errors import UserError

OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun, and every other launcher of ranks, sets for each of them."""
_MORE = ("LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
_INTERFACES = "GLOO_SOCKET_IFNAME"
"""Variable with the network interfaces of gloo, separated by commas."""
_RUN_ID = "megamm"
_leftovers: dict[str, str] = {}
"""What `take_leftovers` has removed from this process's environment."""


def launch(arguments: Sequence[str], processes: int) -> None:
    """Run `python -m megamm ARGUMENTS` with `processes` ranks and wait.

    Raises SystemExit(2) if a rank exited with a user error (the rank has printed it), UserError if one died otherwise.
    """
    # Imported here: torch is not needed to reject a config.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Ranks share the cores; OMP_NUM_THREADS set by the user takes precedence.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # Its log lines would appear between a rank's own error line and ours.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="megamm-launch-") as folder:  # by default it leaves its own behind
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=processes,
                run_id=_RUN_ID,
                rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0",
                local_addr="127.0.0.1",
                max_restarts=0,
                monitor_interval=0.2,
                start_method="spawn",
                logs_specs=DefaultLogsSpecs(log_dir=folder),
            )
            elastic_launch(config, sys.executable)("-m", "megamm", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == 2:
            raise SystemExit(2) from None
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        raise UserError(
            f"rank {rank} (process {failure.pid}) exited with {how}; the other ranks were stopped",
            remedy="its output is above; run the same command again to resume from the last checkpoint",
        ) from None


def is_rank() -> bool:
    """Whether this process was started by a launcher as one rank of a job: all that torch needs to join it is set."""
    return all(name in os.environ for name in OF_A_RANK)


def is_own_rank() -> bool:
    """Whether `launch` has started this process."""
    return is_rank() and os.environ.get("TORCHELASTIC_RUN_ID") == _RUN_ID


def take_leftovers() -> None:
    """Remove variables of a rank from the environment if this process is not one; `check_environment` reports them.

    Pods of a training operator and jobs of a cloud have RANK, WORLD_SIZE and MASTER_ADDR of the node; shells keep what
    was exported once. Left alone, one of them would choose the GPU, silence the log, or make torch wait for others.
    """
    _leftovers.clear()
    if not is_rank():
        _leftovers.update({name: os.environ.pop(name) for name in (*OF_A_RANK, *_MORE) if name in os.environ})


def check_environment(processes: int, nodes: int, options: str) -> None:
    """Raise UserError if the environment and the options describe different jobs; print what is ignored.

    processes, nodes: the numbers asked for; options: their names, for the message.
    """
    if is_own_rank():
        return
    _check_interfaces()
    if is_rank():
        rank, world, local = (os.environ[name] for name in OF_A_RANK[:3])
        if not all(value.isdecimal() for value in (rank, world, local)) or int(rank) >= int(world):
            what = f"invalid environment of a rank: {_shown(os.environ)}"
            raise UserError(what, remedy=f"start it with torchrun, or unset {' '.join(OF_A_RANK[:3])}")
        if processes * nodes > 1:
            raise UserError(
                f"this process is rank {rank} of {world} of another launcher, which conflicts with {options}",
                where=_shown(os.environ),
                remedy=f"remove {options}, or unset {' '.join(OF_A_RANK[:3])} to start the job from here",
            )
        return
    found = _shown(_leftovers)
    # Job templates export empty values where there is nothing to set.
    if _leftovers.get("WORLD_SIZE") not in (None, "", "1") and nodes == 1:
        missing = ", ".join(name for name in OF_A_RANK if name not in _leftovers)
        raise UserError(
            f"the environment is that of a job with several nodes or ranks, not of one of its ranks ({missing} unset)",
            where=found,
            remedy="add --nnodes and --rendezvous on each node, start it with torchrun, or unset RANK WORLD_SIZE",
        )
    if found:
        print(f"note: ignoring {found} of the environment: not that of a rank", file=sys.stderr, flush=True)


def _check_interfaces() -> None:
    """Raise UserError for a network interface that this node lacks: every rank would fail, and be started again."""
    there = [name for _, name in socket.if_nameindex()]
    for name in filter(None, os.environ.get(_INTERFACES, "").split(",")):
        if name not in there:
            what = f"{_INTERFACES}={name} is not a network interface of this node"
            raise UserError(what, remedy=f"unset it, or set it to one of {', '.join(there)}")


def _shown(variables: Mapping[str, str]) -> str:
    return " ".join(f"{name}={variables[name]}" for name in OF_A_RANK[:3] if name in variables)
