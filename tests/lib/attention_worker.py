"""Attention over context ranks against the plain reference: the code of each of four ranks (parity/worlds.py).

Cases with two context ranks run in two groups at once, each with its own rows. Every rank compares its tokens' output
and gradients with the reference's for the whole rows.
"""

import math
import types
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from attention_reference import ROWS, attention, random_metadata, relative_error, with_spans

from megamm.common.device import Device
from megamm.config.accelerators import installed
from megamm.model.rope import Rope
from megamm.ops import choose

BASE = 10000.0
CPU = Device(torch.device("cpu"), "gloo")
ALONE: Any = types.SimpleNamespace(rank=lambda: 0, size=lambda: 1)
"""A process group of this process only."""
# (name, heads, groups, size of a query's head, of a value's head, axes; 0: no rotation)
HEADS = [
    ("mha", 4, 4, 8, 8, 1),
    ("grouped", 8, 2, 8, 8, 3),
    ("one_group", 4, 1, 6, 6, 3),
    ("groups_share_no_rank", 12, 6, 4, 4, 1),
    ("latent", 4, 4, 12, 10, 0),
]
# Scale and cap of scores, window: shorter than a block in which attention skips, and longer.
FORMS = [(0.3, 0.6, 21), (0.5, 1.5, 150)]
WINDOWS = [(0.5, math.inf, 2), (0.3, math.inf, 21), (0.5, math.inf, 150)]
# Rows shorter and longer than the blocks in which attention skips.
SIZES = [(2, 44), (2, 4 * 131), (4, 8 * 5), (4, 8 * 37)]
CASES = {
    f"{exchange}-cp{cp}-{length}-{heads[0]}": dict(exchange=exchange, cp=cp, length=length, heads=heads)
    for exchange, (cp, length), heads in product(("allgather", "alltoall"), SIZES, HEADS)
    # Long rows are for the skipping, which no head count changes.
    if length < 100 or heads[0] in ("grouped", "latent")
}

CASES |= {
    f"{exchange}-cp2-524-{form[2]}": dict(exchange=exchange, cp=2, length=524, heads=HEADS[1], form=form)
    for exchange, form in product(("allgather", "alltoall"), FORMS)
}
CASES |= {
    f"{name}-varlen": case | {"kernel": "varlen"}
    for name, case in CASES.items()
    if "form" not in case and case["heads"][0] in ("grouped", "latent")
}
CASES |= {
    f"{exchange}-cp{cp}-{length}-window{form[2]}-varlen": dict(
        exchange=exchange, cp=cp, length=length, heads=HEADS[1], form=form, kernel="varlen"
    )
    for exchange, (cp, length), form in product(("allgather", "alltoall"), SIZES[1:3], WINDOWS[1:])
}
SPANS = {
    f"{exchange}-cp{cp}-{length}-spans{form[2] if form else ''}": dict(
        exchange=exchange, cp=cp, length=length, heads=HEADS[1], form=form, spans=True
    )
    for exchange, (cp, length), form in product(("allgather", "alltoall"), SIZES[1:], (None, WINDOWS[1]))
}
CASES |= SPANS
SELDOM = {
    name for name in CASES if "-cp2-44-" in name or "-cp4-296-" in name or ("-cp4-40-" in name and "varlen" in name)
}
"""The cases of `make test-all`; one with the same kernel and exchange, of another size, always runs."""


def build(
    group: Any,
    head_dim: int,
    axes: int,
    exchange: str = "allgather",
    kernel: Any = "sdpa",
    form: Any = None,
    device: Device = CPU,
    spans: bool = False,
) -> torch.nn.Module:
    """Build PackedAttention as Megatron does; axes 0: keys arrive rotated; form is in FORMS or WINDOWS, or None."""
    from megamm.mcore.attention import PackedAttention, ScoreForm, attend_by

    config: Any = types.SimpleNamespace(attention_dropout=0.0, kv_channels=head_dim, multi_latent_attention=False)
    collection, rope = types.SimpleNamespace(cp=group, tp=None), Rope(BASE, axes) if axes else None
    scale, cap, window = form or (0, 0, 0)
    return PackedAttention(
        config,
        1,
        pg_collection=collection,
        ops=choose("auto", device.torch_device)[0],
        rope=rope,
        exchange=exchange,
        attend=attend_by(kernel, device, installed()),
        form=ScoreForm(scale, 0 if cap == math.inf else cap, window, spans),
    )


def inputs(seed: int, length: int, heads: tuple[Any, ...]) -> list[torch.Tensor]:
    """Return query, key, value of whole rows and the gradient of the output, float32."""
    _, n, g, head_dim, value_dim, _ = heads
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, head_dim), (g, head_dim), (g, value_dim)]
    tensors = [torch.randn(length, ROWS, *shape, generator=generator) for shape in shapes]
    return [*tensors, torch.randn(length, ROWS, n * value_dim, generator=generator)]


def expected(
    tensors: list[torch.Tensor], packed_seq_metadata: torch.Tensor, axes: int, form: Any = None
) -> list[torch.Tensor]:
    """Return the reference's output and gradients of query, key and value, for whole rows."""
    *qkv, weight = (x.double() for x in tensors)
    leaves = [x.requires_grad_() for x in qkv]
    out = attention(*leaves, packed_seq_metadata, axes or 1, BASE if axes else None, form)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def errors(
    module: torch.nn.Module,
    index: torch.Tensor,
    tensors: list[torch.Tensor],
    packed_seq_metadata: torch.Tensor,
    axes: int,
    form: Any = None,
) -> list[float]:
    """Return relative errors of a module given the tokens `index` of the rows: output, then the three gradients."""
    *qkv, weight = (x[index] for x in tensors)
    leaves = [x.requires_grad_() for x in qkv]
    out = module(*leaves, packed_seq_metadata)
    ours = [out.detach(), *torch.autograd.grad(out, leaves, weight)]
    return [
        relative_error(x, y[index])
        for x, y in zip(ours, expected(tensors, packed_seq_metadata, axes, form), strict=True)
    ]


def errors_of_cases(names: list[str]) -> dict[str, list[float]]:
    """Return the largest errors over all ranks of each of these cases, the same on every rank."""
    from megamm.mcore.context import local_index

    rank = dist.get_rank()
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    results = {}
    for seed, (name, case) in enumerate(CASES.items()):
        if name not in names:
            continue
        cp, length, heads = case["cp"], case["length"], case["heads"]
        group = pairs[rank // 2] if cp == 2 else dist.group.WORLD
        seed += 1000 * (rank // cp)
        index = local_index(length, dist.get_rank(group), cp, torch.device("cpu"))
        form = case.get("form")
        spans = case.get("spans", False)
        module = build(group, heads[3], heads[5], case["exchange"], case.get("kernel", "sdpa"), form, spans=spans)
        packed_seq_metadata = random_metadata(seed, length, only_short=heads[0] == "grouped" and not spans)
        packed_seq_metadata = with_spans(packed_seq_metadata, seed) if spans else packed_seq_metadata
        worst = torch.tensor(errors(module, index, inputs(seed, length, heads), packed_seq_metadata, heads[5], form))
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        results[name] = worst.tolist()
    return results
