"""Where the nodes of a job meet, HOST:PORT: what listens there has to be its rendezvous store, and of this very job.

Without these checks a port that another program has costs rendezvous.join seconds and a restart, again and again, and a
node with another config would train along, each rank by its own.
"""

import json
import socket
from collections.abc import Iterator
from typing import Any

from megamm import redact
from megamm.errors import UserError

PORT = 29400
"""Where none is given, as torch's."""
_ANSWER = 2.0
"""Seconds in which a store has to prove that it is one."""
_SHOWN = 3
"""Differences between two configs that are named."""


def parse(endpoint: str) -> tuple[str, int]:
    """Host and port, by torch's rules; UserError if there are none in it."""
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    try:
        return parse_rendezvous_endpoint(endpoint, default_port=PORT)
    except ValueError as error:
        raise UserError(f"--rendezvous: {error}", remedy="write HOST:PORT, the same on each node") from None


def check(endpoint: str) -> None:
    """UserError if something else has the port. Nothing there yet is all right: this node or another will listen."""
    host, port = parse(endpoint)
    remedy = "give the job another port, below the range of net.ipv4.ip_local_port_range"
    try:
        socket.create_connection((host, port), timeout=_ANSWER).close()
    except ConnectionRefusedError:
        if _is_of_this_machine(host) and _is_taken(port):
            raise UserError(
                "the port to meet at is taken by another program's connection", where=endpoint, remedy=remedy
            ) from None
    except OSError:
        return  # not reachable yet
    else:
        if not _is_store(host, port):
            raise UserError("what listens where nodes meet is no rendezvous", where=endpoint, remedy=remedy)


def _is_of_this_machine(host: str) -> bool:
    try:
        socket.create_server((host, 0)).close()
    except OSError:
        return False
    return True


def _is_taken(port: int) -> bool:
    """By an open connection, which keeps others from listening on that port."""
    import psutil

    there = [one.status for one in psutil.net_connections("tcp") if one.laddr and one.laddr.port == port]
    return psutil.CONN_ESTABLISHED in there and psutil.CONN_LISTEN not in there


def _is_store(host: str, port: int) -> bool:
    import datetime

    from torch.distributed import DistError, TCPStore

    try:
        TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=_ANSWER))
    except DistError as error:
        # Other errors are of stores that have just gone.
        return "Ping failed" not in str(error)
    return True


def agree(store: Any, endpoint: str, ours: dict[str, Any]) -> None:
    """The first node to come says what the job is; UserError in those that differ, which leave it undisturbed.

    store: a torch.distributed.Store; ours: JSON values by name, nested.
    """
    told: bytes = store.compare_set("job", "", json.dumps(ours))
    both = json.loads(told), json.loads(json.dumps(ours))
    differences = [f"{name} is {there} there and {here} here" for name, there, here in _differences(*both)]
    if differences:
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise UserError(
            f"the job of other nodes is another one: {redact.text('; '.join(differences[:_SHOWN]))}{more}",
            where=endpoint,
            remedy="start every node with the same config, or another job at another port",
        )


def _differences(theirs: Any, ours: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Dotted name, value there, value here."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            yield from _differences(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
    elif theirs != ours:
        yield name, json.dumps(theirs), json.dumps(ours)
