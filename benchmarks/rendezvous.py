"""Rendezvous of many nodes: seconds and requests for joining, for one death and for its return; torch's beside it.

Agents are the real client (megamm/elastic/rendezvous_client.py), two threads for each, in processes of at most 512; the
server is in a process of its own, as on the host of --rendezvous. death: one agent's connection ends, each of the
others reports lost ranks, as all would, and all join again without it. return: it comes back, which group rank 0
notices; all stop and join again. The last call (`resilience.rendezvous.last_call_timeout`) is part of death, in which
the largest number of nodes is not reached. A round counts when every node has the plan of group rank 0.

torch's c10d rendezvous gets the same number of agents, as threads of one process; its requests are reads and
writes of its state. Run: `python benchmarks/rendezvous.py [--nodes 32 256 2048] [--torch 8 16 32] [--json OUT]`.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megamm.elastic.membership import Membership
from megamm.elastic.rendezvous import AttemptPlan, RoundBroken, StoreLost, Times
from megamm.elastic.rendezvous_client import KEEP_ALIVES_MISSED, MultiNode
from megamm.elastic.rendezvous_server import RendezvousServer

TIMES = Times(join_timeout=600, lost_timeout=120, last_call_timeout=5.0, keep_alive_interval=2.0)
"""The defaults of `resilience.rendezvous`."""
JOB = {"name": "simulated"}
SHARE = 512
"""Agents of one process."""
SECONDS = 120.0
"""Limit of torch's rendezvous."""


def serve(least: int, most: int) -> None:
    """Serve a job; for each line of standard input print the requests so far. The first line has the port."""
    import socket

    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    lost_after = KEEP_ALIVES_MISSED * TIMES.keep_alive_interval
    server = RendezvousServer(listener, Membership((least, most), TIMES.last_call_timeout, lost_after), JOB)
    print(listener.getsockname()[1], flush=True)
    for _ in sys.stdin:
        print(server.requests, time.process_time(), flush=True)


def _planned(plan: AttemptPlan, all_fresh: bool) -> AttemptPlan:
    return plan


class Agents:
    """Agents of this process: each joins, agrees, and joins again when the round is lost or regroups."""

    def __init__(self, endpoint: str, nodes: tuple[int, int], count: int, total: int) -> None:
        self.endpoint, self.nodes, self.total = endpoint, nodes, total
        self.planned = threading.Semaphore(0)
        self.members: dict[int, MultiNode] = {}
        for index in range(count):
            threading.Thread(target=self.run, args=(index,), daemon=True).start()

    def run(self, index: int) -> None:
        one = MultiNode(self.endpoint, self.nodes, TIMES, JOB)
        self.members[index] = one
        is_fresh = True
        with contextlib.suppress(StoreLost):
            while True:
                rank, nodes = one.join(is_fresh)
                plan = AttemptPlan(0, nodes, 0.0, one.address, 1)
                try:
                    one.agree(partial(_planned, plan))
                except RoundBroken:
                    continue
                is_fresh = False
                self.planned.release()
                self.attempt(one, rank, nodes)

    def attempt(self, one: MultiNode, rank: int, nodes: int) -> None:
        """Wait like a node that trains: look at what others have sent twice a second, and stop with them."""
        while True:
            time.sleep(0.5)
            if one.lost_nodes():
                one.send("lost", f"of node {rank}: connection closed by peer")
                return
            if one.received("lost") is not None:
                return
            if rank == 0 and nodes < self.total and one.waiting():
                one.send("stop/regroup", "asked")
            if one.received("stop/regroup") is not None and one.maximum("entered", rank, nodes) is not None:
                return

    def kill(self) -> None:
        """End the connection of one agent that hosts no plan, without a word."""
        index = len(self.members) - 1
        self.members.pop(index)._connection.shutdown(2)

    def add(self) -> None:
        threading.Thread(target=self.run, args=(len(self.members),), daemon=True).start()


def take_part(endpoint: str, least: int, most: int, count: int) -> None:
    """Run agents; after `wait N` print when N of them have the plan of a round, `kill` and `add` change one."""
    agents = Agents(endpoint, (least, most), count, most)
    for line in sys.stdin:
        what, _, number = line.strip().partition(" ")
        if what == "wait":
            for _ in range(int(number)):
                agents.planned.acquire()
            print("ready", flush=True)
        elif what == "kill":
            agents.kill()
        elif what == "add":
            agents.add()


class Process:
    """One of the processes of the benchmark, which answers lines."""

    def __init__(self, *arguments: Any) -> None:
        command = [sys.executable, __file__, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit("error: a process of the benchmark has exited")
        return line.strip()


def measure(nodes: int) -> list[dict[str, Any]]:
    """Return the rows of one number of nodes: join, death, return."""
    server = Process("--serve", nodes // 2, nodes)
    started, rows = [server], []
    try:
        endpoint = f"127.0.0.1:{server.hear()}"
        shares = [min(SHARE, nodes - first) for first in range(0, nodes, SHARE)]
        before = [0.0, 0.0]

        def row(name: str, counts: list[int], act: Callable[[], None]) -> None:
            begin = time.monotonic()
            act()
            for process, count in zip(started[1:], counts, strict=True):
                process.say(f"wait {count}")
            for process in started[1:]:
                process.hear()
            seconds = time.monotonic() - begin
            server.say("requests")
            after = [float(value) for value in server.hear().split()]
            requests, busy = (new - old for new, old in zip(after, before, strict=True))
            before[:] = after
            rows.append(
                {"nodes": nodes, "event": name, "seconds": round(seconds, 2), "requests": int(requests)}
                | {"requests_per_node": round(requests / nodes, 1), "server_cpu_seconds": round(busy, 2)}
            )

        def start() -> None:
            for share in shares:
                started.append(Process("--endpoint", endpoint, nodes // 2, nodes, share))

        begin = time.monotonic()
        start()
        row("join", shares, lambda: None)
        rows[-1]["seconds"] = round(time.monotonic() - begin, 2)
        row("death", [*shares[:-1], shares[-1] - 1], lambda: started[-1].say("kill"))
        row("return", shares, lambda: started[-1].say("add"))
        return rows
    finally:
        for process in started:
            process.process.kill()
            process.process.wait()


def measure_torch(nodes: int) -> dict[str, Any]:
    """Return seconds and requests of a join of torch's c10d rendezvous; None for what did not end."""
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    unit, requests, lock = datetime.timedelta(seconds=1), [0], threading.Lock()

    class Counting(C10dRendezvousBackend):
        def get_state(self) -> Any:
            with lock:
                requests[0] += 1
            return super().get_state()

        def set_state(self, state: bytes, token: Any = None) -> Any:
            with lock:
                requests[0] += 1
            return super().set_state(state, token)

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    done = threading.Semaphore(0)

    def join() -> None:
        store = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
        limits = RendezvousTimeout(join=2 * SECONDS * unit, last_call=TIMES.last_call_timeout * unit)
        handler = DynamicRendezvousHandler.from_backend(
            "benchmark", store, Counting(store, "benchmark"), nodes, nodes, local_addr="127.0.0.1", timeout=limits
        )
        handler.next_rendezvous()
        done.release()
        threading.Event().wait()

    begin = time.monotonic()
    for _ in range(nodes):
        threading.Thread(target=join, daemon=True).start()
    ended = all(done.acquire(timeout=max(0.0, SECONDS - (time.monotonic() - begin))) for _ in range(nodes))
    row: dict[str, Any] = {"nodes": nodes, "event": "join", "seconds": None, "requests": requests[0]}
    return row | ({"seconds": round(time.monotonic() - begin, 2)} if ended else {"gave_up_after": SECONDS})


def main() -> None:
    """Run the benchmark, or the part of it that this process is for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="*", default=[32, 256, 2048])
    parser.add_argument("--torch", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--endpoint", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--one-torch", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(*given.serve)
    elif given.endpoint:
        take_part(given.endpoint[0], *map(int, given.endpoint[1:]))
    elif given.one_torch:
        print(json.dumps(measure_torch(given.one_torch)), flush=True)
        os._exit(0)  # its threads never end
    else:
        compare(given)


def compare(given: argparse.Namespace) -> None:
    """Print the table; write it with the measured environment."""
    ours = [row for nodes in given.nodes for row in measure(nodes)]
    command = [sys.executable, __file__, "--one-torch"]
    theirs = [
        json.loads(subprocess.run([*command, str(nodes)], capture_output=True, text=True, check=True).stdout)
        for nodes in given.torch
    ]
    for name, rows in (("megamm", ours), ("torch c10d", theirs)):
        for row in rows:
            print(name, *(f"{key} {value}" for key, value in row.items()), sep="  ")
    if given.json:
        load = round(os.getloadavg()[0], 1)
        where = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0)), "load_at_end": load}
        result = {"environment": where, "times": vars(TIMES), "megamm": ours, "torch_c10d": theirs}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
