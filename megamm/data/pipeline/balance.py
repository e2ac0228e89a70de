"""Takes the rows of each global batch from the row stream and assigns them to ranks so that ranks wait little.

    balanced_batches(stream, first_row, ...) -> GlobalBatch, GlobalBatch, ...

In: estimated cost of each row of the batch (FLOPs, see `model.flops.flops_of_row`) `[rows]`, in order. Out: the row
numbers of every microbatch. The rows of a step are the same at every layout; only their distribution is chosen.

Rows are first combined into microbatches of equal cost, by the longest-processing-time rule with a limit on the number
of rows (Graham 1969; Dell'Amico & Martello 2001). Microbatches that run at the same time have similar cost, because
ranks that share experts or a pipeline wait for each other in each of them. A more expensive one goes to the rank with
the lower total so far, because all ranks wait for each other at the end of the step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

from megamm.common.sample import IntArray
from megamm.data.pipeline.row_stream import RowSpec, RowStream

RowCost = Callable[[Sequence[int]], float]
"""Estimated cost of a row (any unit) from the lengths of its documents."""


@dataclass(frozen=True)
class StepFigures:
    """Figures of a global batch over all ranks: padding share, cost of the costliest data rank over the mean, and the
    cost of all rows."""

    padding_share: float
    imbalance: float
    cost: float


@dataclass(frozen=True)
class GlobalBatch:
    """The planned rows of one step and their distribution: row numbers `[microbatches, data_size, micro_batch]`."""

    rows: Sequence[RowSpec]
    assigned: IntArray
    figures: StepFigures

    def microbatches(self, data_rank: int) -> list[list[RowSpec]]:
        """The rows of this data rank."""
        return [[self.rows[row] for row in microbatch] for microbatch in self.assigned[:, data_rank].tolist()]


def balanced_batches(
    stream: RowStream, first_row: int, *, global_batch: int, micro_batch: int, data_size: int, cost: RowCost
) -> Iterator[GlobalBatch]:
    """The global batches from row `first_row` on, endless. Every rank computes the same, without communication."""
    while True:
        rows = [stream.row_spec(r) for r in range(first_row, first_row + global_batch)]
        lengths = [row.lengths for row in rows]
        costs = [cost(of_row) for of_row in lengths]
        assigned = assign(costs, data_size, micro_batch)
        used = sum(map(sum, lengths)) / (global_batch * stream.row_length)
        yield GlobalBatch(rows, assigned, StepFigures(1.0 - used, imbalance(costs, assigned)[0], sum(costs)))
        first_row += global_batch


def assign(costs: Sequence[float], data_size: int, micro_batch: int) -> IntArray:
    """Row numbers `[microbatches, data_size, micro_batch]`: each of len(costs) rows once; a pure function."""
    assert len(costs) % (data_size * micro_batch) == 0, "layout.check refuses a batch that does not divide"
    bundles = _bundles(costs, len(costs) // micro_batch, micro_batch)
    weights = [sum(costs[row] for row in bundle) for bundle in bundles]
    by_weight = sorted(range(len(bundles)), key=lambda i: (-weights[i], i))
    assigned = np.empty((len(bundles) // data_size, data_size, micro_batch), dtype=np.int64)
    totals = [0.0] * data_size
    for slot in range(len(assigned)):
        # The next data_size bundles, which are the closest in cost, run at the same time; the most expensive of them
        # goes to the rank with the least work so far. Ties are broken by number, so that all ranks agree.
        ranks = sorted(range(data_size), key=lambda rank: (totals[rank], rank))
        for rank, bundle in zip(ranks, by_weight[slot * data_size :], strict=False):
            assigned[slot, rank] = bundles[bundle]
            totals[rank] += weights[bundle]
    return assigned


def _bundles(costs: Sequence[float], count: int, size: int) -> list[list[int]]:
    """`count` bundles of `size` rows each, with costs as equal as the rule makes them."""
    open_bundles: list[tuple[float, int]] = [(0.0, i) for i in range(count)]
    bundles: list[list[int]] = [[] for _ in range(count)]
    heapify(open_bundles)
    for row in sorted(range(len(costs)), key=lambda r: (-costs[r], r)):
        # The most expensive row that is left goes to the cheapest bundle with space.
        cost, i = heappop(open_bundles)
        bundles[i].append(row)
        if len(bundles[i]) < size:
            heappush(open_bundles, (cost + costs[row], i))
    return bundles


def imbalance(costs: Sequence[float], assigned: IntArray) -> tuple[float, float]:
    """Cost of the most expensive rank over the mean: of the step's totals, and of the microbatches slot by slot.

    The second is the relative time of ranks that wait for each other after every microbatch.
    """
    cost = np.asarray(costs, dtype=np.float64)[assigned].sum(2)
    return float(cost.sum(0).max() / cost.sum(0).mean()), float(cost.max(1).sum() / cost.mean(1).sum())
