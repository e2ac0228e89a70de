"""Ports on which something will listen a little later, by another process.

The kernel gives clients theirs from a range of its own (Linux: 32768 and above): a port found free there may be taken
before its user has started, by any connection of a test beside this one. Those below are given to nobody unasked.
"""

import contextlib
import random
import socket

RANGE = range(20_000, 32_000)


def free_port(*addresses: str) -> int:
    """One that is free on all of them; without any, on 127.0.0.1."""
    while True:
        port = random.SystemRandom().choice(RANGE)
        with contextlib.ExitStack() as stack:
            try:
                for address in addresses or ("127.0.0.1",):
                    stack.enter_context(socket.create_server((address, port)))
            except OSError:
                continue
            return port
