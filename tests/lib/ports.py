"""Ports for a server that another process starts a little later.

The kernel assigns client ports from its own range (Linux: 32768 and above): a free port from there may be taken before
its user has started, by any connection of a concurrent test. Ports below that range are never assigned automatically.
"""

import contextlib
import random
import socket

RANGE = range(20_000, 32_000)


def free_port(*addresses: str) -> int:
    """Return a port that is free on all these addresses; without any, on 127.0.0.1."""
    while True:
        port = random.SystemRandom().choice(RANGE)
        with contextlib.ExitStack() as stack:
            try:
                for address in addresses or ("127.0.0.1",):
                    stack.enter_context(socket.create_server((address, port)))
            except OSError:
                continue
            return port
