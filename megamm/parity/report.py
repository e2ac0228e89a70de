"""What ranks are asked and tell about a run, and what the harness tells about a case: plain data."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megamm.parity.case import Run

BOUNDS = {"loss": 1e-6, "gradient": 1e-5, "gradient norm": 1e-5, "parameter": 1e-5}
"""Relative errors that rounding may reach in float32; a tensor's is the norm of the difference over the norm."""


@dataclass(frozen=True)
class Job:
    """reference: the file; it is written where `makes_reference`, else compared with.

    fault changes this process before the model is built (tests of the harness). with_values: hand the differing
    blocks' values over. first_step_only: stop after the first gradients.
    """

    run: Run
    reference: Path
    makes_reference: bool = False
    fault: Callable[[], None] | None = None
    with_values: bool = False
    first_step_only: bool = False


@dataclass(frozen=True)
class Extent:
    """The block of the whole tensor `key` at offset, of this size; of its replicas one is main."""

    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    is_main: bool

    def box(self) -> tuple[slice, ...]:
        """As an index into the whole tensor."""
        return tuple(slice(start, start + n) for start, n in zip(self.offset, self.size, strict=True))


@dataclass(frozen=True)
class Difference:
    """A block that is not the reference's. ratio: the multiple of the reference nearest to it; residual: the relative
    distance from that multiple. values are given where asked for."""

    what: str
    step: int
    extent: Extent
    error: float
    ratio: float
    residual: float
    values: npt.NDArray[np.float32] | None = None


@dataclass
class RankReport:
    """Of one rank: its place in the grid, per step loss and token count per modality and the grad norm."""

    place: dict[str, int]
    sizes: dict[str, int]
    loss: list[list[float]] = field(default_factory=list)
    count: list[list[float]] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)
    routed: dict[tuple[str, int], int] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)
    margin: float = float("inf")


@dataclass
class Outcome:
    """Of one case. verdict: proven, refused, mismatch, crash or hang; findings: what is wrong, or why refused."""

    case: str
    verdict: str
    findings: list[str] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)
    places: list[dict[str, int]] = field(default_factory=list)
    seconds: float = 0.0

    def text(self) -> str:
        """For a person."""
        figures = "  ".join(f"{name} {error:.1e}" for name, error in self.worst.items())
        return "\n".join([f"{self.verdict:9}{self.seconds:5.1f} s  {self.case}  {figures}", *self.findings])
