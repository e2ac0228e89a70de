"""The template of a node's ranks: a process that has imported everything a rank needs, and forks ranks on demand.

So a restart costs a fork instead of seconds of imports. It starts no threads of its own and touches no GPU: what a
fork would copy broken. It is driven by the agent (workers.py) through a socket, one JSON object a message:

    {"config": ..., "dumps": [descriptors]}        first; afterwards it imports, then says {"ready": seconds}
    {"start": [environment, ...]}   + store socket -> {"started": [process ids]}
    {"sweep": true}                                -> {"swept": number}: every process below it is gone
    on its own                                     -> {"exited": index, "status": exit code or -signal}
"""

import gc
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any, Literal

from megamm.resilience import processes
from megamm.resilience.rank import Seat, run

MESSAGE_BYTES = 1 << 20


def preload(device: Literal["auto", "cpu", "gpu"], engine: str) -> None:
    """Import what ranks use, for the device they will choose."""
    # Imported here: the agent imports this module for its constants, and stays small.
    from megamm import device as devices
    from megamm.cli.common import log_to_console

    log_to_console()
    if not devices.will_be_gpu(device):
        from megamm.mcore import cpu

        cpu.install()
    import torch._dynamo  # the first optimizer imports it: a second
    import torch.utils.tensorboard  # noqa: F401

    import megamm.mcore.engine
    import megamm.mcore.rng
    import megamm.mcore.store
    import megamm.train

    if engine == "deepspeed":
        import megamm.zero.engine  # noqa: F401
    assert not devices.is_initialized(), "an import has initialised the GPU: ranks could not be forked from here"


class Template:
    """Forks ranks, tells how they end, and removes what they leave."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        first = json.loads(channel.recv(MESSAGE_BYTES))
        self.config: dict[str, Any] = first["config"]
        self.dumps: list[int] = first["dumps"]
        self.ranks: dict[int, int] = {}

    def serve(self) -> None:
        """Until the agent closes the channel."""
        begin = time.monotonic()
        preload(self.config["device"], self.config["engine"])
        gc.freeze()  # no collection writes to pages that all ranks share
        wake, waker = os.pipe()
        for descriptor in (wake, waker):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(waker)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._say(ready=time.monotonic() - begin)
        while True:
            readable, _, _ = select.select([self.channel.fileno(), wake], [], [])
            if wake in readable:
                os.read(wake, 4096)
                self._reap()
            if self.channel.fileno() in readable:
                message, descriptors, _, _ = socket.recv_fds(self.channel, MESSAGE_BYTES, 1)
                if not message:
                    return
                self._obey(json.loads(message), descriptors)

    def _obey(self, message: dict[str, Any], descriptors: list[int]) -> None:
        if "start" in message:
            store = descriptors[0] if descriptors else -1
            for index, environment in enumerate(message["start"]):
                is_host = environment["RANK"] == "0"
                seat = Seat(environment, self.dumps[index], store if is_host else -1)
                self.ranks[self._fork(seat)] = index
            for descriptor in descriptors:
                os.close(descriptor)
            self._say(started=list(self.ranks))
        else:
            self._say(swept=self._sweep())

    def _fork(self, seat: Seat) -> int:
        template = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            processes.die_with_parent(template)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.channel.close()
            code = run(self.config, seat)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # not the template's own way out

    def _reap(self) -> None:
        """Collect the children that have ended so far."""
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            self._ended(process, status)

    def _ended(self, process: int, status: int) -> None:
        index = self.ranks.pop(process, None)
        if index is not None:  # else a rank had started it and left it behind
            self._say(exited=index, status=os.waitstatus_to_exitcode(status))

    def _sweep(self) -> int:
        """Kill everything below. What ranks had started comes to this process when they end, so: until none is left."""
        count = 0
        while left := processes.children(os.getpid()):
            for process in left:
                os.kill(process, signal.SIGKILL)
                self._ended(*os.waitpid(process, 0))
                count += 1
        return count

    def _say(self, **message: Any) -> None:
        self.channel.send(json.dumps(message).encode())


def main() -> None:
    """`python -m megamm.resilience.template CHANNEL AGENT`: a descriptor, and the process to end with."""
    channel, agent = map(int, sys.argv[1:])
    processes.die_with_parent(agent)
    processes.adopt_orphans()
    processes.ignore_stop_signals()
    Template(socket.socket(fileno=channel)).serve()


if __name__ == "__main__":
    main()
