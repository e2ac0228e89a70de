"""Nodes that never come, or are lost and do not come back: a line, a limit, exit code 1; agents are real processes."""

import os
import signal
import socket
import sys
import time

import pytest
import warm
from ports import free_port
from tiny_run import environment, make_data, write_config

from megamm.common import events

TIMES = {"join_timeout": 60, "lost_timeout": 4, "last_call_timeout": 0.5, "keep_alive_interval": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture
def started():
    """Return a list of processes that are killed at the end."""
    processes = []
    yield processes
    for process in processes:
        process.kill()


def start(config, endpoint, name, started):
    command = [sys.executable, "-m", "megamm", "train", str(config), "--nnodes", "2:2", "--rendezvous", endpoint]
    with config.with_suffix(f".{name}.log").open("w") as log:
        started.append(warm.start(command, env=environment(), stdout=log, stderr=log))


def listens(port):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_node_that_waits_alone_from_the_start_ends_once(data, started):
    config = write_config(data, data / "alone", resilience={"rendezvous": TIMES | {"join_timeout": 2}})
    begin = time.monotonic()
    start(config, f"127.0.0.1:{free_port()}", "only", started)
    assert started[0].wait(timeout=240) == 1
    log = (data / "alone.only.log").read_text()
    assert log.count("error: gave up waiting for 1 of 2 nodes at 127.0.0.1:") == 1, log
    assert "resilience.rendezvous.join_timeout = 2 s is over" in log and "Traceback" not in log
    assert time.monotonic() - begin >= 2 and "restarting it" not in log


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.everything), 1])
def test_a_lost_node_that_does_not_return_ends_the_other(data, started, lost):
    """lost: 0 is the node with the rendezvous store. Its whole tree is killed, as by a power cut."""
    train = {"steps": 100000, "eval_every": 0}
    config = write_config(data, data / f"lost{lost}", train=train, resilience={"rendezvous": TIMES})
    port, deadline = free_port(), time.monotonic() + 400
    endpoint = f"127.0.0.1:{port}"
    start(config, endpoint, "0", started)
    while not listens(port):  # so that the first one hosts the store
        assert time.monotonic() < deadline and started[0].poll() is None
        time.sleep(0.05)
    start(config, endpoint, "1", started)
    while not any(e["kind"] == "first_step" for e in events.read(data / f"lost{lost}")):
        assert time.monotonic() < deadline and [node.poll() for node in started] == [None] * 2
        time.sleep(0.05)
    os.kill(started[lost].pid, signal.SIGKILL)
    assert started[1 - lost].wait(timeout=240) == 1
    log = (data / f"lost{lost}.{1 - lost}.log").read_text()
    assert log.count("gave up waiting for 1 of 2 nodes") == 1, log
    assert "resilience.rendezvous.lost_timeout = 4 s is over; start the job again" in log
    assert log.count(f"waiting for 1 of 2 nodes at {endpoint}, ") >= 2, log
