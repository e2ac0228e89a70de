"""The GPUs that can be simulated: name, memory, and what torch reports about them.

Source of the memory: torch's "total capacity" in out-of-memory messages of public reports, the least value seen (H100:
vllm-project/vllm#27508). A GPU reports less than its name says, because ECC and the driver reserve some.
"""

from dataclasses import dataclass

from megamm.common.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU. memory: bytes that a process could allocate if it had no context; capability: as torch reports it."""

    key: str
    name: str
    memory: int
    capability: tuple[int, int]
    multiprocessors: int


GPUS = {
    gpu.key: gpu
    for gpu in (
        Gpu("a100-80", "NVIDIA A100-SXM4-80GB", int(79.15 * GIB), (8, 0), 108),
        Gpu("h100-80", "NVIDIA H100 80GB HBM3", int(79.11 * GIB), (9, 0), 132),
        Gpu("h200-141", "NVIDIA H200", int(139.72 * GIB), (9, 0), 132),
        Gpu("b200-180", "NVIDIA B200", int(178.35 * GIB), (10, 0), 148),
    )
}


def find(name: str) -> Gpu:
    """Return the GPU of a key, or of its part before the memory ("h100"). UserError for an unknown one."""
    for key, gpu in GPUS.items():
        if name.lower() in (key, key.partition("-")[0]):
            return gpu
    raise UserError(f"--fake-gpu {name} is not a known GPU", remedy=f"use one of {', '.join(GPUS)}")
