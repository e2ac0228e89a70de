"""The choice of a device, where no run covers it (tests/test_train.py)."""

import ctypes
import os
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
#include <stdio.h>
static int last;  /* A double of the CUDA runtime: registering fails, and the error stays until it is taken. */
int cudaHostRegister(void *memory, unsigned long bytes, unsigned flags) { return last = 2; }
int cudaHostUnregister(void *memory) { return last = 1; }
int cudaPeekAtLastError(void) { return last; }
int cudaDeviceGetPCIBusId(char *text, int length, int device) {
    if (device > 3) return last = 101;
    snprintf(text, length, "0000:%02X:00.0", 27 + device);
    return 0;
}
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


def test_a_gpu_has_the_address_that_the_runtime_tells(failing_runtime):
    assert device.Device(torch.device("cuda", 1), "nccl").pci_address() == "0000:1c:00.0"
    assert device.Device(torch.device("cuda", 4), "nccl").pci_address() is None
    assert failing_runtime.cudaPeekAtLastError() == 0


def test_without_a_shared_runtime_a_gpu_has_no_address(monkeypatch, tmp_path):
    (tmp_path / "maps").write_text("7f00-7f01 r-xp 00000000 00:00 0 /usr/lib/libtorch_cuda.so\n")
    monkeypatch.setattr(device, "MEMORY_MAP", tmp_path / "maps")
    assert device.Device(torch.device("cuda", 0), "nccl").pci_address() is None


@pytest.fixture
def variables(monkeypatch):
    """Return the environment without what `prepare_gpu` sets, on a machine whose GPU torch sees."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in (*device.ALLOCATOR, device.CONNECTIONS):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    return os.environ


def test_a_gpu_is_prepared_by_variables_with_their_reason(variables):
    lines = device.prepare_gpu("auto", launches_in_order=True)
    assert variables["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert variables["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert [line.partition(": ")[0] for line in lines] == [
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        "CUDA_DEVICE_MAX_CONNECTIONS=1",
    ]


def test_launches_are_ordered_only_where_it_helps(variables):
    assert len(device.prepare_gpu("gpu", launches_in_order=False)) == 1
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in variables


def test_what_the_user_has_set_stays(variables, monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    lines = device.prepare_gpu("auto", launches_in_order=True)
    assert lines == ["PYTORCH_ALLOC_CONF=backend:native: as given", "CUDA_DEVICE_MAX_CONNECTIONS=32: as given"]
    assert "PYTORCH_CUDA_ALLOC_CONF" not in variables


def test_on_a_cpu_nothing_is_set(variables):
    assert device.prepare_gpu("cpu", launches_in_order=True) == []
    assert "PYTORCH_CUDA_ALLOC_CONF" not in variables


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


@pytest.mark.parametrize(
    ("name", "capability", "why", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), "NVIDIA A100-SXM4-80GB has no FP8: its compute capability is 8.0", 312e12),
        ("NVIDIA L4", (8, 9), "", None),
        ("NVIDIA H100 80GB HBM3", (9, 0), "", 989e12),
        ("NVIDIA B200", (10, 0), "", 2250e12),
    ],
)
def test_fp8_of_a_gpu(monkeypatch, name, capability, why, peak):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    gpu = device.Device(torch.device("cuda", 0), "nccl")
    assert gpu.why_no_fp8.startswith(why) and bool(gpu.why_no_fp8) == bool(why)
    assert gpu.peak_flops("bf16") == peak
    assert gpu.peak_flops("fp8") == (peak and 2 * peak)
    cpu = device.choose("cpu")
    assert not cpu.why_no_fp8 and cpu.peak_flops("fp8") is None
