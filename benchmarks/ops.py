"""Speed of the fused operators against every installed alternative, forward and backward.

The sides of a case take turns in one run and medians are compared. Memory-bound operators are also given as a share of
a plain copy's bandwidth in the same run: bytes that must be read and written, over time. Alternatives: plain torch,
torch.compile, Megatron-core's fused functions, and on a GPU Liger-Kernel and QuACK if they are installed.
Run: `python benchmarks/ops.py [--quick] [--only OP ...] [--json OUT]`; a GPU is used if there is one.
"""

import argparse
import ctypes
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megamm import __version__, ops
from megamm.common.device import Device, choose, gpus
from megamm.model.rope import Rope, angles_of
from megamm.ops import routing
from megamm.ops.grouped_linear import grouped_linear

Function = Callable[..., Any]
GRADIENT = "backward"
FORWARD = "forward"
OURS = ("csrc", "grouped")
"""The side of a case that the others are compared with."""


@dataclass(frozen=True)
class Case:
    """One shape of one operator: `sides` take `inputs`; bytes are those that forward and backward must move.

    is_whole: backward is measured with the preceding forward pass, for sides that compute gradients there.
    """

    op: str
    shape: str
    inputs: tuple[Tensor, ...]
    sides: dict[str, Function]
    bytes: dict[str, int]
    is_whole: bool = False


def compiled(function: Function, device: Device) -> Function:
    """Return torch.compile's best kernels, with a separate graph for every shape."""
    options: dict[str, Any] = {"max_autotune": True} if device.is_gpu else {}
    return torch.compile(function, dynamic=False, options=options)


def norm_case(rows: int, width: int, dtype: torch.dtype, device: Device, residual: bool) -> Case:
    """Return RMSNorm, or the residual's addition and RMSNorm."""
    x, *rest = (leaf(rows, width, dtype=dtype, device=device) for _ in range(2 if residual else 1))
    weight = leaf(width, dtype=dtype, device=device)
    plain = ops.TORCH.add_rms_norm if residual else ops.TORCH.rms_norm
    sides = {
        "csrc": ops.CSRC.add_rms_norm if residual else ops.CSRC.rms_norm,
        "torch": plain,
        "torch.compile": compiled(plain, device),
    }
    if device.is_gpu and not residual:
        sides |= peers("liger_kernel.transformers.functional", "liger_rms_norm", lambda f: lambda x, w: f(x, w, 1e-6))
        sides |= peers("quack", "rmsnorm", lambda f: lambda x, w: f(x, w))
    if device.is_gpu and residual:
        liger = "liger_kernel.transformers.functional"
        sides |= peers(liger, "liger_fused_add_rms_norm", lambda f: lambda x, r, w: f(x, r, w, 1e-6))
    size, (forward, backward) = rows * width * x.element_size(), ((4, 4) if residual else (2, 3))
    name = "add_rms_norm" if residual else "rms_norm"
    moved = {FORWARD: forward * size, GRADIENT: backward * size}
    return Case(name, f"{rows} x {width}", (x, *rest, weight), sides, moved)


def rope_case(tokens: int, heads: int, groups: int, dtype: torch.dtype, device: Device) -> Case:
    """Return RoPE of the queries and keys of one row, with heads of 128 channels and positions (t, h, w)."""
    query, key = (leaf(tokens, 1, n, 128, dtype=dtype, device=device) for n in (heads, groups))
    position = torch.arange(tokens, device=device.torch_device).expand(1, 3, tokens)
    angles = angles_of(position, 128, Rope(1e6, 3))

    def plain(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return ops.TORCH.rope(query, key, *angles)

    sides: dict[str, Function] = {
        "csrc": lambda query, key: ops.CSRC.rope(query, key, *angles),
        "torch": plain,
        "torch.compile": compiled(plain, device),
    }
    size = (query.numel() + key.numel()) * query.element_size()
    shape = f"{tokens} x {heads} + {groups} x 128"
    return Case("rope", shape, (query, key), sides, {FORWARD: 2 * size, GRADIENT: 2 * size})


def swiglu_case(rows: int, width: int, dtype: torch.dtype, device: Device) -> Case:
    """Return SwiGLU of the fused projection `[rows, 2 * width]`."""
    x = leaf(rows, 2 * width, dtype=dtype, device=device)
    sides = {
        "csrc": ops.CSRC.swiglu,
        "torch": ops.TORCH.swiglu,
        "torch.compile": compiled(ops.TORCH.swiglu, device),
    }
    sides |= peers("megatron.core.fusions.fused_bias_swiglu", "bias_swiglu_impl", lambda f: lambda x: f(x, None))
    if device.is_gpu:
        wrap = lambda f: lambda x: f(*x.chunk(2, -1))  # noqa: E731
        sides |= peers("liger_kernel.transformers.functional", "liger_swiglu", wrap)
    size = rows * width * x.element_size()
    return Case("swiglu", f"{rows} x 2*{width}", (x,), sides, {FORWARD: 3 * size, GRADIENT: 5 * size})


def patch_case(frames: int, side: int, dtype: torch.dtype, device: Device, with_conv: bool) -> Case:
    """Return patches (2, 16, 16) of two uint8 clips to 768 numbers each."""
    video = torch.randint(256, (2, 3, frames, side, side), dtype=torch.uint8, device=device.torch_device)
    patch, width = (2, 16, 16), 768
    weight = leaf(width, 3, *patch, dtype=dtype, device=device)
    bias = leaf(width, dtype=dtype, device=device)

    def linear(video: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        b, c, t, y, x = video.shape
        cut = (video.to(weight.dtype) / 255).view(b, c, t // 2, 2, y // 16, 16, x // 16, 16)
        return F.linear(cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4), weight.flatten(1), bias)

    def convolution(video: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv3d(video.to(weight.dtype) / 255, weight, bias, stride=patch)

    sides: dict[str, Function] = {
        "csrc": lambda v, w, b: ops.CSRC.patch_embed_3d(v, w, b, patch=patch),
        "permute + linear": linear,
        "torch.compile": compiled(linear, device),
    }
    if with_conv:
        sides["Conv3d"] = convolution
    return Case("patch_embed_3d", f"2 x {frames} x {side}^2", (video, weight, bias), sides, {})


def loss_case(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: Device) -> Case:
    """Return head and cross entropy of random tokens."""
    x = leaf(tokens, hidden, dtype=dtype, device=device)
    weight = leaf(vocabulary, hidden, dtype=dtype, device=device)
    labels = torch.randint(vocabulary, (tokens,), device=device.torch_device)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")

    sides: dict[str, Function] = {
        "csrc": lambda x, w: ops.CSRC.linear_cross_entropy(x, w, labels)[0],
        "torch": plain,
        "torch.compile": compiled(plain, device),
    }
    if device.is_gpu:
        name = "liger_fused_linear_cross_entropy"
        wrap = lambda f: lambda x, w: f(x, w, labels, reduction="sum")  # noqa: E731
        sides |= peers("liger_kernel.transformers.functional", name, wrap)
    return Case("linear_cross_entropy", f"{tokens} x {hidden} -> {vocabulary}", (x, weight), sides, {}, True)


def expert_case(
    tokens: int, hidden: int, width: int, experts: int, top_k: int, dtype: torch.dtype, device: Device
) -> Case:
    """Return routed experts from tokens to their results, without a router; sequential: as Megatron-core runs them."""
    x = leaf(tokens, hidden, dtype=dtype, device=device)
    gates = leaf(experts, 2 * width, hidden, dtype=dtype, device=device)
    downs = leaf(experts, hidden, width, dtype=dtype, device=device)
    weights, chosen = torch.randn(tokens, experts, device=device.torch_device).softmax(1).topk(top_k)
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool, device=device.torch_device).scatter_(1, chosen, True)
    probs = torch.zeros(tokens, experts, device=device.torch_device).scatter_(1, chosen, weights)

    def grouped(x: Tensor, gates: Tensor, downs: Tensor) -> Tensor:
        rows, sizes = routing.rows_of(routing_map, tokens * top_k), routing_map.sum(0)
        gate_up = grouped_linear(routing.gather(x, rows), gates, sizes)
        hidden = ops.CSRC.swiglu(gate_up, row_weight=probs.flatten().index_select(0, rows.choice))
        return routing.combine(grouped_linear(hidden, downs, sizes), rows)

    def sequential(x: Tensor, gates: Tensor, downs: Tensor) -> Tensor:
        by_expert = routing_map.t().contiguous()
        token = torch.arange(tokens, device=x.device).expand(experts, -1).masked_select(by_expert)
        sizes = routing_map.sum(0).tolist()
        parts = zip(x.index_select(0, token).split(sizes), probs.t().masked_select(by_expert).split(sizes), strict=True)
        results = [
            F.linear(ops.CSRC.swiglu(F.linear(part, gate), row_weight=weight), down)
            for (part, weight), gate, down in zip(parts, gates.unbind(), downs.unbind(), strict=True)
        ]
        return torch.zeros_like(x).index_add(0, token, torch.cat(results))

    shape = f"{tokens} x {hidden}, {top_k} of {experts} x {width}"
    return Case("experts", shape, (x, gates, downs), {"grouped": grouped, "sequential": sequential}, {})


def leaf(*shape: int, dtype: torch.dtype, device: Device) -> Tensor:
    """Return random numbers that require a gradient."""
    return torch.randn(shape, dtype=dtype, device=device.torch_device).mul_(0.5).requires_grad_()


def peers(module: str, name: str, wrap: Callable[[Function], Function]) -> dict[str, Function]:
    """Return the function of an optional package, in a dict by its name; empty if it is not installed."""
    package = module.split(".")[0]
    try:
        return {package: wrap(getattr(importlib.import_module(module), name))}
    except ModuleNotFoundError:
        return {}


def cases(device: Device, quick: bool) -> Iterator[Case]:
    """Return sizes of language models, of vision encoders (many short rows), of clips and of heads."""
    dtypes = [torch.bfloat16] if device.is_gpu else [torch.float32, torch.bfloat16]
    if device.is_gpu:
        norms = [(65536, 128), (65536, 768), (32768, 1024), (32768, 2048), (16384, 4096), (8192, 8192), (4096, 16384)]
        norms += [(1024, 4096), (2048, 32768), (1024, 65536)]
        turns = [(8192, 32, 8), (8192, 64, 8), (32768, 16, 4)]
        gates, clips = [(32768, 1536), (16384, 5632), (8192, 8192), (1024, 14336)], [(8, 224), (32, 448), (64, 720)]
        heads = [(8192, 4096, 151936), (16384, 2048, 32768)]
        experts = [(4096, 2048, 768, 128, 8), (4096, 2048, 768, 8, 1)]
    else:
        norms = [(4096, 128), (4096, 768), (1024, 2048), (1024, 4096)]
        turns = [(1024, 8, 2), (1024, 32, 8)]
        gates, clips = [(2048, 768), (1024, 2048), (512, 5632)], [(8, 224)]
        heads = [(2048, 256, 5152), (1024, 256, 32000)]
        experts = [(1024, 128, 64, 64, 4), (512, 256, 512, 8, 2)]
    for dtype in dtypes:
        for residual in (False, True):
            yield from (norm_case(*shape, dtype, device, residual) for shape in norms[: 2 if quick else None])
        yield from (rope_case(*shape, dtype, device) for shape in turns[: 1 if quick else None])
        yield from (swiglu_case(*shape, dtype, device) for shape in gates[: 1 if quick else None])
        yield from (patch_case(*clip, dtype, device, clip == clips[0]) for clip in clips[: 1 if quick else None])
        yield from (loss_case(*head, dtype, device) for head in heads[: 1 if quick else None])
        yield from (expert_case(*shape, dtype, device) for shape in experts[: 1 if quick else None])


def keep_memory() -> None:
    """Make the C library keep freed memory, as in a long training process, so that page faults are not measured."""
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_threshold = -1, -3
    mallopt(trim_threshold, 2**31 - 1), mallopt(mmap_threshold, 2**30)


def seconds(functions: dict[str, Callable[[], Any]], device: Device, rounds: int) -> dict[str, float]:
    """Return the median time of a call of each; they take turns, each turn long enough for the clock."""
    repeats = {}
    for name, function in functions.items():
        function(), function()
        device.synchronize()
        start = time.perf_counter()
        function()
        device.synchronize()
        repeats[name] = max(1, int(0.01 / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            device.synchronize()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            device.synchronize()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def measure(case: Case, device: Device, rounds: int) -> dict[str, Any]:
    """Measure all sides in both directions: times and bandwidth shares; on a GPU also extra memory."""
    wanted = [x for x in case.inputs if x.requires_grad]
    source = torch.empty(max(case.bytes.values(), default=2) // 4, dtype=torch.int16, device=device.torch_device)
    target = torch.empty_like(source)
    copies = {"copy": lambda: target.copy_(source)} if case.bytes else {}

    def forward(side: Function) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return side(*case.inputs)

        return run

    def backward(side: Function) -> Callable[[], Any]:
        outputs = side(*case.inputs)
        outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
        upstream = [torch.randn_like(o) for o in outputs]
        if case.is_whole:
            return lambda: torch.autograd.grad(side(*case.inputs), wanted, upstream)
        return lambda: torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)

    dtype = str(wanted[0].dtype).removeprefix("torch.")
    found: dict[str, Any] = {"op": case.op, "shape": case.shape, "dtype": dtype, "is_whole": case.is_whole}
    for way, prepare in ((FORWARD, forward), (GRADIENT, backward)):
        times = seconds(copies | {name: prepare(side) for name, side in case.sides.items()}, device, rounds)
        found[way] = {name: {"ms": 1e3 * value} for name, value in times.items()}
        if case.bytes:
            copy_speed = 2 * 2 * source.numel() / times["copy"]
            for name, value in times.items():
                moved = 4 * source.numel() if name == "copy" else case.bytes[way]
                found[way][name]["share of copy"] = moved / value / copy_speed
    if device.is_gpu:
        found["extra memory (MiB)"] = {name: extra_memory(side, case.inputs) for name, side in case.sides.items()}
    return found


def extra_memory(side: Function, inputs: tuple[Tensor, ...]) -> float:
    """Return the peak GPU memory in MiB of forward and backward, beyond existing memory; gradients count."""
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    outputs = side(*inputs)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
    torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], [torch.ones_like(o) for o in outputs])
    return (torch.accelerator.max_memory_allocated() - before) / 2**20


def host_time(device: Device) -> float:
    """Return the host's microseconds for RMSNorm forward and backward of a tiny tensor, where kernels cost nothing."""
    x, weight = (leaf(*shape, dtype=torch.float32, device=device) for shape in ((2, 8), (8,)))
    dy = torch.ones_like(x)
    call = lambda: torch.autograd.grad(ops.CSRC.rms_norm(x, weight), (x, weight), dy)  # noqa: E731
    return 1e6 * seconds({"call": call}, device, 20)["call"]


def line(found: dict[str, Any], way: str) -> str:
    """Return a table row: time of our side, share of a copy, and the speed-up over each other side."""
    sides = found[way]
    ours = next(sides[name] for name in OURS if name in sides)
    share = f"{ours['share of copy']:5.0%}" if "share of copy" in ours else "     "
    others = "  ".join(f"{n} {s['ms'] / ours['ms']:.2f}x" for n, s in sides.items() if n not in (*OURS, "copy"))
    way = "both" if found["is_whole"] and way == GRADIENT else way
    return f"{found['op']:21}{found['shape']:28}{found['dtype']:9}{way:9}{ours['ms']:9.3f} ms {share}  {others}"


def main() -> None:
    """Measure all cases, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds")
    parser.add_argument("--only", nargs="+", metavar="OP", default=list(ops.OPS), help="these operators")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, help="output file; default: benchmarks/results/ops_<device>.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = choose("auto")
    if not device.is_gpu:
        keep_memory()
    _, reason = ops.choose("csrc", device.torch_device)
    torch._dynamo.config.cache_size_limit = 1000
    results = []
    print(f"ops: csrc, {reason}; time of our side, its share of a copy's bandwidth, how many times as long others take")
    for case in (each for each in cases(device, arguments.quick) if each.op in arguments.only):
        results.append(measure(case, device, 5 if arguments.quick else 15))
        for way in (FORWARD, GRADIENT):
            print(line(results[-1], way), flush=True)
    host = host_time(device)
    print(f"host time of RMSNorm forward and backward: {host:.0f} us")
    figures = {
        "machine": gpus()[0] if device.is_gpu else f"{platform.machine()}, {arguments.threads} thread(s)",
        "torch": torch.__version__,
        "megamm": __version__,
        "command": " ".join(["python", "benchmarks/ops.py", *sys.argv[1:]]),
        "host time of rms_norm forward + backward (us)": host,
        "cases": results,
    }
    to = arguments.json or Path(__file__).parent / "results" / f"ops_{'gpu' if device.is_gpu else 'cpu'}.json"
    to.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
