"""The choice of a device, where no run covers it (tests/test_train.py)."""

import ctypes
import subprocess

import pytest
import torch

from megamm.checkpoint.rank_file import RankFile
from megamm.checkpoint.staging import StagedFile
from megamm.checkpoint.tensor_shards import TensorShard
from megamm.common import device


@pytest.mark.parametrize(
    ("setting", "expected"), [(None, None), ("", []), ("0,2", ["0", "2"]), ("0, GPU-1a", ["0", "GPU-1a"])]
)
def test_visible_gpus_are_those_of_the_environment(monkeypatch, setting, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    assert device.visible() == expected


RUNTIME = """
static int last;  /* A double of the CUDA runtime: registering fails, and the error stays until it is taken. */
int cudaHostRegister(void *memory, unsigned long bytes, unsigned flags) { return last = 2; }
int cudaHostUnregister(void *memory) { return last = 1; }
int cudaPeekAtLastError(void) { return last; }
int cudaGetLastError(void) { int error = last; last = 0; return error; }
"""


@pytest.fixture
def failing_runtime(tmp_path, monkeypatch):
    """Load a double of the runtime library whose cudaHostRegister fails, as torch would have loaded the real one."""
    source, library = tmp_path / "runtime.c", tmp_path / "libcudart.so.13"
    source.write_text(RUNTIME)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    runtime = ctypes.CDLL(str(library))
    runtime.cudaHostRegister.argtypes = [ctypes.c_void_p, ctypes.c_ulong, ctypes.c_uint]
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return runtime


def test_memory_that_cannot_be_locked_leaves_no_error_behind(failing_runtime, caplog):
    """Otherwise the next kernel launch would raise the runtime's error, which is not its own."""
    gpu = device.Device(torch.device("cuda", 0), "nccl")
    assert not gpu.pin_memory(torch.zeros(16))
    assert failing_runtime.cudaPeekAtLastError() == 0
    assert "cannot page-lock" in caplog.text


def test_staged_memory_that_is_not_locked_is_not_unlocked(failing_runtime, monkeypatch):
    shard = TensorShard.whole("w", torch.arange(4.0))
    gpu = device.Device(torch.device("cuda", 0), "nccl")
    monkeypatch.setattr(device.Device, "synchronize", lambda self: None)
    staged = StagedFile(RankFile.of([shard], "rank_00000"), gpu)
    staged.copy([shard], steady=False)
    staged.copy([shard], steady=True)
    staged.close()
    assert failing_runtime.cudaPeekAtLastError() == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_peak_of_a_gpu_by_its_name(name, expected):
    assert device.peak_flops_of(name) == expected
