"""Nodes whose own names resolve to nothing, or to loopback: they find each other by address, or end in one line.

Two hosts are namespaces of this machine, with a name, an /etc/hosts and an address each (lib/network.py). The truth is
what ip(8) and /etc/hosts give them.
"""

import json
import subprocess
import sys

import network
import pytest
import warm
from tiny_run import environment, make_data, write_config

from megamm.common import addresses, events

LOCALHOST = "127.0.0.1 localhost\n"
TIMES = {"join_timeout": 100, "last_call_timeout": 0.5}
FIRST, SECOND = "192.0.2.1", "192.0.2.2"
OWN = {
    "no name resolves": (FIRST, [LOCALHOST, LOCALHOST]),
    "own names are loopback": (FIRST, [f"{LOCALHOST}127.0.0.1 node-a\n", f"{LOCALHOST}127.0.0.1 node-b\n"]),
    "Debian, given by name": (
        "node-a",
        [f"{LOCALHOST}127.0.1.1 node-a\n{SECOND} node-b\n", f"{LOCALHOST}{FIRST} node-a\n127.0.1.1 node-b\n"],
    ),
    "all have one name": (FIRST, [LOCALHOST, LOCALHOST]),
}
"""What each case gives as HOST, and the two /etc/hosts."""
needs_network = pytest.mark.skipif(not network.is_possible(), reason="network namespaces are not allowed here")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


def run_two(folder, case, command, seconds=240, **first):
    """Run the command on both hosts; return exit codes and logs. first: more keys of the first host."""
    names = ("localhost", "localhost") if case == "all have one name" else ("node-a", "node-b")
    specs = [
        {
            "name": names[i],
            "address": (FIRST, SECOND)[i],
            "names": OWN[case][1][i],
            "command": [str(word) for word in command],
            "variables": environment() | {"NODE": str(folder / str(i))},
            "log": str(folder / f"{i}.log"),
        }
        for i in range(2)
    ]
    specs[0] |= first
    return network.run_hosts(specs, seconds), [(folder / f"{i}.log").read_text() for i in range(2)]


@needs_network
@pytest.mark.everything
@pytest.mark.parametrize("case", OWN)
def test_two_nodes_train_together(data, tmp_path, case):
    """One job of two ranks, whose gradients, checkpoints and replicas cross the cable."""
    output = tmp_path / "run"
    config = write_config(
        data,
        output,
        train={"steps": 3, "eval_every": 0},
        checkpoint={"every": 1, "local": "$NODE"},
        resilience={"rendezvous": TIMES, "hang_seconds": 60, "max_restarts": 1},
    )
    endpoint = f"{OWN[case][0]}:29400"
    command = [sys.executable, "-m", "megamm", "train", config, "--nnodes", "2", "--rendezvous", endpoint]
    codes, logs = run_two(tmp_path, case, command)
    assert codes == [0, 0], logs
    kinds = [(event["kind"], event.get("ranks")) for event in events.read(output)]
    assert ("launched", 2) in kinds and "failed" not in dict(kinds), kinds
    assert "replicas on the next of 2 nodes" in "".join(logs) and "replica of step" not in "".join(logs), logs


@needs_network
@pytest.mark.everything
def test_the_doctor_compares_two_nodes(tmp_path):
    command = [sys.executable, "-m", "megamm", "doctor", "--json", "--nnodes", "2", "--rendezvous", f"{FIRST}:29400"]
    codes, logs = run_two(tmp_path, "no name resolves", [*command, "--output", tmp_path / "run"])
    assert codes == [0, 0], logs


@needs_network
@pytest.mark.everything
def test_a_spare_notices_that_all_others_are_lost(data, tmp_path):
    """The batch admits one node. It loses power; the spare, which hosts the rendezvous store, takes over."""
    output = tmp_path / "run"
    config = write_config(
        data,
        output,
        train={"steps": 200, "global_batch_size": 1, "eval_every": 0},
        checkpoint={"every": 20},
        resilience={"rendezvous": {"last_call_timeout": 15, "keep_alive_interval": 0.5}, "hang_seconds": 60},
    )
    command = [sys.executable, "-m", "megamm", "train", config, "--nnodes", "1:2", "--rendezvous", f"{SECOND}:29400"]
    until = str(output / "checkpoints" / "step_00000020")
    codes, logs = run_two(tmp_path, "no name resolves", command, until=until)
    assert codes == [-9, 0], logs
    assert "spare node: waiting to replace a lost node" in logs[1]
    shapes = [
        (event["ranks"], event["spares"])
        for event in events.read(output)
        if event["kind"] in ("launched", "restarting")
    ]
    assert shapes == [(1, 1), (1, 0)]


SHOW = """
import json, sys
from megamm.common import addresses
host = sys.argv[1]
print(json.dumps([addresses.is_this_node(host), addresses.own(host), addresses.gloo_interface(host)]))
"""


@needs_network
@pytest.mark.parametrize("case", OWN)
def test_addresses_are_those_of_the_cable(tmp_path, case):
    host = OWN[case][0]
    codes, logs = run_two(tmp_path, case, [sys.executable, "-c", SHOW, host], seconds=60)
    assert codes == [0, 0], logs
    assert [json.loads(log) for log in logs] == [[True, host, "ve-a"], [False, SECOND, "ve-b"]]


def test_loopback_is_this_machine():
    for host in ("localhost", "127.0.0.1", "127.0.0.7", "::1"):
        assert addresses.is_this_node(host) and addresses.own(host) == "127.0.0.1"
        assert addresses.gloo_interface(host) is None
    assert not addresses.is_this_node("no.invalid") and addresses.resolve("no.invalid") == []
    assert not addresses.is_loopback("localhost.example") and addresses.routed("no.invalid") is None


def test_a_host_that_does_not_resolve_ends_in_one_line(data):
    output = data / "unknown"
    config = write_config(data, output, resilience={"rendezvous": {"join_timeout": 2}})
    command = [sys.executable, "-m", "megamm", "train", config, "--nnodes", "2", "--rendezvous", "no.invalid:29400"]
    done = warm.run(list(map(str, command)), env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    assert [line for line in done.stderr.splitlines() if "WARNING" not in line] == [
        "error: gave up waiting for no.invalid: the name does not resolve here: "
        "resilience.rendezvous.join_timeout = 2 s is over; start the job again"
    ]
    assert ": waiting for no.invalid: the name does not resolve here, " in done.stderr


@needs_network
@pytest.mark.everything
def test_a_host_without_a_route_ends_in_one_line(data):
    output = data / "unreachable"
    config = write_config(data, output, resilience={"rendezvous": {"join_timeout": 2}})
    command = [sys.executable, "-m", "megamm", "train", config, "--nnodes", "2", "--rendezvous", f"{FIRST}:29400"]
    apart = [*network.APART, "sh", "-c", 'ip link set lo up; exec "$@"', "sh"]
    done = subprocess.run([*apart, *map(str, command)], env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    assert [line for line in done.stderr.splitlines() if "waiting for the node at 192.0.2.1:29400, " not in line] == [
        "error: gave up waiting for the node at 192.0.2.1:29400: "
        "resilience.rendezvous.join_timeout = 2 s is over; start the job again"
    ]
