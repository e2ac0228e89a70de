"""Forward and backward of all microbatches of a step, for every mix of modalities and every layout.

`run` uses Megatron's schedule (pipeline, gradient buffers); `run_unsharded` is for an engine that reduces gradients
itself and has the whole model on every data-parallel rank. The loss is the same: it is normalised over the whole job
(model/loss.py) before the backward pass, so that gradients are plain sums.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias, reset_model_temporary_tensors
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megamm.common.sample import Batch
from megamm.config import MTPConfig
from megamm.mcore.backbone import Backbone
from megamm.mcore.context import local_index
from megamm.mcore.process_groups import ProcessGroups
from megamm.mcore.varlen import note_lengths
from megamm.model.loss import StepLoss, Targets, means, modality_sums, targets_of, token_counts, token_factor


def prepare(chunks: Sequence[DistributedDataParallel], groups: ProcessGroups) -> None:
    """Set what Megatron's schedule reads from the chunks' config to finish gradients; call it once after building."""
    no_sync = [chunk.no_sync for chunk in chunks]
    ranks = groups.collection.dp_cp.size()
    for chunk in chunks:
        # Megatron averages gradients by multiplying every buffer before its sum over ranks, a pass over all of it.
        # Dividing the losses (this one, and the routers' auxiliary loss) has the same result.
        chunk.config.grad_scale_func = lambda loss: loss / ranks
        for bucket_group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            for bucket in bucket_group.buckets:
                bucket.gradient_scaling_factor = 1.0
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        # Here the flag means that gradients of q and k norms are partial sums over tensor ranks, to be summed. This is
        # true for norms per head. The norm of a latent is before the split into heads: summing would multiply its
        # gradient. It is set only now, because Megatron 0.19 builds no norm of a latent without it.
        chunk.config.qk_layernorm = chunk.config.qk_layernorm and not chunk.config.multi_latent_attention


def local_targets(batch: Batch, groups: ProcessGroups, depths: int) -> tuple[torch.Tensor, Targets]:
    """Return input ids `[B, S/cp]` and targets of this context rank's tokens; targets are shifted on the whole row."""
    index = local_index(batch.input_ids.shape[1], groups.context_rank, groups.context_size, batch.input_ids.device)
    return batch.input_ids[:, index], targets_of(batch, depths).at(index)


def _metadata(batch: Batch) -> torch.Tensor:
    """Return the rows' packed_seq_metadata, with the lengths of their documents noted for attention."""
    packed_seq_metadata = batch.packed_seq_metadata
    note_lengths(packed_seq_metadata, batch.lengths)
    return packed_seq_metadata


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
    # Megatron divides by microbatches, and `prepare` by data x context ranks, but the loss is already normalised over
    # the job.
    scale = 1.0 if forward_only else float(len(batches) * groups.collection.dp_cp.size())

    def loss_func(targets: Targets, output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        loss, loss_KBS = output
        sums = modality_sums(loss_KBS, targets, loss_weights.numel())
        # With three values, Megatron divides the loss by the second (1: it is normalised) and collects the third.
        return loss * scale, torch.ones((), dtype=torch.int, device=loss.device), sums

    def forward_step(iterator: Iterator[Any], chunk: Any) -> tuple[Any, Any]:
        batch, input_ids, targets = next(iterator)
        factor = token_factor(targets, counts, loss_weights, mtp_weight)
        with timed():
            output = chunk(input_ids, None, _metadata(batch), labels=targets.labels, loss_mask=factor)
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


def token_losses(
    chunks: Sequence[DistributedDataParallel], batches: Sequence[Batch], groups: ProcessGroups
) -> list[torch.Tensor]:
    """Return the cross entropy of each label, float32 `[B, S]` of each microbatch, on every rank of its data rank."""
    depths = 1 + (chunks[0].config.mtp_num_layers or 0)
    prepared = [(batch, *local_targets(batch, groups, depths)) for batch in batches]

    def loss_func(output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        loss, loss_KBS = output
        return loss, torch.ones((), dtype=torch.int, device=loss.device), loss_KBS[0].float()

    def forward_step(iterator: Iterator[Any], chunk: Any) -> tuple[Any, Any]:
        batch, input_ids, targets = next(iterator)
        mask = targets.loss_weight
        return chunk(input_ids, None, _metadata(batch), labels=targets.labels, loss_mask=mask), loss_func

    iterators = [iter(prepared) for _ in chunks]
    rows, length = batches[0].input_ids.shape
    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=True,
    )
    device = batches[0].input_ids.device
    whole = torch.zeros(len(batches), rows, length, device=device)
    if groups.is_last_stage:
        whole[..., local_index(length, groups.context_rank, groups.context_size, device)] = torch.stack(found)
    # Each token is on one context rank of the last stage, and zero on the others.
    for group in (groups.collection.cp, groups.collection.pp):
        if group.size() > 1:
            torch.distributed.all_reduce(whole, group=group)
    return list(whole)


def run_unsharded(
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    batches: Sequence[Batch],
    loss_weights: torch.Tensor,
    mtp: MTPConfig,
    groups: ProcessGroups,
    backward: Callable[[torch.Tensor], None] | None = None,
    timed: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> StepLoss:
    """Run this rank's microbatches, each forward within `timed()` and followed by `backward(loss)` if given.

    forward is the backbone's. The step's gradient is that of the scalar losses, *added* over microbatches and
    *averaged* over data-parallel ranks. Every rank calls it every step with the same number of microbatches;
    loss_weights is float64 `[modalities]`.
    """
    prepared = [(_metadata(batch), *local_targets(batch, groups, 1 + mtp.num_layers)) for batch in batches]
    counts = groups.sum_over_data(token_counts([targets for _, _, targets in prepared], loss_weights.numel()))
    # A microbatch's auxiliary loss is a mean over its tokens; a step's is the mean over microbatches and ranks.
    MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), 1 / len(batches), device=loss_weights.device))
    total = torch.zeros_like(counts[0])
    for packed_seq_metadata, input_ids, targets in prepared:
        factor = token_factor(targets, counts, loss_weights, mtp.loss_weight)
        with timed():
            loss, loss_KBS = forward(input_ids, None, packed_seq_metadata, labels=targets.labels, loss_mask=factor)
        total += modality_sums(loss_KBS, targets, loss_weights.numel())
        if backward is not None:
            backward(loss * groups.data_size)
    return StepLoss(means(groups.sum_over_data(total), counts[0]), counts[0])


def finish_unsharded(model: Backbone) -> None:
    """Update the routers' balancing bias from the step's tokens and reset these; call it after the last backward.

    Megatron's `finalize_model_grads` does the same at the end of its schedule.
    """
    if model.config.moe_router_enable_expert_bias:
        _update_router_expert_bias([model], model.config)
    reset_model_temporary_tensors(model.config, [model])
