"""A program for the fork server that imports next to nothing, for tests of the processes around it.

`python -m light_ranks CHANNEL LAUNCHER`, as megamm.train.ranks, which imports torch and Megatron-core.
"""

import socket
import sys

from megamm.elastic import prefork


def preload(_config, start_check):
    import numpy  # noqa: F401

    start_check(lambda _config: None)


def rank(_config):
    raise AssertionError("these tests start no ranks")


if __name__ == "__main__":
    prefork.serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), preload, rank)
