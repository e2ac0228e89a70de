"""Rendezvous: another program's port and another job's are rejected with a clear error; the existing job continues."""

import contextlib
import errno
import json
import socket
import threading

import pytest
from ports import free_port
from rendezvous_nodes import TIMES, joined, node

from megamm.common.errors import UserError
from megamm.elastic.endpoint import listen, parse_endpoint
from megamm.elastic.rendezvous_client import check_same_job


def test_endpoints_are_parsed():
    assert parse_endpoint("node-1:1234") == ("node-1", 1234)
    assert parse_endpoint(" 10.0.0.1:0 ") == ("10.0.0.1", 0)
    assert parse_endpoint("[::1]:1234") == ("::1", 1234)
    assert parse_endpoint("[fe80::1%eth0]") == ("fe80::1%eth0", 29400)
    assert parse_endpoint("node-1") == ("node-1", 29400)


@pytest.mark.parametrize("endpoint", ["a:b:c", "::1", "", ":29400", "a b:1", "a:", "a:-1", "a:65536", "a:1x", "[::1]1"])
def test_what_is_not_an_endpoint(endpoint):
    with pytest.raises(UserError) as refused:
        parse_endpoint(endpoint)
    assert f"--rendezvous: '{endpoint}' " in str(refused.value) and "give HOST:PORT" in str(refused.value)


def test_only_the_host_listens_and_only_one_process_of_it():
    endpoint = f"127.0.0.1:{free_port()}"
    with contextlib.closing(listen(endpoint)):
        assert listen(endpoint) is None
    assert listen("no.invalid:29400") is None and listen("192.0.2.1:29400") is None


def test_a_port_that_needs_rights(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(UserError, match=r"cannot listen on the rendezvous port: Permission denied \(localhost:80\)"):
        listen("localhost:80")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"{}\n", b"{1\n", b'{"hell', b""])
def test_another_program_listens(answer):
    """It answers like a web server, with other JSON, with half a line, or ends each connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server, answer), daemon=True).start()
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"in use by another service \({endpoint}\); give another port"):
            node(endpoint)


def serve(server, answer):
    """Send each client the answer to what it says first, and close the connection."""
    while True:
        try:
            visitor, _ = server.accept()
            with visitor:
                visitor.recv(65536)
                visitor.sendall(answer)
        except OSError:
            return


def test_another_program_has_a_connection_from_that_port():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        endpoint = f"127.0.0.1:{client.getsockname()[1]}"
        with pytest.raises(UserError, match="in use by another program's connection"):
            node(endpoint)


JOB = {"nproc": 2, "nnodes": (1, 2), "config": {"train": {"steps": 8, "lr": 1e-3}, "output": "/data/a"}}


def test_a_node_of_another_job_is_refused_and_the_job_continues():
    endpoint = f"127.0.0.1:{free_port()}"
    with joined(endpoint, job=JOB) as first:
        other = {
            "nproc": 2,
            "nnodes": (2, 2),
            "config": {"train": {"steps": 9, "lr": 1e-3}, "output": "/data/a", "x": None},
        }
        with pytest.raises(UserError) as refused:
            node(endpoint, job=other)
        assert str(refused.value) == (
            "this node's job does not match the other nodes': config.train.steps is 8 there and 9 here; nnodes is "
            f"[1, 2] there and [2, 2] here ({endpoint}); start every node with the same config; give a different job "
            "another port in --rendezvous"
        )
        with contextlib.closing(node(endpoint, job=JOB)) as second:
            assert first.present() == 1 and not second.hosts_store


def test_differences_are_named_without_secrets_and_in_short():
    job = dict.fromkeys("abcde", 1) | {"url": "s3://me:first@bucket"}
    with pytest.raises(UserError, match=r"a is 1 there and 2 here; b is .* and 3 more"):
        check_same_job(job, "there", dict.fromkeys("abcde", 2) | {"url": "s3://me:other@bucket"})
    with pytest.raises(UserError, match=r"s3://\*\*\*@bucket") as refused:
        check_same_job(job, "there", dict.fromkeys("abcde", 1) | {"url": "s3://me:other@bucket"})
    assert "first" not in str(refused.value) and "other@" not in str(refused.value)


STRANGERS = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x00\xff" * 40 + b"\n",
    b"[" * 100_000 + b"\n",
    b'{"do": "join", "is_fresh": true, "trained": null}\n',
    b'{"do": "hello"}\n',
    b"5\n",
    b"x" * (1 << 21),
]
MEMBERS = [
    {"do": "join", "is_fresh": True, "trained": "?"},
    {"do": "largest", "round": 1, "key": "a", "value": float("inf"), "nodes": 1},
    {"do": "put", "round": [], "key": "a"},
    {"do": "hello"},
    {"do": ["join"]},
]


@pytest.mark.parametrize("after_hello", [False, True])
def test_who_sends_nonsense_is_disconnected_and_nothing_else_happens(after_hello):
    endpoint = f"127.0.0.1:{free_port()}"
    with joined(endpoint) as first:
        for message in MEMBERS if after_hello else STRANGERS:
            if after_hello:
                visitor = node(endpoint)
                visitor._send(**message)
                visitor._thread.join(TIMES.join_timeout)
                assert visitor._gone is not None
                continue
            with socket.create_connection(parse_endpoint(endpoint)) as stranger, contextlib.suppress(ConnectionError):
                stranger.settimeout(TIMES.join_timeout)
                stranger.sendall(message)
                rest = stranger.recv(65536)
                assert not rest or json.loads(rest).keys() == {"job"}
        first.send("key", "value")
        assert first.maximum("last", 3, 1) in (None, 3)
