"""The ranks of a run, as the fork server starts them: what they import before the fork, and what they do after it.

`python -m megamm.train.ranks CHANNEL LAUNCHER [without-megatron]`: a descriptor, and the process to exit with
(elastic/fork_server.py).
"""

import logging
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from megamm.common import processes
from megamm.common.log import log_to_console
from megamm.config import config_from_dict
from megamm.elastic import prefork
from megamm.elastic.rank_status import ExitReason

log = logging.getLogger(__name__)
WITHOUT_MEGATRON = "without-megatron"
"""The argument of a fork server that leaves the import of Megatron-core to the ranks."""


def check(config: dict[str, Any]) -> None:
    """Check what needs the run's data, before its ranks start. UserError if the user must change something."""
    from megamm.train import checks

    checks.check(config_from_dict(config, where="the launcher's config"))


def preload(config: dict[str, Any], start_check: Callable[[prefork.Check], None]) -> None:
    """Import what ranks use on the device they will choose, without starting threads and without touching the GPU.

    start_check: called with `check` as soon as it can run.

    Megatron-core imports Transformer Engine and apex if they are installed, and such a package may initialise the GPU
    when it is imported. This process is then replaced by one that imports all but Megatron-core: each rank imports it
    itself, so that a restart takes longer, but every rank uses the same packages as without a fork server.
    """
    device, engine = config["device"], config["engine"]
    with processes.without_blas_threads():
        import numpy  # noqa: F401
    # Imported here: the launcher names this module too and must stay small.
    from megamm.common import device as devices

    log_to_console()
    if WITHOUT_MEGATRON not in sys.argv:
        import megamm.train.checks

        start_check(check)
    if not devices.will_be_gpu(device):
        from megamm.mcore import cpu

        cpu.install()
    import torch._dynamo  # the first optimizer imports it: a second
    import torch.utils.tensorboard  # noqa: F401

    import megamm.checkpoint
    import megamm.data.pipeline.loader  # noqa: F401

    if WITHOUT_MEGATRON not in sys.argv:
        _import_megatron(engine)
        if devices.is_initialized():
            log.warning(
                "an installed package initialises the GPU when imported: each rank imports Megatron-core itself"
            )
            sys.stderr.flush()
            os.execv(sys.executable, [*sys.orig_argv, WITHOUT_MEGATRON])
    assert not devices.is_initialized(), "an import has initialised the GPU: ranks cannot be forked from this process"


def _import_megatron(engine: str) -> None:
    """Import the rest: all that imports Megatron-core."""
    import megamm.engine.native
    import megamm.mcore.rng
    import megamm.mcore.store
    import megamm.train.trainer

    if engine == "deepspeed":
        import megamm.engine.deepspeed.engine  # noqa: F401


def train_rank(config: dict[str, Any]) -> ExitReason:
    """Train as one rank of the job that the environment describes."""
    from megamm.train.trainer import train

    log_to_console()
    return train(config_from_dict(config, where="the launcher's config"))


def main() -> None:
    """Serve the launcher until it closes the channel."""
    channel, launcher = map(int, sys.argv[1:3])
    prefork.serve(socket.socket(fileno=channel), launcher, preload, train_rank)


if __name__ == "__main__":
    main()
