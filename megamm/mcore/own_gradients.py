"""Norms of this rank's own gradients, taken bucket by bucket just before they are summed over data-parallel ranks.

After the sum nobody can tell any more which rank a wrong value came from. One pass over the gradient a step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel


class OwnNorms:
    """Watches the buckets of these chunks, those of expert-parallel parameters too."""

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        self._norms: dict[int, torch.Tensor] = {}
        for chunk in chunks:
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                group.start_grad_sync = self._watching(group, group.start_grad_sync)

    def latest(self) -> torch.Tensor:
        """Of the last backward pass, float32 `[buckets]`, in the same order every time."""
        return torch.stack([self._norms[key] for key in sorted(self._norms)])

    def _watching(self, group: Any, start_grad_sync: Callable[..., Any]) -> Callable[..., Any]:
        first = len(self._norms)
        for number, bucket in enumerate(group.buckets, start=first):
            self._norms[number] = bucket.grad_data.new_zeros(())

        def watched(*args: Any, **kwargs: Any) -> Any:
            for number, bucket in enumerate(group.buckets, start=first):
                self._norms[number] = torch.linalg.vector_norm(bucket.grad_data)
            return start_grad_sync(*args, **kwargs)

        return watched
