"""A process that has imported what `megamm` commands import, and forks one for each request (warm.py starts it).

`python warm_server.py CHANNEL PARENT PADDING`: a descriptor of a SOCK_SEQPACKET socket, the process to end with, and
room for the arguments that the forked processes show. A request is one message:

    {"arguments": [...], "variables": {...}, "folder": ..., "new_session": bool}
    + descriptors: the status pipe, standard input, output and error

The pipe gets two lines: the process id from the new process, then the status returned by waitpid.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import sys

import warm_process

MESSAGE_BYTES = 1 << 20
LEFT_OUT = ("megamm.engine.deepspeed.",)
"""Imports DeepSpeed, which few commands use."""


def preload() -> None:
    """Import all of megamm, with Megatron-core as a CPU uses it."""
    from megamm.mcore import cpu

    cpu.install()
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401

    import megamm

    for module in pkgutil.walk_packages(megamm.__path__, "megamm."):
        if not module.name.endswith(("__main__", "._csrc", "._csrc_gpu")) and not module.name.startswith(LEFT_OUT):
            importlib.import_module(module.name)
    assert len(os.listdir("/proc/self/task")) == 1, "an import has started a thread, which a fork does not copy"


def serve(channel: socket.socket) -> tuple[dict, list[int]] | None:
    """Return None when the other end closes; in a forked process, its request and descriptors."""
    wake, waker = os.pipe()
    for descriptor in (wake, waker):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    pipes: dict[int, int] = {}
    while True:
        readable, _, _ = select.select([channel.fileno(), wake], [], [])
        if wake in readable:
            os.read(wake, 4096)
            reap(pipes)
        if channel.fileno() in readable:
            message, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 4)
            if not message:
                return None
            process = os.fork()
            if process == 0:
                request = json.loads(message)
                warm_process.show_as(request["arguments"])  # before others know of it
                tell(descriptors[0], os.getpid())
                return request, descriptors[1:]
            pipes[process] = descriptors[0]
            for descriptor in descriptors[1:]:
                os.close(descriptor)


def reap(pipes: dict[int, int]) -> None:
    """Report every process that has ended."""
    while pipes:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == 0:
            return
        tell(pipes[process], status)
        os.close(pipes.pop(process))


def tell(pipe: int, number: int) -> None:
    """Write the number; the process that requested it may be gone."""
    with contextlib.suppress(BrokenPipeError):
        os.write(pipe, f"{number}\n".encode())


def main() -> bool:
    """Serve; return True in a forked process, which is ready to run."""
    channel, parent = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    start = warm_process.Environment()
    from megamm.common import processes

    processes.die_with_parent(parent)
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
    preload()
    gc.collect()
    gc.freeze()
    server = os.getpid()
    request = serve(channel)
    if request is None:
        return False
    signal.signal(signal.SIGINT, interrupted)
    processes.die_with_parent(server)
    channel.detach()
    given, files = request
    processes.start_module = warm_process.start_module_from(start)
    warm_process.become(files=files, start=start, **given)
    return True


if __name__ == "__main__" and main():
    warm_process.run()
