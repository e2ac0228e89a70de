"""What a second run of a step from the same state says about the first, and which rank's hardware is to blame.

Megatron-core's rerun state machine asks the same question, but keeps the answer to its log, reduces a flag over the
job every step, judges values that are not yet summed (so that ranks can disagree) and leaves the routers' balancing
bias moved twice; its text calls it experimental. So this is our own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

SAME = 1e-3
"""Relative difference up to which two runs are the same: kernels that add in any order differ by less. Megatron's."""
NEAR = 0.1
"""A rank is suspected too if it deviates by this share of the one that deviates most."""

Gather = Callable[[torch.Tensor], list[torch.Tensor]]
"""This rank's tensor -> every rank's, in order of ranks."""


@dataclass(frozen=True)
class Comparison:
    """deviation: largest relative difference of a value, 0 if all have the same bits, inf if only one is finite.

    suspects: the ranks whose own part of the gradient deviates most. Where ranks compute one replica together (tensor,
    pipeline, context or expert parallel), a wrong value spreads, and all that it reached are named.
    """

    deviation: float
    suspects: list[int]

    @property
    def is_same(self) -> bool:
        return self.deviation <= SAME


def compare(
    first: Mapping[str, float],
    second: Mapping[str, float],
    own_first: torch.Tensor,
    own_second: torch.Tensor,
    gather: Gather,
) -> Comparison:
    """Values of the job, the same on every rank, and norms of this rank's own gradient, float32 `[buckets]`."""
    deviation = max(_difference(first[name], second[name]) for name in first)
    own = max(_difference(a, b) for a, b in zip(own_first.tolist(), own_second.tolist(), strict=True))
    ranks = [float(part) for part in gather(torch.tensor(own, dtype=torch.float64, device=own_first.device))]
    return Comparison(deviation, suspects(ranks))


def suspects(deviations: Sequence[float]) -> list[int]:
    """The ranks that deviate most, of all ranks' deviations; none if nobody does."""
    most = max(deviations)
    return [rank for rank, value in enumerate(deviations) if most > 0 and (value == most or value >= NEAR * most)]


def _difference(a: float, b: float) -> float:
    """Relative; two values that are not finite are the same."""
    if not math.isfinite(a) or not math.isfinite(b):
        return 0.0 if math.isfinite(a) == math.isfinite(b) else math.inf
    return abs(a - b) / max(abs(a), abs(b), 1e-30) if a != b else 0.0
