"""Straggler detection. In synchronous training all ranks take equally long, so it compares the time without waiting.

The own work of a rank is the time for reading data and for the forward passes of its chunks; in neither does it wait
for another data-parallel rank or pipeline stage. (Within a forward pass, ranks of one tensor-, context- or
expert-parallel group wait for each other, and show the same time.) A rank's score is that time divided by the median
over the ranks of its pipeline stage (the lower of two middle values); ranks without such peers have score 1.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamm.common import events
from megamm.common.collectives import Gather
from megamm.config import StragglerConfig
from megamm.elastic.rank import NodeFault

PHASES = ("data", "forward", "update", "checkpoint")
"""Phases as named by the engine's timers and the trainer."""
OWN = ("data", "forward")


@dataclass(frozen=True)
class Scores:
    """Scores of the ranks in one window, and the seconds of each phase by rank."""

    score: list[float]
    seconds: list[dict[str, float]]

    @property
    def slowest(self) -> int:
        return max(range(len(self.score)), key=self.score.__getitem__)

    def figures(self) -> dict[str, Any]:
        """Return for metrics.jsonl: the slowest rank, its score, and its seconds in the window."""
        rank = self.slowest
        return {"straggler/rank": rank, "straggler/score": self.score[rank]} | {
            f"straggler/{phase}": seconds for phase, seconds in self.seconds[rank].items()
        }


def scores(seconds: Sequence[Mapping[str, float]], stages: Sequence[int]) -> Scores:
    """Compute the scores from every rank's seconds by phase and its pipeline stage."""
    own = [sum(rank[phase] for phase in OWN) for rank in seconds]
    found = []
    for time, stage in zip(own, stages, strict=True):
        peers = [t for t, s in zip(own, stages, strict=True) if s == stage]
        found.append(time / max(statistics.median_low(peers), 1e-9))
    return Scores(found, [dict(rank) for rank in seconds])


class Stragglers:
    """Straggler detection of a run; every rank calls `window` at the same steps and gets the same result."""

    def __init__(self, config: StragglerConfig, run: Path, rank: int, stage: int, gather: Gather) -> None:
        """stage: this rank's pipeline stage."""
        self.config, self.run, self.rank, self.stage, self.gather = config, run, rank, stage, gather
        self.in_a_row: Counter[int] = Counter()
        self.fault: NodeFault | None = None
        """Set when a rank has been slow for long enough and the run should continue without it."""

    def window(self, step: int, seconds: Mapping[str, float], device: torch.device) -> Scores:
        """Compare the seconds that each rank counted since the last window; missing phases count as 0."""
        own = [seconds.get(phase, 0.0) for phase in PHASES]
        # The stage travels along: it tells every rank which ranks are peers.
        rows = [
            row.tolist() for row in self.gather(torch.tensor([self.stage, *own], dtype=torch.float64, device=device))
        ]
        by_phase = [dict(zip(PHASES, row[1:], strict=True)) for row in rows]
        found = scores(by_phase, [int(row[0]) for row in rows])
        for rank, score in enumerate(found.score):
            self.in_a_row[rank] = self.in_a_row[rank] + 1 if score > self.config.threshold else 0
            # Equal, not at least: a rank that stays slow is reported once.
            if self.in_a_row[rank] == self.config.windows:
                self._report(step, rank, score, by_phase[rank])
        return found

    def _report(self, step: int, rank: int, score: float, seconds: Mapping[str, float]) -> None:
        if self.rank == 0:
            events.record(self.run, "straggler", step=step, rank=rank, score=score, seconds=dict(seconds))
        if self.config.evict:
            self.fault = NodeFault([rank], f"slow at step {step}: {score:.1f} times the median of its stage")
