"""Norms of this rank's own gradients, computed bucket by bucket just before the sum over data-parallel ranks.

After the sum it is unknown which rank produced a wrong value. The cost is one pass over the gradient per step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel


class LocalGradNorms:
    """Measures the gradient buckets of these chunks, including those of expert-parallel parameters."""

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        self._norms: dict[int, torch.Tensor] = {}
        for chunk in chunks:
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                group.start_grad_sync = self._watching(group, group.start_grad_sync)

    def latest(self) -> torch.Tensor:
        """Return the norms of the last backward pass, float32 `[buckets]`, always in the same order."""
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
