"""Starts the processes of a command on this machine with torch's elastic launcher, and reports how they exited.

It is for short commands that can simply be run again; training runs use elastic/launcher.py.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Sequence

from megamm.common.errors import UserError


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
                run_id="local",
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
    """Whether this process was started by a launcher as one rank of a job."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
