"""Cross entropy of a linear layer's outputs in plain torch: full logits, gradients by autograd.

The same function as cross_entropy.py, whose docstring has the formulas, in as few lines as possible. `ops: torch`
trains with it, and the chunked one is tested against it. Computations are in float32 (float64 for float64).
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megamm.ops.cross_entropy import check_arguments


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weight: Tensor | None = None,
    *,
    vocabulary_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Same arguments, results and errors as `cross_entropy.linear_cross_entropy`; softcap: first limits logits to
    softcap * tanh(logits / softcap)."""
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    size = ranks * weight.shape[0] if vocabulary_size is None else vocabulary_size
    check_arguments(hidden, weight, labels, token_weight, size, ranks, label_smoothing)
    start = rank * weight.shape[0]
    counted = labels != ignore_index
    # An ignored token's logits can have any value, and 0 * inf is NaN.
    logits = F.linear(hidden.masked_fill(~counted[:, None], 0.0), weight[: max(size - start, 0)])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    invalid = counted & ((labels < 0) | (labels >= size))
    label = labels.masked_fill(~counted | invalid, 0)
    if ranks == 1:
        token_loss = F.cross_entropy(logits, label, reduction="none", label_smoothing=label_smoothing)
        log_sum_exp = logits.logsumexp(1) if z_loss else logits
    else:
        token_loss, log_sum_exp = _over_group(logits, label - start, size, label_smoothing, group)
    token_loss = token_loss.where(counted, 0.0) * torch.where(invalid, torch.nan, 1.0)
    factor = counted if token_weight is None else token_weight.where(counted, 0.0)
    with_z = token_loss + z_loss * log_sum_exp.square().where(counted, 0.0) if z_loss else token_loss
    return (factor * with_z).sum(), token_loss.detach()


def _over_group(logits: Tensor, target: Tensor, size: int, label_smoothing: float, group: Any) -> tuple[Tensor, Tensor]:
    """(CE, log of the sum of exponentials) `[T]`; target counts from this rank's first column."""
    maximum = F.pad(logits.detach(), (0, 1), value=-torch.inf).amax(1)
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group)
    exponentials = (logits - maximum[:, None]).exp().sum(1)
    here = (target >= 0) & (target < logits.shape[1])
    # One additional column, so that a rank without a target can pick one.
    padded = F.pad(logits, (0, 1))
    picked = padded.gather(1, target.where(here, logits.shape[1])[:, None])[:, 0]
    exponentials, picked, total = _SumOverGroup.apply(torch.stack([exponentials, picked, logits.sum(1)]), group)
    log_sum_exp = maximum + exponentials.log()
    return log_sum_exp - (1 - label_smoothing) * picked - label_smoothing * total / size, log_sum_exp


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
