"""The ranks of a run, as the fork server starts them: what they import before the fork, and what they do after it.

`python -m megamm.train.ranks CHANNEL LAUNCHER`: a descriptor, and the process to exit with (elastic/fork_server.py).
"""

import socket
import sys
from typing import TYPE_CHECKING, Any

from megamm.common import processes
from megamm.common.log import log_to_console
from megamm.config import config_from_dict
from megamm.elastic import prefork

if TYPE_CHECKING:
    from megamm.train.trainer import Ending


def preload(config: dict[str, Any]) -> None:
    """Import everything that ranks use on the device they will choose, without starting threads."""
    device, engine = config["device"], config["engine"]
    with processes.without_blas_threads():
        import numpy  # noqa: F401
    # Imported here: the launcher names this module too and must stay small.
    from megamm.common import device as devices
    from megamm.common.log import log_to_console

    log_to_console()
    if not devices.will_be_gpu(device):
        from megamm.mcore import cpu

        cpu.install()
    import torch._dynamo  # the first optimizer imports it: a second
    import torch.utils.tensorboard  # noqa: F401

    import megamm.engine.native
    import megamm.mcore.rng
    import megamm.mcore.store
    import megamm.train.trainer

    if engine == "deepspeed":
        import megamm.engine.deepspeed.engine  # noqa: F401
    assert not devices.is_initialized(), "an import has initialised the GPU: ranks cannot be forked from this process"


def train_rank(config: dict[str, Any]) -> "Ending":
    """Train as one rank of the job that the environment describes."""
    from megamm.train.trainer import train

    log_to_console()
    return train(config_from_dict(config, where="the launcher's config"))


def main() -> None:
    """Serve the launcher until it closes the channel."""
    channel, launcher = map(int, sys.argv[1:])
    prefork.serve(socket.socket(fileno=channel), launcher, preload, train_rank)


if __name__ == "__main__":
    main()
