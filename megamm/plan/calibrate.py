"""Measures the constants of the GPUs of this node: products, memory, attention, launches, collectives within the node.

The rates between nodes need two nodes and stay as they were (`megamm doctor --nnodes 2` shows them), as do the vendor's
peaks. Times are the median of several repetitions. On a CPU the same code runs with small sizes, for tests.
"""

import contextlib
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from megamm.common.device import Device
from megamm.common.gpu_constants import GpuConstants
from megamm.doctor import exchange
from megamm.plan import kernels


@dataclass(frozen=True)
class Sizes:
    """What is measured. products: (m, n, k); length, heads: of causal attention with heads of 128 channels."""

    products: tuple[tuple[int, int, int], ...]
    copied: int
    """Bytes of the tensor that is copied."""
    length: int
    heads: int
    launches: int
    repetitions: int


ON_GPU = Sizes(
    # Products of an 8B and a 70B model, whole and divided over tensor ranks, forward and of the weights.
    products=(
        *((8192, 6144, 4096), (8192, 4096, 4096), (8192, 24576, 4096), (8192, 4096, 12288), (4096, 24576, 8192)),
        *((8192, 7168, 8192), (8192, 8192, 7168), (8192, 2560, 8192)),
    ),
    copied=2**31,
    length=8192,
    heads=32,
    launches=2000,
    repetitions=20,
)
ON_CPU = Sizes(((64, 64, 64), (128, 64, 64)), 2**20, 64, 1, 50, 3)
"""So small that a test of the code takes no time; the results say nothing about a training run."""


def measure(gpu: GpuConstants, device: Device) -> GpuConstants:
    """Return the constants with those that this node can measure replaced."""
    sizes = ON_GPU if device.is_gpu else ON_CPU
    memory, name = _memory_and_name(device)
    bandwidth = _copy_rate(device, sizes)
    found: dict[str, Any] = {
        "product_efficiency": _product_efficiency(gpu, device, sizes),
        "memory_efficiency": bandwidth / gpu.memory_bandwidth,
        "host_bandwidth": _host_rate(device, sizes),
        "launch": _launch(device, sizes),
    }
    for name, attend in (("varlen", _varlen(sizes)), ("flex", _flex(sizes, device))) if device.is_gpu else _ON_CPU:
        found[f"{name}_forward"], found[f"{name}_backward"] = _attention_rates(device, sizes, attend)
    more = {"memory": memory, "device_name": name if device.is_gpu else None, "link_bandwidth": _link_bandwidth(device)}
    found |= {key: value for key, value in more.items() if value is not None}
    source = f"measured by megamm plan --calibrate on {name}, {time.strftime('%Y-%m-%d')}"
    return replace(gpu, **found, sources=gpu.sources | dict.fromkeys(found, source))


def _memory_and_name(device: Device) -> tuple[float | None, str]:
    if not device.is_gpu:
        return None, "a CPU"
    properties = torch.get_device_module(device.torch_device).get_device_properties(device.torch_device)
    return float(properties.total_memory), properties.name


def _seconds(device: Device, sizes: Sizes, run: Callable[[], Any]) -> float:
    """Return the median time of a call, after two that are not counted."""
    times = []
    for _ in range(sizes.repetitions + 2):
        device.synchronize()
        begin = device.record_event()
        run()
        end = device.record_event()
        device.synchronize()
        times.append(device.seconds_between(begin, end))
    return statistics.median(times[2:])


def _product_efficiency(gpu: GpuConstants, device: Device, sizes: Sizes) -> float:
    """Return the constant with which `kernels.product` predicts the measured times, in the mean of their ratios."""
    ideal, ratios = replace(gpu, name=f"{gpu.name} at its peak", product_efficiency=1.0), []
    for m, n, k in sizes.products:
        a, b = (torch.randn(size, dtype=torch.bfloat16, device=device.torch_device) for size in ((m, k), (k, n)))
        ratios.append(kernels.product(ideal, m, n, k) / _seconds(device, sizes, partial(torch.matmul, a, b)))
    return statistics.fmean(ratios)


def _copy_rate(device: Device, sizes: Sizes) -> float:
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    return 2 * sizes.copied / _seconds(device, sizes, lambda: target.copy_(source))


def _host_rate(device: Device, sizes: Sizes) -> float:
    """Return the bytes/s of copies to page-locked memory of the host and back, one after the other."""
    host = torch.zeros(sizes.copied // 8, dtype=torch.uint8, pin_memory=device.is_gpu)
    on_device = host.to(device.torch_device, copy=True)

    def there_and_back() -> None:
        on_device.copy_(host, non_blocking=True)
        host.copy_(on_device, non_blocking=True)

    return 2 * host.nbytes / _seconds(device, sizes, there_and_back)


def _attention_rates(device: Device, sizes: Sizes, attend: Callable[..., torch.Tensor]) -> tuple[float, float]:
    """Return FLOP/s of causal attention, forward and backward, counted as `kernels.attention` does.

    attend: of query, key and value `[1, heads, length, 128]`.
    """
    shape = (1, sizes.heads, sizes.length, 128)
    dtype = torch.bfloat16 if device.is_gpu else torch.float32
    inputs = [torch.randn(shape, dtype=dtype, device=device.torch_device, requires_grad=True) for _ in range(3)]
    forward = _seconds(device, sizes, lambda: attend(*inputs))
    result = attend(*inputs)
    gradient = torch.ones_like(result)
    backward = _seconds(device, sizes, lambda: torch.autograd.grad(result, inputs, gradient, retain_graph=True))
    flops = 2 * (sizes.length**2 / 2) * sizes.heads * 2 * 128
    return flops / forward, 2.5 * flops / backward


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


_ON_CPU = (("varlen", _sdpa), ("flex", _sdpa))
"""What stands for the kernels in tests of this code."""


def _varlen(sizes: Sizes) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    def attend(*heads_first: torch.Tensor) -> torch.Tensor:
        query, key, value = (x[0].transpose(0, 1) for x in heads_first)
        ends = torch.tensor([0, sizes.length], dtype=torch.int32, device=query.device)
        whole = varlen_attn(query, key, value, ends, ends, sizes.length, sizes.length, window_size=(-1, 0))
        assert isinstance(whole, torch.Tensor)
        return whole

    return attend


def _flex(sizes: Sizes, device: Device) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def is_seen(_batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query >= key

    mask = create_block_mask(is_seen, None, None, sizes.length, sizes.length, device=str(device.torch_device))
    compiled = torch.compile(flex_attention)
    return lambda query, key, value: compiled(query, key, value, block_mask=mask)


def _launch(device: Device, sizes: Sizes) -> float:
    """Return the host's time of one small operator with its gradient, divided by their two launches."""
    x = torch.ones(8, device=device.torch_device, requires_grad=True)
    device.synchronize()
    begin = time.perf_counter()
    for _ in range(sizes.launches):
        torch.autograd.backward((x * 2.0).sum())
    seconds = time.perf_counter() - begin
    device.synchronize()
    return seconds / sizes.launches / 4  # the product, the sum, and their gradients


def _link_bandwidth(device: Device) -> float | None:
    """Return the bytes/s of an all-reduce over this node's GPUs, by the definition of nccl-tests; None for one GPU."""
    if not device.is_gpu:
        return _exchange("gloo", 2)
    count = torch.get_device_module(device.torch_device).device_count()
    return _exchange("nccl", count) if count > 1 else None


def _exchange(backend: Any, count: int) -> float | None:
    from torch.distributed import TCPStore

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    groups = (exchange.ExchangeGroup("node", 0, count),)
    found = exchange.measure(exchange.ExchangeJob("127.0.0.1", port, backend, count, groups), store)["node"]
    return None if found.bandwidth is None else found.bandwidth * 1e9
