"""Time of single kernels on a GPU: products by their shape, attention by its pairs, passes over memory by their bytes.

A product of `[m, k]` and `[k, n]` is computed in output tiles by the multiprocessors, wave by wave; a tile takes as
long as the product's depth k and a constant for filling its pipeline and storing its result. It cannot be faster than
memory. Source: NVIDIA, "Matrix Multiplication Background User's Guide" (tile and wave quantization).
"""

import math
from functools import lru_cache

from megamm.common.gpu_constants import GpuConstants
from megamm.plan.job import Software

TILES = ((256, 128, 1.0), (128, 128, 0.9), (128, 64, 0.75), (64, 64, 0.6))
"""Rows and columns of output tiles, with the share of the largest tile's rate: smaller ones load more per FLOP."""
FILL = 192
"""Depth that a tile could have computed while it fills its pipeline and stores its result. Assumed."""


@lru_cache(maxsize=1 << 16)
def product(
    gpu: GpuConstants,
    m: float,
    n: float,
    k: float,
    *,
    count: float = 1,
    precision: str = "16-bit",
    output_bytes: int = 2,
) -> float:
    """Return the seconds of `count` equal products in one kernel; output_bytes: moved for each result element."""
    if min(m, n, k, count) <= 0:
        return 0.0
    is_fp8 = precision == "fp8"
    rate = gpu.peak_flops_fp8 * gpu.product_efficiency_fp8 if is_fp8 else gpu.peak_flops * gpu.product_efficiency
    width = 1 if is_fp8 else 2
    seconds = math.inf
    for rows, columns, speed in TILES:
        # Either side of the result may be the rows of a tile.
        tiles = count * min(math.ceil(m / rows) * math.ceil(n / columns), math.ceil(m / columns) * math.ceil(n / rows))
        waves = math.ceil(tiles / gpu.multiprocessors)
        flops = 2 * rows * columns * (k + FILL) * gpu.multiprocessors
        seconds = min(seconds, waves * flops / (rate * speed))
    moved = count * ((m * k + k * n) * width + m * n * output_bytes)
    return max(seconds, memory(gpu, moved)) + gpu.kernel_gap


def memory(gpu: GpuConstants, moved: float) -> float:
    """Return the seconds of a pass that reads and writes this many bytes in all."""
    return moved / (gpu.memory_bandwidth * gpu.memory_efficiency)


def attention(
    gpu: GpuConstants, software: Software, pairs: float, heads: float, channels: float
) -> tuple[float, float]:
    """Return the seconds of forward and backward of fused attention over these pairs in each head.

    channels: of a query and a value head together. Backward: five products for two of forward.
    """
    flops = 2 * pairs * heads * channels
    forward, backward = {
        "varlen": (gpu.varlen_forward, gpu.varlen_backward),
        "flash": (gpu.flash_forward, gpu.flash_backward),
        "flex": (gpu.flex_forward, gpu.flex_backward),
    }[software.attention]
    return flops / forward + gpu.kernel_gap, 2.5 * flops / backward + 3 * gpu.kernel_gap


def unfused_attention(gpu: GpuConstants, rows: float, heads: float, length: int, head_dim: int) -> tuple[float, float]:
    """Return the same of attention with all scores in 16-bit memory, with a fused masked softmax and dropout."""
    count = rows * heads
    scores = product(gpu, length, length, head_dim, count=count)
    values = product(gpu, length, head_dim, length, count=count)
    elements = count * length * length
    # Softmax and dropout read and write; dropout has a mask of a byte. The products' bytes are counted with them.
    forward = scores + values + memory(gpu, 9 * elements)
    backward = 2 * scores + 2 * values + memory(gpu, 11 * elements)
    return forward, backward
