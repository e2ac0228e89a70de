"""The local tier's helper process on each node: sends the node's files to other nodes and receives their replicas.

python -m megamm.checkpoint.storage.peer PARENT

local.py starts it. It reads its settings as a JSON line on stdin and exits when stdin closes; it writes the TCP port as
a JSON line to stdout.
"""

import json
import logging
import sys
from pathlib import Path

from megamm.checkpoint.storage import transfer
from megamm.common import processes


def main() -> None:
    """Serve until the process that started it exits or closes stdin."""
    processes.die_with_parent(int(sys.argv[1]))
    processes.ignore_stop_signals()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    told = json.loads(sys.stdin.readline())
    server = transfer.Server(Path(told["root"]), bytes.fromhex(told["key"]), told["host"])
    print(json.dumps({"port": server.port}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
