"""Memory of the job's GPUs for the metrics: the rank that needs most decides whether a run fits."""

from collections.abc import Callable

import torch

from megamm.common.device import MemoryFigures


def gpu_memory(
    own: MemoryFigures | None, device: torch.device, gather: Callable[[torch.Tensor], list[torch.Tensor]]
) -> dict[str, int]:
    """Return the figures over all ranks since the last call, in bytes; empty without a GPU. Every rank calls it.

    gather: collects every rank's tensor, in rank order. gpu_memory_rank is the rank with the largest peak.
    """
    if own is None:
        return {}
    figures = torch.tensor([own.allocated, own.reserved, own.total, own.retries], dtype=torch.int64, device=device)
    allocated, reserved, total, retries = torch.stack(gather(figures)).T.tolist()
    return {
        "gpu_memory_allocated": max(allocated),
        "gpu_memory_reserved": max(reserved),
        "gpu_memory_rank": reserved.index(max(reserved)),
        "gpu_memory_total": min(total),
        "gpu_alloc_retries": sum(retries),
    }
