"""Linear layers of Megatron-core whose three products are in FP8 (megamm/ops/fp8.py).

Forward multiplies activations and weights in e4m3; backward multiplies the output's gradient in e5m2 with the weight,
and with the activations. Communication of tensor and sequence parallelism is that of Megatron's layers, in bfloat16,
and overlaps with the same products. Weights, their gradients' sums, results and everything between the layers keep
their dtypes, so that checkpoints and exports are those of a bfloat16 run.

Tensor ranks have scales of their own. As scales are powers of two, a value is rounded the same way on all of them, and
layouts differ only where values underflow.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer

from megamm.config import RunConfig
from megamm.model.layout import FP8_MULTIPLE, fp8_layers
from megamm.ops import fp8
from megamm.ops.fp8 import Scaled, Scaling


class _How(NamedTuple):
    """How a layer computes. is_fused: add the weight's gradient to its float32 buffer; is_trained: with backward."""

    scaling: Scaling
    group: Any  # a process group; None where the layer itself does not communicate
    sequence_parallel: bool
    reduce_input_gradient: bool
    is_fused: bool
    is_trained: bool


class _Linear(torch.autograd.Function):
    """input `[S, B, K]`, weight `[N, K]` -> `[S, B, N]`; with sequence parallel, input has S / tp rows."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, how: _How) -> torch.Tensor:
        total = _gathered(input, how.group)[0] if how.sequence_parallel else input
        x = _matrix(total)
        # With sequence parallel, this rank's part is kept: it takes no more memory than the columns of all.
        saved: tuple[torch.Tensor, ...] = (input,)
        if how.is_trained and not how.sequence_parallel:
            rows, columns = fp8.quantize_both(x, fp8.ACTIVATION, how.scaling)
            saved = (columns.values, columns.scale)
        else:
            rows = fp8.quantize(x, fp8.ACTIVATION, how.scaling)
        y_MN = fp8.product(rows, fp8.quantize(weight, fp8.ACTIVATION, how.scaling), input.dtype, fast=True)
        ctx.save_for_backward(weight, *saved)
        ctx.how, ctx.tokens = how, total.shape[:-1]
        return _tokens(y_MN, ctx.tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight, *saved), how = ctx.saved_tensors, ctx.how
        gathered = _gathered(saved[0], how.group, async_op=True) if how.sequence_parallel else None
        dy, dy_t = fp8.quantize_both(_matrix(gradients[0]), fp8.GRADIENT, how.scaling)
        weight_t = fp8.quantize_transposed(weight, fp8.ACTIVATION, how.scaling)
        dx = _tokens(fp8.product(dy, weight_t, gradients[0].dtype), ctx.tokens)
        x_t = Scaled(*saved) if gathered is None else _activations(*gathered, how.scaling)
        dx, work = _reduced(dx, how)
        d_weight = fp8.product(dy_t, x_t, torch.float32 if how.is_fused else weight.dtype)
        if how.is_fused:
            d_weight = _accumulated(weight, d_weight)
        if work is not None:
            work.wait()
        return dx, d_weight, None


def _matrix(tokens: torch.Tensor) -> torch.Tensor:
    """Return `[..., C]` as `[M, C]` with rows of zeros up to a size that products can sum over."""
    matrix = tokens.reshape(-1, tokens.shape[-1])
    missing = -len(matrix) % FP8_MULTIPLE if len(matrix) else FP8_MULTIPLE
    return F.pad(matrix, (0, 0, 0, missing)) if missing else matrix


def _tokens(matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return the rows of a `_matrix` `[M, C]` that are tokens, as `[*shape, C]`."""
    return matrix[: shape.numel()].view(*shape, matrix.shape[1])


def _gathered(part: torch.Tensor, group: Any, async_op: bool = False) -> tuple[torch.Tensor, Any]:
    """Return the parts of all ranks along the first axis, and the work to wait for if async_op."""
    whole = part.new_empty(part.shape[0] * group.size(), *part.shape[1:])
    return whole, dist.all_gather_into_tensor(whole, part.contiguous(), group=group, async_op=async_op)


def _activations(total: torch.Tensor, work: Any, scaling: Scaling) -> Scaled:
    work.wait()
    return fp8.quantize_transposed(_matrix(total), fp8.ACTIVATION, scaling)


def _reduced(dx: torch.Tensor, how: _How) -> tuple[torch.Tensor, Any]:
    """Start the sum of the input's gradient over tensor ranks; return where it will be, and the work to wait for."""
    if how.sequence_parallel:
        own = dx.new_empty(dx.shape[0] // how.group.size(), *dx.shape[1:])
        return own, dist.reduce_scatter_tensor(own, dx.contiguous(), group=how.group, async_op=True)
    if how.reduce_input_gradient:
        dx = dx.contiguous()
        return dx, dist.all_reduce(dx, group=how.group, async_op=True)
    return dx, None


def _accumulated(weight: Any, d_weight: torch.Tensor) -> torch.Tensor:
    """Add the gradient to the buffer; return what stands for it, as Megatron's layers do.

    Megatron's hook that starts the reduction of the buffer runs only for a parameter that gets a gradient.
    """
    weight.main_grad.add_(d_weight)
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """Megatron's layer, whose weight's rows are split over tensor ranks."""

    scaling: Scaling

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        return _forward(self.scaling, input, weight, **options)


class Fp8RowParallelLinear(RowParallelLinear):
    """Megatron's layer, whose weight's columns are split over tensor ranks; it sums the results itself."""

    scaling: Scaling

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        return _forward(self.scaling, input, weight, **options)


def _forward(
    scaling: Scaling,
    input: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: Any,
    **_: Any,
) -> torch.Tensor:
    how = _How(
        scaling, tp_group, sequence_parallel, allreduce_dgrad, gradient_accumulation_fusion, torch.is_grad_enabled()
    )
    output = _Linear.apply(input, weight, how)
    return output if bias is None else output + bias


def use_fp8(chunk: torch.nn.Module, config: RunConfig) -> int:
    """Let the linear maps of the chunk's layers compute in FP8; return their number.

    The first and last layers stay as they are if the config says so, and so does what is not within a layer: the output
    layer, and the projection of multi-token prediction, whose layer counts as a last one. The class is changed after
    the model is built, because Megatron's SequentialMLP builds experts from a spec of its own. Invariant: the
    subclasses add no parameter and no constructor.
    """
    kinds = {ColumnParallelLinear: Fp8ColumnParallelLinear, RowParallelLinear: Fp8RowParallelLinear}
    linears: list[Any] = [
        module for layer in _layers(chunk, config) for module in layer.modules() if type(module) in kinds
    ]
    for module in linears:
        module.__class__ = kinds[type(module)]
        module.scaling = config.train.fp8.recipe
    return len(linears)


def _layers(chunk: Any, config: RunConfig) -> Iterator[TransformerLayer]:
    """Yield the chunk's layers that compute in FP8."""
    in_fp8 = fp8_layers(config)
    for layer in chunk.decoder.layers:
        if layer.layer_number - 1 in in_fp8:
            yield layer
    if not config.train.fp8.last_layers_bf16 and getattr(chunk, "mtp", None) is not None:
        for module in chunk.mtp.layers:
            yield module.transformer_layer
