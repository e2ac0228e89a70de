"""Fixtures of several test files."""

from typing import NamedTuple

import emulated
import fault_matrix
import pytest
import torch

from megamm import device
from megamm.ops import library
from megamm.parity.harness import Harness

pytest_plugins = ["suite"]


@pytest.fixture(scope="session")
def harness():
    """One start of torch and Megatron-core for all parity cases."""
    with Harness() as harness:
        yield harness


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A folder with tiny data and the run "undisturbed": what runs with faults, beside it, are compared with."""
    folder = tmp_path_factory.mktemp("undisturbed") / "runs"
    fault_matrix.undisturbed(folder)
    return folder


class Kernels(NamedTuple):
    """Compiled ops as torch.ops offers them, and where their tensors live."""

    ops: object
    device: torch.device


GPU = pytest.param("gpu", marks=pytest.mark.gpu)


def _device(name):
    if name == "gpu" and not torch.accelerator.is_available():
        pytest.skip("torch sees no GPU")
    return device.choose(name).torch_device


@pytest.fixture(scope="session", params=["cpu", "emulated", GPU])
def kernels(request):
    """The kernels of csrc/: those for a CPU, those for a GPU run on a CPU, those for a GPU."""
    assert library.load() == "", library.load()
    if request.param == "emulated":
        return Kernels(emulated.load(), torch.device("cpu"))
    return Kernels(torch.ops.megamm, _device(request.param))


@pytest.fixture(scope="session", params=["cpu", GPU])
def ops_device(request):
    """A device that megamm.ops has compiled functions for."""
    assert library.load() == "", library.load()
    return _device(request.param)
