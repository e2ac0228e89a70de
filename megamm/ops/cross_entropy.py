"""Cross entropy of a linear layer's outputs without storing the full logits.

    logits = hidden @ weight^T,  lse_t = log(sum over v of exp(logits_tv)),
    CE_t = lse_t - logits_t,label,    loss = sum over t of w_t * CE_t.

Tokens are processed chunk by chunk. Since every token's weight is known, a chunk's gradient is computed at once: it
overwrites the chunk's logits and is multiplied into the gradients of hidden and weight; the backward pass only scales
these two. In a tensor-parallel group, rank r holds rows [r * V_local, (r + 1) * V_local) of the weight; one exchange
per chunk, of three numbers per token, gives every rank the same softmax.

The memory beyond arguments and gradients is one chunk of logits: 1/24 of all from 8160 tokens on, with the weight's
gradient in float32.
Sources: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models"; Shoeybi et al. 2019, "Megatron-LM"
(vocabulary parallel).
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from megamm.ops.check import check_same_device, check_same_kind

MOST_CHUNKS, LEAST_ROWS = 24, 340
"""Maximum number of equal chunks that tokens are split into: a chunk has 4 % of the logits, and the weight's gradient
is read and written once for each. Products of fewer than LEAST_ROWS rows would be slow."""
_COLUMN_MULTIPLE = 64
"""Rows of the logits start at multiples of this many elements, as fast matrix products require."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weight: Tensor | None = None,
    *,
    vocabulary_size: int | None = None,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (loss, CE_t): the weighted sum, differentiable in hidden and weight, and each token's own `[T]`, detached.

    hidden `[T, H]` and weight `[V_local, H]` have one floating dtype, labels int64 `[T]` (ids of the whole vocabulary),
    token_weight float32 `[T]` (None: 1 each). Results are float32 (float64 for float64 arguments), as are all
    computations after the logits; the logits and their gradient have hidden's dtype. The weight's gradient is summed
    over chunks in float32 and rounded to its dtype once, in the backward pass. Runs are bitwise reproducible.

    Rows of weight from vocabulary_size on (default: none) are padding: excluded from softmax and gradient.
    A token with the label ignore_index has loss 0, CE_t 0 and no gradient, whatever its logits are. Any other label
    outside [0, vocabulary_size) makes loss, CE_t and gradients NaN: raising would have to wait for the device.

    With a group every rank passes the same hidden, labels and token_weight and gets the same results, but *its part* of
    hidden's gradient (from its columns): sum it over the group, as Megatron's mapping functions do.

    Raises ValueError, which names both sides, if shapes, dtypes or devices do not match.
    """
    ranks = 1 if group is None else group.size()
    size = ranks * weight.shape[0] if vocabulary_size is None else vocabulary_size
    check_arguments(hidden, weight, labels, token_weight, size, ranks)
    with_grad = torch.is_grad_enabled()
    loss, token_loss, _, _ = _linear_cross_entropy(
        hidden,
        weight,
        labels,
        token_weight,
        size,
        ignore_index,
        group.group_name if group is not None and ranks > 1 else "",
        chunk_rows or _chunk_rows(len(hidden)),
        with_grad and hidden.requires_grad,
        with_grad and weight.requires_grad,
    )
    return loss, token_loss


def _chunk_rows(tokens: int) -> int:
    chunks = max(1, min(MOST_CHUNKS, tokens // LEAST_ROWS))
    return max(1, -(-tokens // chunks))


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weight: Tensor | None,
    vocabulary_size: int,
    ranks: int,
) -> None:
    """Raise ValueError if the arguments of `linear_cross_entropy` do not match each other."""

    op = "linear_cross_entropy"
    check_same_kind(op, hidden=hidden, weight=weight)

    def check(fits: bool, what: str) -> None:
        if not fits:
            raise ValueError(f"{op}: {what}")

    shape = f"hidden {list(hidden.shape)}"
    fits = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    check(fits, f"{shape} and weight {list(weight.shape)} are not [T, H] and [V, H]")
    check(hidden.is_floating_point(), f"hidden is {hidden.dtype}, and must be floating")
    others = {"labels": (labels, torch.int64)}
    if token_weight is not None:
        others["token_weight"] = (token_weight, torch.float32)
        check(not token_weight.requires_grad, "token_weight is a constant here and cannot require a gradient")
    for name, (tensor, dtype) in others.items():
        check(tensor.shape == hidden.shape[:1], f"{name} {list(tensor.shape)} does not match {shape}")
        check(tensor.dtype == dtype, f"{name} is {tensor.dtype}, and must be {dtype}")
        check_same_device(op, hidden=hidden, **{name: tensor})
    rows = ranks * weight.shape[0]
    check(0 < vocabulary_size <= rows, f"vocabulary_size {vocabulary_size} is not in 1..{rows}, the rows of weight")


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weight: Tensor | None,
    vocabulary_size: int,
    ignore_index: int,
    group: str,
    chunk_rows: int,
    with_hidden: bool,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, CE_t, and the loss's gradients of hidden and of weight; a gradient that is not needed is empty)."""
    kernels = torch.ops.megamm
    process_group = _resolve_process_group(GroupName(group)) if group else None
    start = weight.shape[0] * process_group.rank() if process_group else 0
    # Padding is at the end of the whole vocabulary: the last ranks may have some rows of it, or nothing else.
    columns = min(max(vocabulary_size - start, 0), weight.shape[0])
    used = weight[:columns]
    counted = labels != ignore_index
    factor = _factor(labels, token_weight, counted, vocabulary_size).to(_math_dtype(hidden))
    # Index among this rank's columns; -1: on another rank.
    target = torch.where((labels >= start) & (labels < start + columns), labels - start, -1)

    statistics = factor.new_empty(len(labels), 3)
    d_hidden, d_weight = _new_gradients(hidden, weight, with_hidden, with_weight)
    width = -(-columns // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE
    # One buffer for all chunks; the view leaves out the columns that only align its rows.
    buffer = hidden.new_empty(min(chunk_rows, len(labels)), width)[:, :columns]
    for begin in range(0, len(labels), chunk_rows):
        rows = slice(begin, begin + chunk_rows)
        logits = torch.mm(hidden[rows], used.t(), out=buffer[: len(labels) - begin])
        kernels.cross_entropy_statistics.default(logits, target[rows], statistics[rows])
        if process_group:
            statistics[rows] = _combine(statistics[rows], process_group)
        if not (with_hidden or with_weight):
            continue
        # Overwrites the logits with their gradient.
        kernels.cross_entropy_gradient_.default(logits, target[rows], statistics[rows], factor[rows])
        if with_hidden:
            torch.mm(logits, used, out=d_hidden[rows])
        if with_weight:
            _add_product(d_weight[:columns], logits, hidden[rows])
    return *_losses(statistics, counted, factor), d_hidden, d_weight


def _factor(labels: Tensor, token_weight: Tensor | None, counted: Tensor, vocabulary_size: int) -> Tensor:
    """The factor of each token's loss: 0 if it is ignored, NaN if its label is invalid."""
    factor = counted.float() if token_weight is None else token_weight.where(counted, 0.0)
    return factor.masked_fill(counted & ((labels < 0) | (labels >= vocabulary_size)), torch.nan)


def _math_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _new_gradients(hidden: Tensor, weight: Tensor, with_hidden: bool, with_weight: bool) -> tuple[Tensor, Tensor]:
    """Buffers for the gradients: hidden's uninitialised, weight's zeros in the dtype of the sum."""
    return (
        hidden.new_empty(hidden.shape if with_hidden else 0),
        weight.new_zeros(weight.shape if with_weight else 0, dtype=_math_dtype(weight)),
    )


def _combine(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Combine the statistics `[C, 3]` over all ranks' columns: m, sum of exp(x - m), x at the target."""
    gathered = own.new_empty(group.size(), *own.shape)
    dist.all_gather(list(gathered.unbind()), own.contiguous(), group=group)
    maxima, exponentials, picked = gathered.unbind(2)
    maximum = maxima.amax(0)
    # Where all logits of a token are -inf, nothing may be subtracted.
    scale = (maxima - maximum.masked_fill(maximum == -torch.inf, 0.0)).exp()
    return torch.stack([maximum, (exponentials * scale).sum(0), picked.sum(0)], 1)


def _add_product(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """total `[V, H]` += d_logits^T @ hidden, where total may have a wider dtype than the factors."""
    if total.dtype == hidden.dtype:
        total.addmm_(d_logits.t(), hidden)
    elif hidden.device.type == "cpu":
        # Rounded to hidden's dtype once per chunk, but summed in total's; in blocks, to need little extra memory.
        for part, columns in zip(total.split(1024), d_logits.split(1024, 1), strict=True):
            part += columns.t() @ hidden
    else:
        torch.addmm(total, d_logits.t(), hidden, out_dtype=total.dtype, out=total)


def _losses(statistics: Tensor, counted: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, CE_t `[T]`)."""
    maximum, exponentials, picked = statistics.unbind(1)
    # Large numbers are subtracted from each other before a small one is added.
    token_loss = (maximum - picked) + exponentials.log()
    token_loss = token_loss.where(counted, 0.0).masked_fill(factor.isnan(), torch.nan)
    return (factor * token_loss).sum(), token_loss


def _shapes(hidden: Tensor, weight: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, with_hidden, with_weight = arguments
    loss = hidden.new_empty((), dtype=_math_dtype(hidden))
    return loss, loss.new_empty(labels.shape), *_new_gradients(hidden, weight, with_hidden, with_weight)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # The gradients are outputs of the forward pass: the backward pass has only to scale them by the loss's own.
    _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*others[1:])
    ctx.dtype, ctx.needed = inputs[0].dtype, inputs[-2:]


def _scale_gradients(ctx: Any, of_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = [
        (gradient * of_loss).to(ctx.dtype) if needed and of_loss is not None else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needed, strict=True)
    ]
    return *gradients, *[None] * 8  # one for each further argument of _in_chunks


_linear_cross_entropy = torch.library.custom_op("megamm::linear_cross_entropy", _in_chunks, mutates_args=())


def register() -> None:
    """Register shapes and gradients of the ops in torch.ops.megamm."""
    _linear_cross_entropy.register_fake(_shapes)
    _linear_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)
    for kernel in ("cross_entropy_statistics", "cross_entropy_gradient_"):
        torch.library.register_fake(f"megamm::{kernel}", lambda *_: None)


def linear_cross_entropy_torch(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weight: Tensor | None = None,
    *,
    vocabulary_size: int | None = None,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch: full logits, gradients by autograd.

    softcap: limits logits to softcap * tanh(logits / softcap) first.
    """
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    size = ranks * weight.shape[0] if vocabulary_size is None else vocabulary_size
    check_arguments(hidden, weight, labels, token_weight, size, ranks)
    start = rank * weight.shape[0]
    counted = labels != ignore_index
    # An ignored token's logits can have any value, and 0 * inf is NaN.
    logits = F.linear(hidden.masked_fill(~counted[:, None], 0.0), weight[: max(size - start, 0)])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    invalid = counted & ((labels < 0) | (labels >= size))
    label = labels.masked_fill(~counted | invalid, 0)
    if ranks == 1:
        token_loss = F.cross_entropy(logits, label, reduction="none")
    else:
        token_loss = _over_group(logits, label - start, group)
    token_loss = token_loss.where(counted, 0.0) * torch.where(invalid, torch.nan, 1.0)
    factor = counted if token_weight is None else token_weight.where(counted, 0.0)
    return (factor * token_loss).sum(), token_loss.detach()


def _over_group(logits: Tensor, target: Tensor, group: Any) -> Tensor:
    """CE `[T]` over the columns of all ranks; target counts from this rank's first column."""
    maximum = F.pad(logits.detach(), (0, 1), value=-torch.inf).amax(1)
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group)
    exponentials = (logits - maximum[:, None]).exp().sum(1)
    here = (target >= 0) & (target < logits.shape[1])
    # One additional column, so that a rank without a target can pick one.
    padded = F.pad(logits, (0, 1))
    picked = padded.gather(1, target.where(here, logits.shape[1])[:, None])[:, 0]
    exponentials, picked = _SumOverGroup.apply(torch.stack([exponentials, picked]), group)
    return maximum + exponentials.log() - picked


class _SumOverGroup(torch.autograd.Function):
    """Sum over ranks that all compute the same loss from it: each takes its own part of that loss's gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
