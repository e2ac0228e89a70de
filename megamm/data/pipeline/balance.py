"""Assigns the rows of a global batch to ranks so that ranks wait little for each other.

In: estimated cost of each row of the batch (FLOPs, see `model.size.flops_of_row`) `[rows]`, in order. Out: the row
numbers of every microbatch. The rows of a step are the same at every layout; only their distribution is chosen.

Rows are first combined into microbatches of equal cost, by the longest-processing-time rule with a limit on the number
of rows (Graham 1969; Dell'Amico & Martello 2001). Microbatches that run at the same time have similar cost, because
ranks that share experts or a pipeline wait for each other in each of them. A more expensive one goes to the rank with
the lower total so far, because all ranks wait for each other at the end of the step.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np

from megamm.common.sample import IntArray


def assign(costs: Sequence[float], data_size: int, micro_batch: int) -> IntArray:
    """Row numbers `[microbatches, data_size, micro_batch]`: each of len(costs) rows once; a pure function."""
    assert len(costs) % (data_size * micro_batch) == 0, "layout.check refuses a batch that does not divide"
    bundles = _bundles(costs, len(costs) // micro_batch, micro_batch)
    weights = [sum(costs[row] for row in bundle) for bundle in bundles]
    by_weight = sorted(range(len(bundles)), key=lambda i: (-weights[i], i))
    chosen = np.empty((len(bundles) // data_size, data_size, micro_batch), dtype=np.int64)
    had = [0.0] * data_size
    for slot in range(len(chosen)):
        ranks = sorted(range(data_size), key=lambda rank: (had[rank], rank))
        for rank, bundle in zip(ranks, by_weight[slot * data_size :], strict=False):
            chosen[slot, rank] = bundles[bundle]
            had[rank] += weights[bundle]
    return chosen


def _bundles(costs: Sequence[float], count: int, size: int) -> list[list[int]]:
    """`count` bundles of `size` rows each, with costs as equal as the rule makes them."""
    open_bundles: list[tuple[float, int]] = [(0.0, i) for i in range(count)]
    bundles: list[list[int]] = [[] for _ in range(count)]
    heapify(open_bundles)
    for row in sorted(range(len(costs)), key=lambda r: (-costs[r], r)):
        cost, i = heappop(open_bundles)
        bundles[i].append(row)
        if len(bundles[i]) < size:
            heappush(open_bundles, (cost + costs[row], i))
    return bundles


def imbalance(costs: Sequence[float], chosen: IntArray) -> tuple[float, float]:
    """Cost of the most expensive rank over the mean: of the step's totals, and of the microbatches slot by slot.

    The second is the relative time of ranks that wait for each other after every microbatch.
    """
    cost = np.asarray(costs, dtype=np.float64)[chosen].sum(2)
    return float(cost.sum(0).max() / cost.sum(0).mean()), float(cost.max(1).sum() / cost.mean(1).sum())
