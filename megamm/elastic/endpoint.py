"""Checks of the rendezvous endpoint, HOST:PORT: a rendezvous store must listen there, and it must serve this job.

Without these checks a port used by another program would cost rendezvous.join_timeout seconds and a restart, each time,
and a node with a different config would train with the others, each rank by its own config.
"""

import json
import socket
from collections.abc import Iterator
from typing import Any

from megamm.common import redact
from megamm.common.errors import UserError

PORT = 29400
"""The default port, the same as torch's."""
_ANSWER = 2.0
"""Seconds within which a store must answer."""
_SHOWN = 3
"""Maximum number of differences between two configs that a message lists."""


def parse(endpoint: str) -> tuple[str, int]:
    """Return host and port, parsed by torch's rules; UserError if they are missing."""
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    try:
        return parse_rendezvous_endpoint(endpoint, default_port=PORT)
    except ValueError as error:
        raise UserError(f"--rendezvous: {error}", remedy="give HOST:PORT, the same on each node") from None


def check(endpoint: str) -> None:
    """Raise UserError if another program uses the port. A free port is fine: this node or another will listen on it."""
    host, port = parse(endpoint)
    remedy = "give another port in --rendezvous, below the range of net.ipv4.ip_local_port_range"
    try:
        socket.create_connection((host, port), timeout=_ANSWER).close()
    except ConnectionRefusedError:
        if _is_of_this_machine(host) and _is_taken(port):
            raise UserError(
                "rendezvous port is in use by another program's connection", where=endpoint, remedy=remedy
            ) from None
    except OSError:
        return  # not reachable yet
    else:
        if not _is_store(host, port):
            raise UserError("rendezvous port is in use by another service", where=endpoint, remedy=remedy)


def _is_of_this_machine(host: str) -> bool:
    try:
        socket.create_server((host, 0)).close()
    except OSError:
        return False
    return True


def _is_taken(port: int) -> bool:
    """Whether an open connection uses the port, which prevents listening on it."""
    import psutil

    there = [one.status for one in psutil.net_connections("tcp") if one.laddr and one.laddr.port == port]
    return psutil.CONN_ESTABLISHED in there and psutil.CONN_LISTEN not in there


def _is_store(host: str, port: int) -> bool:
    import datetime

    from torch.distributed import DistError, TCPStore

    try:
        TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=_ANSWER))
    except DistError as error:
        # Other errors come from stores that have just closed.
        return "Ping failed" not in str(error)
    return True


def agree(store: Any, endpoint: str, ours: dict[str, Any]) -> None:
    """Compare this node's job with that of the first node to join; UserError on a node that differs.

    The job of the other nodes is not affected. store: a torch.distributed.Store; ours: nested JSON values by name.
    """
    told: bytes = store.compare_set("job", "", json.dumps(ours))
    both = json.loads(told), json.loads(json.dumps(ours))
    differences = [f"{name} is {there} there and {here} here" for name, there, here in _differences(*both)]
    if differences:
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise UserError(
            f"this node's job does not match the other nodes': {redact.text('; '.join(differences[:_SHOWN]))}{more}",
            where=endpoint,
            remedy="start every node with the same config; give a different job another port in --rendezvous",
        )


def _differences(theirs: Any, ours: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield the dotted name, the value there and the value here of every difference."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            yield from _differences(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
    elif theirs != ours:
        yield name, json.dumps(theirs), json.dumps(ours)
