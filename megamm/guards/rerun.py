"""Comparison of a second run of a step, from the same state, with the first; it finds the rank with faulty hardware.

Megatron-core's rerun state machine has the same purpose. It is not used, because it only logs its result, reduces a
flag over the job in every step, judges values that are not yet summed (so that ranks can disagree) and updates the
routers' balancing bias twice; its documentation calls it experimental.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

SAME = 1e-3
"""Relative difference up to which two runs are equal: kernels that add in any order differ by less (as in Megatron)."""
NEAR = 0.1
"""A rank is also suspect if it deviates by at least this share of the largest deviation."""

Gather = Callable[[torch.Tensor], list[torch.Tensor]]
"""Takes this rank's tensor, returns the tensors of all ranks in rank order."""


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison.

    deviation: largest relative difference of a value, 0 if all have the same bits, inf if only one of the two is
    finite. suspects: the ranks whose own part of the gradient deviates most. If ranks compute one replica together
    (tensor, pipeline, context or expert parallel), a wrong value spreads, and all ranks that it reached are listed.
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
    """Compare two runs of a step.

    first, second: values of the job, the same on every rank. own_first, own_second: norms of this rank's own gradient,
    float32 `[buckets]`.
    """
    deviation = max(_difference(first[name], second[name]) for name in first)
    own = max(_difference(a, b) for a, b in zip(own_first.tolist(), own_second.tolist(), strict=True))
    ranks = [float(part) for part in gather(torch.tensor(own, dtype=torch.float64, device=own_first.device))]
    return Comparison(deviation, suspects(ranks))


def suspects(deviations: Sequence[float]) -> list[int]:
    """Return the ranks that deviate most, from the deviations of all ranks; none if no rank deviates."""
    most = max(deviations)
    return [rank for rank, value in enumerate(deviations) if most > 0 and (value == most or value >= NEAR * most)]


def _difference(a: float, b: float) -> float:
    """Return the relative difference; two values that are not finite count as equal."""
    if not math.isfinite(a) or not math.isfinite(b):
        return 0.0 if math.isfinite(a) == math.isfinite(b) else math.inf
    return abs(a - b) / max(abs(a), abs(b), 1e-30) if a != b else 0.0
