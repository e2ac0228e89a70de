"""`megamm doctor --nnodes`: the faulty node of several is named, with its fault.

The nodes are processes of this machine, each with another fault: a different package, a slow connection, a read-only
folder. The judgement is also tested on figures of a large job.
"""

import itertools
import json
import shutil
import subprocess
import sys
import threading
import time

import pytest
import warm
from ports import free_port
from tiny_run import ROOT, environment

from megamm.common.device import gpus
from megamm.doctor import cluster, exchange, meeting
from megamm.doctor.exchange import Exchange
from megamm.doctor.findings import Node
from megamm.doctor.meeting import Lost, Meeting
from megamm.elastic.launcher import Nodes

PACE = 10_000_000
NODE = Node("stopped", ())
BROUGHT = {"facts": {}, "gpus": 0, "fit": True}


def other_version(folder):
    """Return a package that reports another version, within the range that megamm allows."""
    info = folder / "emoji-2.15.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: emoji\nVersion: 2.15.0\n")
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


def slow(folder):
    library = folder / "pace.so"
    source = ROOT / "tests" / "lib" / "stubs" / "pace.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "PACE": str(PACE)}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Return name -> (exit code, JSON, stderr) of four nodes, one of which is good."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to slow a node down with")
    folder = tmp_path_factory.mktemp("nodes")
    faults = {"good": {}, "other": other_version(folder), "slow": slow(folder), "full": {}}
    endpoint, started = f"127.0.0.1:{free_port()}", {}
    for name, fault in faults.items():
        output = "/proc/run" if name == "full" else folder / "run"
        command = [sys.executable, "-m", "megamm", "doctor", "--json", "--nnodes", "4", "--rendezvous", endpoint]
        started[name] = warm.start(
            [*command, "--output", str(output)],
            env=environment() | fault | {"SLURMD_NODENAME": name},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    told = {name: (process, *process.communicate(timeout=300)) for name, process in started.items()}
    return {name: (process.returncode, json.loads(out), err) for name, (process, out, err) in told.items()}


def test_a_bad_node_fails_alone(nodes):
    assert {name: code for name, (code, _, _) in nodes.items()} == {
        "good": 0,
        "other": 1,
        "slow": 1,
        "full": 1,
    }


def test_fault_and_remedy_are_in_one_line(nodes):
    lines = {name: err.splitlines() for name, (_, told, err) in nodes.items() if "nodes" not in told}
    words = {
        "other": ["emoji 2.15.0, most other nodes 2.", "install the versions of the other nodes on it"],
        "slow": ["GB/s in its best pair: below", "check its network"],
        "full": ["/proc/run", "not writable", "free space there"],
    }
    for name, told in lines.items():
        assert len(told) == (name in words), told
        assert all(told[0].startswith(f"bad node {name}: ") and word in told[0] for word in words.get(name, []))


def test_the_node_of_the_rendezvous_has_all(nodes):
    (whole,) = (told for _, told, _ in nodes.values() if "nodes" in told)
    by_name = {given["node"]: Node.from_json(given) for given in whole["nodes"]}
    assert {name: [f.check for f in node.faults] for name, node in by_name.items()} == {
        "good": [],
        "other": ["same versions"],
        "slow": ["bandwidth"],
        "full": ["output"],
    }
    checks = {f.check for f in by_name["good"].findings}
    assert {"output", "same versions", "time", "bandwidth"} <= checks
    # The slow node's connections carry what its kernel lets it send: no more, and not much less.
    pace = PACE / 1e9
    found = {f.check: f.text for f in by_name["slow"].findings}
    assert 0.3 * pace < float(found["bandwidth"].split()[0]) < 3 * pace
    assert 0.1 * pace < whole["all_reduce_gb_per_s"] < 3 * pace
    assert {f.verdict for f in by_name["full"].findings if f.check == "bandwidth"} == {"unknown"}


def test_a_node_that_does_not_come(tmp_path):
    command = [sys.executable, "-m", "megamm", "doctor", "--nnodes", "2", "--rendezvous", f"127.0.0.1:{free_port()}"]
    done = warm.run([*command, "--join", "0.2"], env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "network: only 1 of 2 nodes joined in time; check the node of 127.0.0.1:" in line


def test_clocks_and_latecomers(monkeypatch):
    """Three nodes of two to four; the clock of one is 90 s ahead. A node that arrives too late is rejected."""

    class Clock:
        monotonic, sleep = time.monotonic, time.sleep

        def time(self):
            return time.time() + (90.0 if threading.current_thread().name == "ahead" else 0.0)

    monkeypatch.setattr(meeting, "time", Clock())
    wanted = Nodes.parse("2:4", f"127.0.0.1:{free_port()}")
    host = Meeting(wanted, 1.0)
    ranks = {}

    def attend(name):
        other = Meeting(wanted, 5.0)
        other.gather(wanted, {"name": name})
        ranks[name] = other.rank
        other.tell_time()

    threads = [threading.Thread(target=attend, args=(name,), name=name) for name in ("ahead", "right")]
    for thread in threads:
        thread.start()
    everyone = host.gather(wanted, {"name": "host"})
    ahead = host.clocks(len(everyone))
    for thread in threads:
        thread.join()
    assert [node["name"] for node in everyone] == ["host", *sorted(ranks, key=ranks.get)]
    assert ahead[ranks["ahead"]] == pytest.approx(90.0, abs=0.5) and ahead[ranks["right"]] == pytest.approx(
        0.0, abs=0.5
    )
    verdicts = [finding.verdict for finding in cluster.times(ahead)]
    assert verdicts == ["wrong" if rank == ranks["ahead"] else "good" for rank in range(3)]
    with pytest.raises(Lost, match="too late"):
        Meeting(wanted, 1.0).gather(wanted, {})


def test_the_node_of_the_rendezvous_may_be_the_one_whose_clock_is_wrong():
    verdicts = [finding.verdict for finding in cluster.times([0.0, -7.0, -7.1, -6.9])]
    assert verdicts == ["wrong", "good", "good", "good"]


def test_a_node_that_comes_and_then_stops(monkeypatch):
    """It is named and does not keep the others waiting."""
    monkeypatch.setattr(meeting, "ANSWER", 0.3)
    wanted = Nodes.parse("2", f"127.0.0.1:{free_port()}")
    host = Meeting(wanted, 5.0)
    thread = threading.Thread(target=lambda: Meeting(wanted, 5.0).gather(wanted, BROUGHT | {"node": NODE.to_json()}))
    thread.start()
    everyone = host.gather(wanted, BROUGHT | {"node": Node("host", ()).to_json()})
    result = cluster._lead(host, everyone, None)
    thread.join()
    assert result.is_fit and [node.name for node in result.nodes] == ["host", "stopped"]
    assert [f.check for f in result.nodes[1].faults] == ["network"]
    assert result.lines() == ["bad node stopped: network: joined, then stopped responding; check the node"]


def test_no_place_to_meet(tmp_path):
    """A mistake in the option is the user's; an unknown host is a fault of the node."""
    command = [sys.executable, "-m", "megamm", "doctor", "--nnodes", "2", "--join", "0.5", "--rendezvous"]
    for endpoint, code, what in (
        ("a:b:c", 2, "error: --rendezvous: "),
        ("no.invalid:1", 1, "no response from no.invalid:1"),
    ):
        # The second in a new process: the command silences torch by a variable that torch reads when it is imported.
        start = warm.run if code == 2 else subprocess.run
        done = start([*command, endpoint], env=environment(), cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
        assert what in done.stderr


@pytest.mark.skipif(bool(gpus()), reason="the fault is a GPU that is not there")
def test_a_process_that_fails_is_told_to_the_others():
    """No node waits for a timeout: one node's process cannot start, and the other node is notified."""
    wanted = Nodes.parse("2", f"127.0.0.1:{free_port()}")
    host = Meeting(wanted, 5.0)
    found = {}

    def measure(rank, backend):
        job = exchange.ExchangeJob(host.host, host.port, backend, 1, (exchange.ExchangeGroup("pair/0-1", rank, 2),))
        found[rank] = exchange.measure(job, host.store)

    begin = time.monotonic()
    threads = [threading.Thread(target=measure, args=pair) for pair in ((0, "gloo"), (1, "nccl"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begin < exchange.STARTUP
    assert found[1]["pair/0-1"].bandwidth is None and "torch sees no GPU" in found[1]["pair/0-1"].why
    assert found[0]["pair/0-1"] == Exchange(None, found[1]["pair/0-1"].why, of_another=True)
    verdicts = [finding.verdict for finding in cluster.speeds([found[0], found[1]], ["a", "b"], None)]
    assert verdicts == ["unknown", "wrong"]


# --- judgement ---


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 33])
def test_pairs_of_a_round_are_disjoint_and_none_is_twice(count):
    drawn = cluster.rounds(range(10, 10 + count))
    assert len(drawn) == min(count - 1 + count % 2, cluster.ROUNDS)
    for pairs in drawn:
        members = list(itertools.chain(*pairs))
        assert len(members) == len(set(members)) == count - count % 2
    pairs = list(itertools.chain(*drawn))
    assert len(pairs) == len(set(pairs)) and all(i < j for i, j in pairs)


def figures(speeds):
    """Return figures of nodes that are as fast together as the slower of two; None: no value."""
    found = [{} for _ in speeds]
    for i, j in itertools.chain(*cluster.rounds(range(len(speeds)))):
        both = None if None in (speeds[i], speeds[j]) else min(speeds[i], speeds[j])
        for rank in (i, j):
            found[rank][f"pair/{i}-{j}"] = Exchange(both, "" if both else "timed out")
    return found


@pytest.mark.parametrize(
    ("speeds", "least", "bad"),
    [
        ([40, 41, 39, 40], None, []),
        ([40, 41, 15, 40], None, [2]),
        ([40, 41, 25, 40], None, []),
        ([40, 41, 25, 40], 30.0, [2]),
        ([40, 41, None, 40, 39], None, [2]),
        ([None] * 3, None, [0, 1, 2]),
        ([15, *[40] * 62, 15], None, [0, 63]),
        ([40, 10], None, []),
        ([40, 10], 30.0, [0, 1]),
    ],
)
def test_the_slow_node_is_named_and_no_other(speeds, least, bad):
    found = cluster.speeds(figures(speeds), [f"n{i}" for i in range(len(speeds))], least)
    assert [rank for rank, finding in enumerate(found) if finding.verdict == "wrong"] == bad
    if None in speeds and speeds[0] is not None:
        assert any(f.verdict == "warning" and "all-reduce with n2 failed: timed out" in f.text for f in found)
    if len(speeds) == 2 and bad:
        assert "the other may be the slow one" in found[0].text


def test_versions_that_differ():
    """The majority decides; in a tie, the node of the rendezvous. Missing packages are differences, too."""
    usual = {"torch": "2.13.0", "driver": "580.1"}
    found = cluster.same([usual | {"torch": "2.12.0"}, usual, usual, {"torch": "2.13.0"}])
    assert [f.verdict for f in found] == ["wrong", "good", "good", "wrong"]
    assert (
        found[0].text == "torch 2.12.0, most other nodes 2.13.0"
        and found[3].text == "driver missing, most other nodes 580.1"
    )
    assert [f.verdict for f in cluster.same([usual, usual | {"torch": "2.12.0"}])] == ["good", "wrong"]


def test_nodes_of_one_name_stay_apart():
    assert cluster.names(["a", "b", "a"]) == ["a#0", "b", "a#2"]
