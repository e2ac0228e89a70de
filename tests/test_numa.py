"""Binding to the CPUs of a GPU's NUMA node, with a folder in the form of /sys."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megamm.common import numa

GPU = "0000:1B:00.0"


@pytest.fixture
def bind(tmp_path: Path) -> Callable[..., tuple[str, set[int]]]:
    """Return a function that calls `bind_near` in a thread; it returns the line, and the CPUs of the thread then."""

    def call(node: int | None, cpulist: str = "", address: str | None = GPU) -> tuple[str, set[int]]:
        if node is not None:
            device = tmp_path / "bus/pci/devices" / GPU.lower()
            device.mkdir(parents=True)
            (device / "numa_node").write_text(f"{node}\n")
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpulist}\n")
        found: list[tuple[str, set[int]]] = []
        thread = threading.Thread(
            target=lambda: found.append((numa.bind_near(address, tmp_path), os.sched_getaffinity(0)))
        )
        thread.start()
        thread.join()
        return found[0]

    return call


def test_a_process_is_bound_to_the_node_of_its_gpu(bind):
    allowed = os.sched_getaffinity(0)
    if len(allowed) == 1:
        pytest.skip("a process with one CPU is bound already")
    line, after = bind(1, str(min(allowed)))
    assert line == f"bound to the 1 CPUs of NUMA node 1, that of the GPU at {GPU}"
    assert after == {min(allowed)}
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.parametrize(
    ("node", "cpulist", "address", "why"),
    [
        (None, "", GPU, "the system does not name the NUMA node of the GPU at 0000:1B:00.0"),
        (-1, "", GPU, "the system does not name the NUMA node"),
        (0, "0", None, "the GPU's PCI address is unknown"),
        (0, "all", GPU, "not all"),  # one node
        (0, "4096-4100,4200", GPU, "not all 6 of node 0"),  # bound by the user to other CPUs
    ],
)
def test_otherwise_nothing_changes_and_the_reason_is_logged(bind, node, cpulist, address, why):
    allowed = os.sched_getaffinity(0)
    line, after = bind(node, ",".join(map(str, allowed)) if cpulist == "all" else cpulist, address)
    assert line.startswith("CPUs not bound: ") and why in line
    assert after == allowed


@pytest.mark.parametrize(("text", "expected"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("\n", set())])
def test_lists_of_cpus(tmp_path, text, expected):
    (tmp_path / "cpulist").write_text(text)
    assert numa.cpus(tmp_path / "cpulist") == expected
