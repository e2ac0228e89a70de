"""One step through Megatron's schedule: forward and backward of all microbatches, gradients summed exactly.

One `forward_step` serves every mix of modalities and every layout. The loss is already normalised
over the whole job (objective.py); Megatron divides by microbatches and data-parallel size, so the
loss is multiplied by both first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megamm.data.sample import Batch
from megamm.mcore.groups import Groups
from megamm.objective import loss_factors, sums_by_modality, token_counts


@dataclass(frozen=True)
class StepLoss:
    """Mean cross entropy (nats per token) and token count of each modality over the whole job, `[modalities]`."""

    mean: torch.Tensor
    count: torch.Tensor


def prepare(model: DistributedDataParallel) -> None:
    """Tell Megatron's schedule how to finish gradients; once after building."""
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.no_sync_func = model.no_sync


def run(
    model: DistributedDataParallel,
    batches: Sequence[Batch],
    loss_weights: torch.Tensor,
    groups: Groups,
    forward_only: bool = False,
) -> StepLoss:
    """Forward (and backward) over this rank's microbatches; gradients end in `main_grad`, data-parallel reduced.

    Every rank calls it every step with as many microbatches; loss_weights is float64 `[modalities]`.
    """
    modalities = loss_weights.numel()
    counts = groups.sum_over_data(token_counts(batches, modalities))
    scale = 1.0 if forward_only else float(len(batches) * groups.data_size)

    def loss_func(batch: Batch, loss_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss = (loss_BS.float() * loss_factors(batch, counts, loss_weights)).sum() * scale
        one = torch.ones((), dtype=torch.int, device=loss.device)
        return loss, one, sums_by_modality(loss_BS.detach() * batch.loss_weight, batch, modalities)

    def forward_step(iterator: Iterator[Batch], chunk: Any) -> tuple[torch.Tensor, Any]:
        batch = next(iterator)
        output = chunk(batch.input_ids, None, batch.segment, labels=batch.labels)
        return output, partial(loss_func, batch)

    if not forward_only:
        model.zero_grad_buffer()
    sums = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=batches[0].input_ids.shape[1],
        micro_batch_size=batches[0].input_ids.shape[0],
        forward_only=forward_only,
    )
    total = torch.stack(sums).sum(0) if groups.is_last_stage else torch.zeros_like(counts)
    total = groups.sum_over_data(groups.from_last_stage(total))
    return StepLoss(torch.where(counts > 0, total / counts.clamp(min=1e-30), torch.nan), counts)
