"""Faults that the parity harness must name: each changes a forked rank's own copy of the code, before it builds."""

import time

import torch
import torch.distributed as dist


def image_gradient_times_data_parallel_size():
    """One modality's encoder is averaged over data parallel and the rest is summed."""
    from megamm.mcore import step

    original = step.token_factor

    def scaled(targets, counts, weights, mtp_weight):
        return original(targets, counts, weights * torch.tensor([1.0, dist.get_world_size()]), mtp_weight)

    step.token_factor = scaled


def data_parallel_sum_dropped():
    """Gradients of one bucket are scaled but never summed."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Buckets

    original = Buckets.start_grad_sync

    def without_sum(self, force_all_reduce=False):
        summed, dist.all_reduce = dist.all_reduce, lambda *a, **k: None
        original(self, force_all_reduce=True)
        dist.all_reduce = summed

    Buckets.start_grad_sync = without_sum


def sequence_parallel_sum_dropped():
    """Norms have only their own tokens' gradient, not summed over tensor parallel."""
    from megatron.core.distributed import finalize_model_grads as module

    _finalize_module(module)._allreduce_non_tensor_model_parallel_grads = lambda *a, **k: None


def tied_embedding_sum_dropped():
    """First and last stage keep their own gradient of the shared table."""
    from megatron.core.distributed import finalize_model_grads as module

    _finalize_module(module)._allreduce_word_embedding_grads = lambda *a, **k: None


def _finalize_module(function_or_module):
    """Return the module; the package exports a function of the same name."""
    import sys

    return sys.modules[getattr(function_or_module, "__module__", None) or function_or_module.__name__]


def document_index_shifted():
    """Positions of the second document of a packed row continue from the first's."""
    from megamm.mcore import attention

    original = attention.document_positions
    attention.document_positions = lambda segment: original(segment) + (segment == 1)


def row_positions_shifted():
    """(t, h, w) reach attention one token late."""
    from megamm.common.sample import Batch

    Batch.packed_seq_metadata = property(
        lambda self: torch.cat((self.segment[:, None], self.position.roll(1, -1), self.span[:, None]), 1)
    )


def span_cut_at_the_chunk():
    """A context rank sees a span only as far as one of the row's chunks."""
    from megamm.mcore.attention import PackedAttention

    original = PackedAttention.forward

    def forward(self, query, key, value, attention_mask, *rest, **named):
        cut = attention_mask.clone()
        length, span = cut.shape[2], cut[:, 4]
        chunk = torch.arange(length) // (length // (2 * self.group.size()))
        cut[:, 4] = torch.where(span >= 0, span * length + chunk, span)
        return original(self, query, key, value, cut, *rest, **named)

    PackedAttention.forward = forward


def auxiliary_loss_twice():
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler as Scaler

    original = Scaler.set_loss_scale
    Scaler.set_loss_scale = staticmethod(lambda scale: original(scale * 2))


def prediction_depths_twice():
    from megamm.mcore import step

    original = step.token_factor
    step.token_factor = lambda targets, counts, weights, mtp: original(targets, counts, weights, mtp * 2)


def counts_of_this_rank_only():
    """Each rank divides by its own tokens."""
    from megamm.mcore.process_groups import ProcessGroups

    original = ProcessGroups.sum_over_data
    ProcessGroups.sum_over_data = lambda self, tensor: tensor if tensor.dim() == 2 else original(self, tensor)


def last_rank_never_comes():
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(3600)


def last_rank_dies():
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("out of luck")
