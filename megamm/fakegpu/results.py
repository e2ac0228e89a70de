"""Requests and results of a simulated run, as plain values: they cross the border of a process as JSON.

Every figure is a number under a name whose parts are joined by "|", so that figures of runs with one and two layers can
be extrapolated name by name (extrapolate.py):

    peak|PHASE|KIND                       bytes in use at the peak of a phase, by kind
    static|KIND                           bytes in use after the build
    count|SCOPE|OPERATION|GROUP|SIZE      number of collectives;  bytes|... their bytes
    wait|SCOPE|KIND|FILE|FUNCTION|LINE    number of host waits
    flops|SCOPE|OPERATION, launches|SCOPE, parameters, host|checkpoint (bytes of page-locked memory)

SCOPE is "microbatch" (happens for each, here the sum over all) or "step" (happens once a step).
"""

from dataclasses import dataclass
from typing import Any

Figures = dict[str, float]
GPUS_OF_NODE = 8
"""Of the simulated node; device.cpp has the same number."""
KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "inputs", "temporaries")
"""Kinds of memory. activations: made by a forward pass; logits: made by the loss, with its gradients; inputs: the
step's batches and targets; temporaries: everything that a backward pass or an update makes, and other state."""


@dataclass(frozen=True)
class ProbeRequest:
    """One rank of a run to simulate. config: the resolved config; microbatches: of a step, fewer than in the run."""

    config: dict[str, Any]
    vocabulary_size: int
    world_size: int
    rank: int
    microbatches: int
    imbalance: float = 1.0


@dataclass(frozen=True)
class ProbeResult:
    """What one rank did. kernels: the chosen implementations of attention and operators."""

    figures: Figures
    coordinates: str
    kernels: dict[str, str]
    seconds: float


def peak(figures: Figures) -> tuple[str, dict[str, float]]:
    """Return the phase with the most memory in use, and its bytes by kind."""
    phases: dict[str, dict[str, float]] = {}
    for name, value in figures.items():
        if name.startswith("peak|"):
            _, phase, kind = name.split("|")
            phases.setdefault(phase, {})[kind] = value
    return max(phases.items(), key=lambda item: sum(item[1].values()))
