"""Proofs of the operators of csrc/, of grouped products, of products in FP8 and of those that add to a wider sum.

Their inputs have the sizes of a run, in fewer tokens: enough of them on a GPU that times mean something.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megamm.ops import fp8, grouped_fp8
from megamm.ops.fp8 import ACTIVATION, GRADIENT, Scaled, Scaling
from megamm.ops.grouped_linear import grouped_linear, grouped_linear_torch
from megamm.ops.proof import Draw, Function, Inputs, Proof
from megamm.ops.registry import OPS

PATCH = (2, 4, 4)
"""Frames, rows and columns of a patch."""


@dataclass(frozen=True)
class KernelSizes:
    """Sizes of the inputs: of the model, but for the tokens and at most so many words of the vocabulary."""

    tokens: int
    hidden: int
    width: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    zero_centered: bool = False

    @property
    def most(self) -> int:
        """The number of terms of the longest sum."""
        return max(self.tokens, self.hidden, self.vocabulary, 2 * math.prod(PATCH))

    def form(self, dtype: torch.dtype) -> str:
        heads = f"{self.heads} + {self.groups} heads of {self.head_dim}"
        norm = ", zero-centred norms" if self.zero_centered else ""
        return (
            f"{_named(dtype)}, {self.tokens} tokens of {self.hidden}, MLP {self.width}, {heads}, "
            f"vocabulary {self.vocabulary}{norm}"
        )


def op_proofs(names: Sequence[str], dtype: torch.dtype, sizes: KernelSizes) -> list[Proof]:
    """Return a proof of each of these operators of csrc/ against plain torch."""
    proofs = []
    for name in names:
        csrc, plain = OPS[name].csrc, OPS[name].torch
        if name == "patch_embed_3d":
            csrc, plain = partial(_embed, csrc), partial(_embed, plain)
        draw = partial(_DRAW[name], dtype=dtype, s=sizes)
        sides = {"csrc": csrc, "torch": plain}
        # The loss rounds the logits' gradient to the dtype, which its own gradients inherit.
        slack = torch.finfo(dtype).eps if name == "linear_cross_entropy" else None
        proofs.append(Proof(name, sizes.form(dtype), draw, plain, sides, slack, sizes.most))
    return proofs


def _draw_norm(d: Draw, dtype: torch.dtype, s: KernelSizes, addends: int = 1) -> Inputs:
    x = [d.leaf(s.tokens, s.hidden, dtype=dtype) for _ in range(addends)]
    return Inputs((*x, d.leaf(s.hidden, dtype=dtype)), {"zero_centered": s.zero_centered})


def _draw_swiglu(d: Draw, dtype: torch.dtype, s: KernelSizes) -> Inputs:
    return Inputs((d.leaf(s.tokens, 2 * s.width, dtype=dtype),), {"row_weight": d.normal(s.tokens).abs()})


def _draw_patches(d: Draw, dtype: torch.dtype, s: KernelSizes) -> Inputs:
    patches = d.leaf(2, 2, 4, 4, 3 * math.prod(PATCH), dtype=dtype)
    return Inputs((patches,), {"patch": PATCH, "channels": 3, "size": (4, 16, 16)})


def _draw_rope(d: Draw, dtype: torch.dtype, s: KernelSizes) -> Inputs:
    query, key = (d.leaf(s.tokens, 1, heads, s.head_dim, dtype=dtype) for heads in (s.heads, s.groups))
    pairs = torch.arange(s.head_dim // 2, device=d.device)
    frequency = (1e6 ** -(2 * pairs / s.head_dim)).expand(1, -1).contiguous()
    position = torch.arange(s.tokens, device=d.device).expand(1, 1, -1).contiguous()
    return Inputs((query, key), {"position": position, "frequency": frequency})


def _draw_head(d: Draw, dtype: torch.dtype, s: KernelSizes) -> Inputs:
    hidden, weight = d.leaf(s.tokens, s.hidden, dtype=dtype), d.leaf(s.vocabulary, s.hidden, dtype=dtype)
    labels = d.below(s.vocabulary, s.tokens).masked_fill(d.below(8, s.tokens) == 0, -100)
    return Inputs((hidden, weight), {"labels": labels, "token_weight": d.normal(s.tokens).abs()})


def _draw_clip(d: Draw, dtype: torch.dtype, s: KernelSizes) -> Inputs:
    weight, bias = d.leaf(s.hidden, 3, *PATCH, dtype=dtype), d.leaf(s.hidden, dtype=dtype)
    return Inputs((weight, bias), {"video": d.below(256, 2, 3, 4, 16, 16).to(torch.uint8), "patch": PATCH})


def _embed(function: Function, weight: Tensor, bias: Tensor, *, video: Tensor, patch: tuple[int, ...]) -> Tensor:
    result: Tensor = function(video, weight, bias, patch=patch)
    return result


_DRAW: dict[str, Callable[..., Inputs]] = {
    "rms_norm": _draw_norm,
    "add_rms_norm": partial(_draw_norm, addends=2),
    "rope": _draw_rope,
    "swiglu": _draw_swiglu,
    "linear_cross_entropy": _draw_head,
    "patch_embed_3d": _draw_clip,
    "unpatchify_3d": _draw_patches,
}


def grouped_proof(dtype: torch.dtype, sizes: KernelSizes, experts: int) -> Proof:
    """Return the proof of a product of all experts: some have no rows, and their gradients must be 0."""
    rows = sizes.tokens

    def draw(d: Draw) -> Inputs:
        x = d.leaf(rows, sizes.hidden, dtype=dtype)
        weight = d.leaf(experts, 2 * sizes.width, sizes.hidden, dtype=dtype)
        chosen = d.below(max(1, experts - 1), rows) + (experts > 1)
        return Inputs((x, weight), {"sizes": torch.bincount(chosen, minlength=experts)})

    form = f"{_named(dtype)}, {rows} x {sizes.hidden} to {experts} x {2 * sizes.width}"
    candidates = {"grouped": grouped_linear, "sequential": grouped_linear_torch}
    return Proof("grouped_linear", form, draw, grouped_linear_torch, candidates, terms=sizes.most)


FP8_SLACK, FAST_FP8_SLACK = 2.0**-8, 2.0**-5
"""Error of a product in FP8 relative to its largest result. Tensor cores of Hopper keep about 14 bits of a sum, which
costs up to 2 % in sums of 4096 products (fast); otherwise sums of 128 products are added in float32.
Source: DeepSeek-AI 2024, DeepSeek-V3, section 3.3.2."""


def fp8_proofs(scaling: Scaling, sizes: KernelSizes) -> list[Proof]:
    """Return the proofs of the three products of a layer: forward, and the gradients of input and weight."""
    tokens = -(-sizes.tokens // 16) * 16
    forward, inputs = (tokens, sizes.hidden, sizes.width), (tokens, sizes.width, sizes.hidden)
    weights = (sizes.width, tokens, sizes.hidden)
    return [
        _fp8_proof("forward", forward, scaling, ACTIVATION, torch.bfloat16, True),
        _fp8_proof("gradient of inputs", inputs, scaling, GRADIENT, torch.bfloat16, False),
        _fp8_proof("gradient of weights", weights, scaling, GRADIENT, torch.float32, False),
    ]


def _fp8_proof(
    way: str, shape: tuple[int, int, int], scaling: Scaling, left: torch.dtype, result: torch.dtype, fast: bool
) -> Proof:
    rows, inner, columns = shape

    def draw(d: Draw) -> Inputs:
        a = fp8.quantize(d.normal(rows, inner, dtype=torch.bfloat16), left, scaling)
        b = fp8.quantize(d.normal(columns, inner, dtype=torch.bfloat16), ACTIVATION, scaling)
        return Inputs((*a, *b), {"dtype": result, "fast": fast})

    form = f"{scaling}, {way}, {rows} x {inner} x {columns}"
    slack = FAST_FP8_SLACK if fast else FP8_SLACK
    return Proof("fp8", form, draw, _fp8_plain, {"torch": _fp8_product}, slack, inner)


def _fp8_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, dtype: torch.dtype, fast: bool) -> Tensor:
    return fp8.product(Scaled(a, a_scale), Scaled(b, b_scale), dtype, fast=fast)


def _fp8_plain(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, dtype: torch.dtype, fast: bool) -> Tensor:
    product = (a.to(a_scale.dtype) * a_scale) @ (b.to(b_scale.dtype) * b_scale).t()
    return product if product.dtype == torch.float64 else product.to(dtype)


def grouped_fp8_proofs(scaling: Scaling, sizes: KernelSizes, experts: int) -> list[Proof]:
    """Return the proofs of the grouped products of experts: forward, and the gradients of input and weight.

    Every group has rows, and as many as a kernel may multiply, so that all of the results are defined.
    """
    each = max(1, sizes.tokens // experts // grouped_fp8.MULTIPLE) * grouped_fp8.MULTIPLE
    wide = 2 * sizes.width
    forward = _grouped_fp8_proof("forward", (each, sizes.hidden, wide), scaling, experts, True)
    inputs = _grouped_fp8_proof("gradient of inputs", (each, wide, sizes.hidden), scaling, experts, False)
    return [forward, inputs, _grouped_fp8_weight_proof((each, wide, sizes.hidden), scaling, experts)]


def _ends(experts: int, each: int, device: torch.device) -> Tensor:
    return torch.arange(1, experts + 1, device=device, dtype=torch.int32) * each


def _grouped_fp8_proof(way: str, shape: tuple[int, int, int], scaling: Scaling, experts: int, fast: bool) -> Proof:
    each, inner, columns = shape

    def draw(d: Draw) -> Inputs:
        a, a_scale = fp8.quantize(d.normal(experts * each, inner, dtype=torch.bfloat16), ACTIVATION, "rowwise")
        axes = 2 if scaling == "rowwise" else (1, 2)
        b, b_scale = fp8.quantize_along(d.normal(experts, columns, inner, dtype=torch.bfloat16), ACTIVATION, axes)
        scales = a_scale.view(-1), b_scale.squeeze(2).expand(-1, columns).contiguous()
        return Inputs((a, scales[0], b, scales[1]), {"ends": _ends(experts, each, d.device), "fast": fast})

    def grouped(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, ends: Tensor, fast: bool) -> Tensor:
        return grouped_fp8.grouped_product(a, a_scale, b.transpose(1, 2), b_scale, ends, fast=fast)

    def plain(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, **_: object) -> Tensor:
        left = (a.to(a_scale.dtype) * a_scale[:, None]).view(experts, each, inner)
        product = (left @ (b.to(b_scale.dtype) * b_scale[:, :, None]).transpose(1, 2)).flatten(0, 1)
        return product if product.dtype == torch.float64 else product.bfloat16()

    form = f"{scaling}, {way}, {experts} x {each} x {inner} x {columns}"
    return Proof("grouped_fp8", form, draw, plain, {"grouped": grouped}, FAST_FP8_SLACK if fast else FP8_SLACK, inner)


def _grouped_fp8_weight_proof(shape: tuple[int, int, int], scaling: Scaling, experts: int) -> Proof:
    each, rows, columns = shape

    def draw(d: Draw) -> Inputs:
        scaled = []
        for channels in (rows, columns):
            axes = 2 if scaling == "rowwise" else (1, 2)
            x = d.normal(experts, channels, each, dtype=torch.bfloat16)
            values, scale = fp8.quantize_along(x, ACTIVATION, axes)
            # Groups lie side by side along the sum.
            scaled += [values.view(torch.uint8).transpose(0, 1).flatten(1).contiguous().view(ACTIVATION)]
            scaled += [scale.squeeze(2).expand(-1, channels).flatten().contiguous()]
        return Inputs(tuple(scaled), {"ends": _ends(experts, each, d.device)})

    def grouped(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, ends: Tensor) -> Tensor:
        return grouped_fp8.grouped_product(a, a_scale, b.t(), b_scale, ends)

    def plain(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, **_: object) -> Tensor:
        left, right = (
            x.to(scale.dtype).view(len(x), experts, each).transpose(0, 1) * scale.view(experts, -1, 1)
            for x, scale in ((a, a_scale), (b, b_scale))
        )
        product = left @ right.transpose(1, 2)
        return product if product.dtype == torch.float64 else product.bfloat16()

    form = f"{scaling}, gradient of weights, {experts} x {rows} x {each} x {columns}"
    return Proof("grouped_fp8", form, draw, plain, {"grouped": grouped}, FP8_SLACK, each)


def accumulation_proof(dtype: torch.dtype, sizes: KernelSizes, candidates: dict[str, Function]) -> Proof:
    """Return the proof of functions that add `rows^T columns` to a float32 sum in place, as `add_product_`.

    A GPU's tensor cores add a few products at a time and truncate: with M tokens, an error of M / 4 units is allowed,
    far below the rounding of products to bfloat16 (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores").
    """

    def draw(d: Draw) -> Inputs:
        rows, columns = (d.normal(sizes.tokens, n, dtype=dtype) for n in (sizes.width, sizes.hidden))
        return Inputs((d.normal(sizes.width, sizes.hidden), rows, columns))

    def adding(function: Function) -> Function:
        def add(total: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
            result = total.clone()
            function(result, rows, columns)
            return result

        return add

    def plain(total: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return total + rows.to(total.dtype).t() @ columns.to(total.dtype)

    form = f"{_named(dtype)} to float32, {sizes.tokens} x {sizes.width} x {sizes.hidden}"
    slack = sizes.tokens / 4 * torch.finfo(torch.float32).eps / 2
    sides = {name: adding(function) for name, function in candidates.items()}
    return Proof("weight_gradients", form, draw, plain, sides, slack)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
