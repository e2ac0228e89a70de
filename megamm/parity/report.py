"""Plain data: jobs for ranks, their reports about a run, and the outcome of a case."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megamm.parity.case import Run

BOUNDS = {"loss": 1e-6, "gradient": 1e-5, "gradient norm": 1e-5, "parameter": 1e-5}
"""Maximum relative errors from rounding in float32; a tensor's error is the norm of the difference over the norm."""


@dataclass(frozen=True)
class ParityJob:
    """A job for all ranks. reference: file that is written if `makes_reference`, otherwise compared with.

    fault: changes this process before the model is built (for tests of the harness). with_values: report the values of
    differing blocks. first_step_only: stop after the first gradients.
    """

    run: Run
    reference: Path
    makes_reference: bool = False
    fault: Callable[[], None] | None = None
    with_values: bool = False
    first_step_only: bool = False


@dataclass(frozen=True)
class Extent:
    """The block of the whole tensor `key` at this offset and of this size; exactly one replica is main."""

    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    is_main: bool

    def box(self) -> tuple[slice, ...]:
        """Return the block as an index into the whole tensor."""
        return tuple(slice(start, start + n) for start, n in zip(self.offset, self.size, strict=True))


@dataclass(frozen=True)
class TensorDifference:
    """A block that differs from the reference.

    ratio: the factor with which the reference is closest to it; residual: the relative distance from that multiple.
    values: only if requested.
    """

    what: str
    step: int
    extent: Extent
    error: float
    ratio: float
    residual: float
    values: npt.NDArray[np.float32] | None = None


@dataclass
class RankReport:
    """Report of one rank: its mesh coordinates; per step the loss and token count by modality and the grad norm."""

    coordinates: dict[str, int]
    sizes: dict[str, int]
    loss: list[list[float]] = field(default_factory=list)
    count: list[list[float]] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)
    differences: list[TensorDifference] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)
    routed: dict[tuple[str, int], int] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)
    margin: float = float("inf")


@dataclass
class CaseOutcome:
    """Result of a case. verdict: proven, refused, mismatch, crash or hang; findings: errors, or why it is refused."""

    case: str
    verdict: str
    findings: list[str] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)
    coordinates: list[dict[str, int]] = field(default_factory=list)
    seconds: float = 0.0

    def text(self) -> str:
        """Format the outcome for people."""
        figures = "  ".join(f"{name} {error:.1e}" for name, error in self.worst.items())
        return "\n".join([f"{self.verdict:9}{self.seconds:5.1f} s  {self.case}  {figures}", *self.findings])
