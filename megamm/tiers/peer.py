"""A process of each node beside the local tier: gives the node's files to other nodes and takes replicas of theirs.

python -m megamm.tiers.peer PARENT      (started by local.py: what to serve as a JSON line on stdin, then its end;
                                         the TCP port as a JSON line on stdout)
"""

import json
import logging
import sys
from pathlib import Path

from megamm.resilience import processes
from megamm.tiers import wire


def main() -> None:
    """Until the process that started it ends or closes stdin."""
    processes.die_with_parent(int(sys.argv[1]))
    processes.ignore_stop_signals()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    told = json.loads(sys.stdin.readline())
    server = wire.Server(Path(told["root"]), bytes.fromhex(told["key"]), told["host"])
    print(json.dumps({"port": server.port}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
