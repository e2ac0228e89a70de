"""Fixtures shared by several test files."""

import shutil
from typing import NamedTuple

import emulated
import fault_matrix
import pytest
import shared
import slurm_cluster
import slurm_lab
import torch
import warm

from megamm.common import device
from megamm.mcore import cpu
from megamm.ops import library
from megamm.parity.harness import Harness
from megamm.parity.worlds import Worlds

pytest_plugins = ["suite"]

if not device.choose("auto").is_gpu:
    cpu.install()  # before any test file imports Megatron-core, as a run does


@pytest.fixture(scope="session", autouse=True)
def _warm_server():
    """Fork commands from a process that has imported megamm (warm.py) and ends with the session."""
    yield
    warm.close()


@pytest.fixture(scope="session")
def worlds():
    """Start torch and Megatron-core once for the ranks of all tests that run their own function in them."""
    with Worlds() as worlds:
        yield worlds


@pytest.fixture(scope="session")
def harness(worlds):
    """Return the harness that checks parity cases and caches the reference results."""
    with Harness(worlds) as harness:
        yield harness


@pytest.fixture(scope="session", autouse=True)
def shared_folders(tmp_path_factory):
    """Share folders with the tests of the other workers (tests/lib/shared.py)."""
    shared.begin(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Return a folder with tiny data and the baseline run that runs with faults are compared with."""
    folder = tmp_path_factory.mktemp("baseline") / "runs"
    shared.copy("baseline", fault_matrix.undisturbed, folder)
    return folder


@pytest.fixture(scope="module")
def lab(undisturbed, tmp_path_factory):
    """Return a Slurm cluster for this test file and a folder with the run that its jobs are compared with."""
    if why := slurm_cluster.why_not():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("slurm") / "runs"
    shutil.copytree(undisturbed, folder)
    with slurm_cluster.Cluster() as cluster:
        yield slurm_lab.Lab(cluster, folder)


class Kernels(NamedTuple):
    """Compiled ops as torch.ops offers them, and the device of their tensors."""

    ops: object
    device: torch.device


GPU = pytest.param("gpu", marks=pytest.mark.gpu)


def _device(name):
    if name == "gpu" and not torch.accelerator.is_available():
        pytest.skip("torch sees no GPU")
    return device.choose(name).torch_device


@pytest.fixture(scope="session", params=["cpu", "emulated", GPU])
def kernels(request):
    """Return the kernels of csrc/: those for a CPU, those for a GPU run on a CPU, and those for a GPU."""
    assert library.load() == "", library.load()
    if request.param == "emulated":
        return Kernels(emulated.load(), torch.device("cpu"))
    return Kernels(torch.ops.megamm, _device(request.param))


@pytest.fixture(scope="session", params=["cpu", GPU])
def ops_device(request):
    """Return a device that megamm.ops has compiled functions for."""
    assert library.load() == "", library.load()
    return _device(request.param)
