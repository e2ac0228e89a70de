"""One step of a model that is whole on every data-parallel rank, without Megatron's schedule.

It is for an engine that reduces gradients itself. The loss is the same as in `step.run`. Megatron's schedule and its
`finalize_model_grads` also handle mixture of experts (the scale of the auxiliary loss, and the routers' balancing
bias); this module does the same.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias, reset_model_temporary_tensors
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megamm.common.sample import Batch
from megamm.config import MTPConfig
from megamm.mcore.backbone import Backbone
from megamm.mcore.process_groups import ProcessGroups
from megamm.mcore.step import local_targets
from megamm.model.loss import StepLoss, means, modality_sums, token_counts, token_factor


def run(
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    batches: Sequence[Batch],
    loss_weights: torch.Tensor,
    mtp: MTPConfig,
    groups: ProcessGroups,
    backward: Callable[[torch.Tensor], None] | None = None,
    timed: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> StepLoss:
    """Run forward on this rank's microbatches, each within `timed()` and followed by `backward(loss)` if given.

    forward is the backbone's. The step's gradient is that of the scalar losses, *added* over microbatches and
    *averaged* over data-parallel ranks. Every rank calls it every step with the same number of microbatches;
    loss_weights is float64 `[modalities]`.
    """
    prepared = [(batch.packed_seq_metadata, *local_targets(batch, groups, 1 + mtp.num_layers)) for batch in batches]
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


def finish(model: Backbone) -> None:
    """Update the routers' balancing bias from the step's tokens and reset these; call it after the last backward."""
    if model.config.moe_router_enable_expert_bias:
        _update_router_expert_bias([model], model.config)
    reset_model_temporary_tensors(model.config, [model])
