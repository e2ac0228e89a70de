"""The endpoint of a rendezvous, HOST:PORT: parsing it, listening on it, and finding out who uses its port."""

import errno
import re
import socket

from megamm.common import addresses
from megamm.common.errors import UserError

PORT = 29400
"""The default port, the same as torch's."""
BACKLOG = 4096
"""Connections that may wait to be accepted: all nodes of a job come at once."""
OTHER_PORT = "give another port in --rendezvous, below the range of net.ipv4.ip_local_port_range"
_HOST = re.compile(r"[\w.-]+|\[[\w.:%-]+\]")


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Return host and port; an IPv6 address is written in brackets. Raises UserError if the endpoint is not valid."""
    host, colon, port = endpoint.strip(), "", ""
    if not host.endswith("]"):
        before, colon, port = host.rpartition(":")
        host, port = (before, port) if colon else (port, "")
    if not _HOST.fullmatch(host):
        what = f"'{endpoint}' does not name a host"
    elif colon and not (port.isascii() and port.isdecimal() and int(port) < 2**16):
        what = f"'{endpoint}' has no port between 0 and 65535"
    else:
        return host.strip("[]"), int(port) if colon else PORT
    remedy = "give HOST:PORT, the same on each node; write an IPv6 address in brackets"
    raise UserError(f"--rendezvous: {what}", remedy=remedy)


def listen(endpoint: str) -> socket.socket | None:
    """Listen on the port if the host is this node; None if it is not, or if another process listens there.

    Raises UserError if this process cannot listen for another reason.
    """
    host, port = parse_endpoint(endpoint)
    if not addresses.is_this_node(host):
        return None
    try:
        if addresses.is_local(host):
            address = (addresses.resolve(host) or [addresses.LOOPBACK])[0]
            return socket.create_server((address, port), family=_family(address), backlog=BACKLOG)
        # On all addresses: the host's own name may resolve to loopback (Debian), which other nodes cannot reach.
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
        return socket.create_server(("", port), backlog=BACKLOG)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            why = f"cannot listen on the rendezvous port: {error.strerror}"
            raise UserError(why, where=endpoint, remedy=OTHER_PORT) from None
    if is_taken(port):
        what = "rendezvous port is in use by another program's connection"
        raise UserError(what, where=endpoint, remedy=OTHER_PORT)
    return None


def is_taken(port: int) -> bool:
    """Whether an open connection uses the port, which prevents listening on it."""
    import psutil

    there = [one.status for one in psutil.net_connections("tcp") if one.laddr and one.laddr.port == port]
    return psutil.CONN_ESTABLISHED in there and psutil.CONN_LISTEN not in there


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
