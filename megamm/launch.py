"""Start processes of a command on this machine with torch's elastic launcher, and say plainly how they ended.

For what is short enough to be run again; a training run has resilience/supervisor.py.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Sequence

from megamm.errors import UserError


def launch(arguments: Sequence[str], processes: int) -> None:
    """Run `python -m megamm ARGUMENTS` as that many ranks and wait.

    Raises SystemExit(2) if a rank ended with a user error (it has printed the line itself), UserError if one
    died otherwise.
    """
    # Imported here: torch is not needed to refuse a config.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Ranks share the cores; an OMP_NUM_THREADS of the user's wins.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # Its reports would stand between a rank's own line and ours.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="megamm-launch-") as folder:  # it makes one that it does not remove
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
            f"rank {rank} (process {failure.pid}) ended with {how}; the other ranks were stopped",
            remedy="its output is above; the same command resumes from the last checkpoint",
        ) from None


def is_rank() -> bool:
    """Whether this process was started by a launcher as one rank of a job."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
