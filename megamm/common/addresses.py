"""The address of a node for the other nodes of a job, found by routing: its own name may resolve to nothing useful.

On many hosts the own name resolves to loopback (Debian's 127.0.1.1), or not at all (cloud images, containers). The
address by which a node reaches the host of the rendezvous is one that the others can reach.
"""

import ipaddress
import socket

LOOPBACK = "127.0.0.1"
_ELSEWHERE = "192.0.2.1"
"""An address for documentation (RFC 5737), which is routed like any other: nothing is sent to it."""


def resolve(host: str) -> list[str]:
    """Return the addresses of the host, IPv4 first; [] if its name does not resolve."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)}
    except OSError:
        return []
    return sorted(found, key=lambda address: (":" in address, address))


def is_loopback(address: str) -> bool:
    """Whether it is a loopback address; not for names."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def is_local(host: str) -> bool:
    """Whether the host is given as loopback: all nodes are then on this machine."""
    return host == "localhost" or is_loopback(host)


def is_of_this_machine(address: str) -> bool:
    """Whether an address is one of this machine: only such an address can be listened on."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        socket.create_server((address, 0), family=family).close()
    except OSError:
        return False
    return True


def is_this_node(host: str) -> bool:
    """Whether a host, as given on all nodes, is this node. False if its name does not resolve here.

    A name that resolves to loopback is this node's only if its own name does, too.
    """
    if is_local(host):
        return True
    found, own = resolve(host), socket.gethostname()
    if any(is_of_this_machine(address) for address in found if not is_loopback(address)):
        return True
    return bool(found) and (host in (own, socket.getfqdn()) or bool(set(found) & set(resolve(own))))


def own(host: str) -> str:
    """Return this node's address for the other nodes. host: that of the rendezvous, which every node can reach."""
    if is_local(host):
        return LOOPBACK
    if is_this_node(host):
        return host
    found = routed(host)
    return socket.getfqdn() if found is None or is_loopback(found) else found


def routed(host: str) -> str | None:
    """Return the local address from which packets to the host would be sent; None without a route."""
    for address in resolve(host):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, 9))
            except OSError:
                continue
            return str(probe.getsockname()[0])
    return None


def gloo_interface(host: str) -> str | None:
    """Return the network interface that gloo should use, None if it finds one. host: that of the rendezvous.

    Gloo takes the interface of the host's own name. If that name is not of this machine, or loopback, it silently uses
    loopback, where no other node can reach it.
    """
    by_name = resolve(socket.gethostname())
    is_useful = any(map(is_of_this_machine, by_name)) and not any(map(is_loopback, by_name))
    if is_useful or is_local(host):
        return None
    import psutil

    for towards in (host, _ELSEWHERE):  # the second for a node whose name HOST resolves to loopback on itself
        address = routed(towards)
        if address is not None and not is_loopback(address):
            interfaces = psutil.net_if_addrs().items()
            return next((name for name, found in interfaces if address in (one.address for one in found)), None)
    return None
