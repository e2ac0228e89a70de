"""Loads the compiled library of csrc/ into torch.ops.megamm, and chooses the implementation for a device.

Loading also registers what csrc/ leaves to Python: shapes for tracing (torch.compile, Meta) and gradients.
"""

from functools import cache
from pathlib import Path

import torch

from megamm.common.errors import UserError
from megamm.ops.registry import OPS

_FOLDER = Path(__file__).parent.parent
_WITH_GPU = _FOLDER / "_csrc_gpu.so"
FILE = _WITH_GPU if torch.version.cuda and _WITH_GPU.exists() else _FOLDER / "_csrc.so"
"""The library that this torch loads; without kernels for a GPU, any torch loads it.

setup.py builds both in one checkout that is installed beside a CPU build of torch and beside a GPU build.
"""
REMEDY = "install a C++ compiler (and nvcc for a GPU) and rebuild: pip install --no-build-isolation -e ."


@cache
def load() -> str:
    """Load the library, once per process; returns why it cannot be used, or "" if it can."""
    if not FILE.exists():
        return "csrc/ was not built"
    try:
        torch.ops.load_library(FILE)
    except OSError as error:
        return f"{FILE.name} cannot be loaded: {error.__cause__ or error}"
    # Only now: shapes and gradients can be registered for ops that the library has defined.
    for register in dict.fromkeys(op.register for op in OPS.values()):
        register()
    return ""


def choose(setting: str, device: torch.device) -> tuple[str, str]:
    """Name of the implementation and the reason; `setting`: auto, csrc or torch. UserError if csrc is missing."""
    if setting == "torch":
        return "torch", "requested"
    missing = load()
    if not missing and not _has_kernels(device):
        missing = f"csrc/ was built without kernels for {device.type}"
    if not missing:
        return "csrc", "requested" if setting == "csrc" else f"built for {device.type}"
    if setting == "csrc":
        raise UserError(f"ops: csrc, but {missing}", remedy=f"{REMEDY}, or use ops: auto")
    return "torch", missing


def _has_kernels(device: torch.device) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    return bool(key and torch._C._dispatch_has_kernel_for_dispatch_key("megamm::rms_norm", key))
