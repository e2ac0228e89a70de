"""Binds a process to the CPUs near its GPU: the NUMA node whose memory and PCI bus the GPU is attached to.

Otherwise copies between host and GPU, and launches, cross the link between the sockets. Memory follows: Linux takes it
from the node of the CPU that first touches it. Source: the kernel's Documentation/ABI/testing/sysfs-bus-pci.
"""

import os
from pathlib import Path

SYSFS = Path("/sys")


def bind_near(pci_address: str | None, sysfs: Path = SYSFS) -> str:
    """Bind this thread, and all that it starts later, to the CPUs of a PCI device's node; return a line for the log.

    pci_address: such as 0000:1b:00.0. CPUs that this process may not use stay excluded, and if a scheduler or the user
    has restricted it to a part of the node, or to other nodes, nothing changes.
    """
    if pci_address is None:
        return "CPUs not bound: the GPU's PCI address is unknown"
    node = _node_of(pci_address, sysfs)
    if node is None:
        return f"CPUs not bound: the system does not name the NUMA node of the GPU at {pci_address}"
    near = cpus(sysfs / f"devices/system/node/node{node}/cpulist")
    allowed = os.sched_getaffinity(0)
    if not near < allowed:
        return f"CPUs not bound: the process may use {len(allowed)} CPUs, not all {len(near)} of node {node} and others"
    os.sched_setaffinity(0, near)
    return f"bound to the {len(near)} CPUs of NUMA node {node}, that of the GPU at {pci_address}"


def _node_of(pci_address: str, sysfs: Path) -> int | None:
    """Return the number of the device's node; None if the system does not know it."""
    file = sysfs / "bus/pci/devices" / pci_address.lower() / "numa_node"
    number = int(file.read_text()) if file.exists() else -1
    return number if number >= 0 else None


def cpus(file: Path) -> set[int]:
    """Return the numbers in a file of the kernel's list format: "0-3,8" and a newline."""
    found: set[int] = set()
    for part in filter(None, file.read_text().strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
