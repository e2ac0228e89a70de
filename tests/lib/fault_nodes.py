"""Faults between two nodes: the host of the rendezvous store ends, the network between them is cut for a while.

    python tests/lib/fault_nodes.py FOLDER lost_store|network_cut     a folder that fault_matrix.py has used

Two commands on this machine are the nodes, one rank each. For the cut each is in its own network namespace (with its
own host name), joined by a pair of virtual interfaces of which one goes down; that needs no root where unprivileged
user namespaces are allowed. The runs are checked like those of fault_matrix.py.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fault_matrix
import network
from fault_kinds import below, command_line
from faults import record
from ports import free_port

from megamm.common import events

RENDEZVOUS = ("join_timeout=60", "last_call_timeout=1", "keep_alive_interval=0.5")
STEP, SECONDS = 5, 240
HOSTS = {"node-a": "192.0.2.1", "node-b": "192.0.2.2"}
"""RFC 5737: reserved addresses; the namespaces have no route out."""


def wait_for(what, seconds=SECONDS):
    """Return the first true value of what()."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)
    return found


class Job:
    """Two nodes; rank 0 pauses once at STEP, so that a fault can be injected."""

    def __init__(self, folder: Path, name: str, endpoint: str) -> None:
        self.folder, self.name, self.output = folder, name, folder / name
        self.records = folder / f"{name}.records"
        command, self.env = fault_matrix.prepare(folder, name, f">pause@step:{STEP}:0:*")
        times = [f"resilience.rendezvous.{value}" for value in RENDEZVOUS]
        self.command = [*command, "--nproc", "1", "--nnodes", "2:2", "--rendezvous", endpoint, *times]
        self.nodes: list[subprocess.Popen] = []

    def start(self, how: Callable[..., subprocess.Popen] = subprocess.Popen) -> subprocess.Popen:
        """Start another node; how: starts a command, like subprocess.Popen."""
        with (self.folder / f"{self.name}.log").open("a") as log:
            self.nodes.append(how(self.command, env=self.env, stdout=log, stderr=log))
        return self.nodes[-1]

    @contextlib.contextmanager
    def paused(self, kind: str):
        """Inside the block, rank 0 is about to begin STEP."""
        wait_for((self.records / "paused").exists)
        record(self.output, kind, "step", STEP, 0, 0)
        yield
        (self.records / "paused").unlink()

    def failed(self):
        return [event for event in events.read(self.output) if event["kind"] == "failed"]

    def end(self) -> list[str]:
        """Wait; return the differences from the baseline run."""
        codes = [node.wait(timeout=SECONDS) for node in self.nodes]
        return fault_matrix.differences(self.folder, self.name, next(filter(None, codes), 0))

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()


def lost_store(folder: Path) -> list[str]:
    """The agent that hosts the store is killed -9; its command and the other node's agent have to recover."""
    endpoint = f"127.0.0.1:{free_port()}"
    job = Job(folder, "lost_store", endpoint)
    try:
        host = job.start()
        wait_for(lambda: _listens(endpoint))
        job.start()
        with job.paused("lost_store"):
            agent = next(p for p in below(host.pid) if "megamm.elastic.agent" in command_line(p))
            os.kill(agent, signal.SIGKILL)
        return job.end()
    finally:
        job.kill()


def _listens(endpoint):
    host, port = endpoint.split(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0


def network_cut(folder: Path) -> list[str]:
    """In a private namespace (see main): the link goes down in a step and comes back when that was detected."""
    job = Job(folder, "network_cut", "node-a:29400")
    text = "127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in HOSTS.items())
    try:
        network.lay_cable()
        for (name, address), link in zip(HOSTS.items(), network.LINKS, strict=True):
            hosts = job.records / f"{name}.hosts"
            hosts.write_text(text)
            job.start(partial(network.start_host, name, address, hosts, link))
        network.go(*job.nodes)
        with job.paused("network_cut"):
            network.ip("link", "set", network.LINKS[1], "down", within=job.nodes[1])
        wait_for(job.failed)
        network.ip("link", "set", network.LINKS[1], "up", within=job.nodes[1])
        return job.end()
    finally:
        job.kill()


def suffer_apart(folder: Path, kind: str) -> list[str]:
    """Return how a run under that fault differs from the baseline run; it uses namespaces if needed."""
    command = [*(network.APART if kind == "network_cut" else ()), sys.executable, __file__, str(folder), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * SECONDS)
    return done.stdout.splitlines() if done.returncode == 0 else [done.stderr.strip().splitlines()[-1]]


if __name__ == "__main__":
    print(*{"lost_store": lost_store, "network_cut": network_cut}[sys.argv[2]](Path(sys.argv[1])), sep="\n", end="")
