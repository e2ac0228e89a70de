"""Rendezvous: another program's port and another job's are rejected with a clear error; the existing job continues."""

import datetime
import socket
import threading

import pytest
from ports import free_port
from torch.distributed import TCPStore

from megamm.common.errors import UserError
from megamm.elastic.rendezvous import check_endpoint, check_same_job, parse_endpoint


@pytest.fixture
def store():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=10))


def test_endpoints_are_parsed():
    assert parse_endpoint("node-1:1234") == ("node-1", 1234)
    assert parse_endpoint("[::1]:1234") == ("::1", 1234)
    assert parse_endpoint("node-1") == ("node-1", 29400)
    with pytest.raises(UserError, match=r"--rendezvous: .* 'a:b:c'.*give HOST:PORT"):
        parse_endpoint("a:b:c")


def test_a_store_nothing_yet_and_an_unknown_host_are_all_right(store):
    check_endpoint(f"127.0.0.1:{store.port}")
    check_endpoint(f"127.0.0.1:{free_port()}")
    check_endpoint("no.invalid:29400")


def test_another_program_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"in use by another service \({endpoint}\); give another port"):
            check_endpoint(endpoint)


def answer(server):
    """Send each client the answer of a web server to an invalid request."""
    while True:
        try:
            visitor, _ = server.accept()
            visitor.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        except OSError:
            return


def test_another_program_has_a_connection_from_that_port():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        endpoint = f"127.0.0.1:{client.getsockname()[1]}"
        with pytest.raises(UserError, match="in use by another program's connection"):
            check_endpoint(endpoint)


def test_nodes_agree_on_the_job(store):
    job = {"nproc": 2, "nnodes": (1, 2), "config": {"train": {"steps": 8, "lr": 1e-3}, "output": "/data/a"}}
    for _ in range(2):
        check_same_job(store, "there", job)
    other = {
        "nproc": 2,
        "nnodes": (2, 2),
        "config": {"train": {"steps": 9, "lr": 1e-3}, "output": "/data/a", "x": None},
    }
    with pytest.raises(UserError) as refused:
        check_same_job(store, "there", other)
    assert str(refused.value) == (
        "this node's job does not match the other nodes': config.train.steps is 8 there and 9 here; nnodes is [1, 2] "
        "there and [2, 2] here (there); start every node with the same config; give a different job another port in "
        "--rendezvous"
    )
    check_same_job(store, "there", job)


def test_differences_are_named_without_secrets_and_in_short(store):
    check_same_job(store, "there", dict.fromkeys("abcde", 1) | {"url": "s3://me:first@bucket"})
    with pytest.raises(UserError, match=r"a is 1 there and 2 here; b is .* and 3 more"):
        check_same_job(store, "there", dict.fromkeys("abcde", 2) | {"url": "s3://me:other@bucket"})
    with pytest.raises(UserError, match=r"s3://\*\*\*@bucket") as refused:
        check_same_job(store, "there", dict.fromkeys("abcde", 1) | {"url": "s3://me:other@bucket"})
    assert "first" not in str(refused.value) and "other@" not in str(refused.value)
