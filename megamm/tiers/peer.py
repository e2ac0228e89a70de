"""The local tier's helper process on each node: sends the node's files to other nodes and receives their replicas.

python -m megamm.tiers.peer PARENT      (started by local.py; reads its settings as a JSON line on stdin and exits when
                                         stdin closes; writes the TCP port as a JSON line to stdout)
"""

import json
import logging
import sys
from pathlib import Path

from megamm.resilience import processes
from megamm.tiers import wire


def main() -> None:
    """Serve until the process that started it exits or closes stdin."""
    processes.die_with_parent(int(sys.argv[1]))
    processes.ignore_stop_signals()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    told = json.loads(sys.stdin.readline())
    server = wire.Server(Path(told["root"]), bytes.fromhex(told["key"]), told["host"])
    print(json.dumps({"port": server.port}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
