"""One step with Megatron's schedule: forward and backward of all microbatches, gradients summed exactly.

The same `forward_step` works for every mix of modalities and every layout. The loss is already normalised over the
whole job (objective.py); Megatron divides by microbatches and by data x context ranks, so it is first multiplied by
both.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megamm.common.sample import Batch
from megamm.mcore.context import local_index
from megamm.mcore.process_groups import ProcessGroups
from megamm.model.loss import StepLoss, Targets, means, modality_sums, targets_of, token_counts, token_factor


def prepare(chunks: Sequence[DistributedDataParallel]) -> None:
    """Set the functions by which Megatron's schedule finishes gradients; call it once after building."""
    no_sync = [chunk.no_sync for chunk in chunks]
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]


def local_targets(batch: Batch, groups: ProcessGroups, depths: int) -> tuple[torch.Tensor, Targets]:
    """Return input ids `[B, S/cp]` and targets of this context rank's tokens; targets are shifted on the whole row."""
    index = local_index(batch.input_ids.shape[1], groups.context_rank, groups.context_size, batch.input_ids.device)
    return batch.input_ids[:, index], targets_of(batch, depths).at(index)


def run(
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[Batch],
    loss_weights: torch.Tensor,
    mtp_weight: float,
    groups: ProcessGroups,
    forward_only: bool = False,
    timed: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> StepLoss:
    """Run forward (and backward) over this rank's microbatches; the reduced gradients are in `main_grad`.

    Every rank calls it every step with the same number of microbatches; loss_weights is float64 `[modalities]`. Each
    forward of a chunk is within `timed()`.
    """
    depths = 1 + (chunks[0].config.mtp_num_layers or 0)
    prepared = [(batch, *local_targets(batch, groups, depths)) for batch in batches]
    counts = groups.sum_over_data(token_counts([targets for _, _, targets in prepared], loss_weights.numel()))
    scale = 1.0 if forward_only else float(len(batches) * groups.collection.dp_cp.size())

    def loss_func(targets: Targets, output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        loss, loss_KBS = output
        sums = modality_sums(loss_KBS, targets, loss_weights.numel())
        return loss * scale, torch.ones((), dtype=torch.int, device=loss.device), sums

    def forward_step(iterator: Iterator[Any], chunk: Any) -> tuple[Any, Any]:
        batch, input_ids, targets = next(iterator)
        factor = token_factor(targets, counts, loss_weights, mtp_weight)
        with timed():
            output = chunk(input_ids, None, batch.packed_seq_metadata, labels=targets.labels, loss_mask=factor)
        return output, partial(loss_func, targets)

    if not forward_only:
        for chunk in chunks:
            chunk.zero_grad_buffer()
    iterators = [iter(prepared) for _ in chunks]
    sums = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=batches[0].input_ids.shape[1],
        micro_batch_size=batches[0].input_ids.shape[0],
        forward_only=forward_only,
    )
    # One value per tensor-parallel group of the last stage, sent to all ranks, so that all make the same decisions.
    has_loss = groups.is_last_stage and groups.tensor_rank == 0
    total = groups.sum_over_job(torch.stack(sums).sum(0) if has_loss else torch.zeros_like(counts[0]))
    return StepLoss(means(total, counts[0]), counts[0])
