"""Values with their uncertainty: the mean of samples, ratios of sums, and a jackknife for what is not a mean.

Standard errors: of a mean, s / sqrt(n); of a ratio of sums, by linearisation (Cochran 1977, section 6.4); of any other
statistic, the jackknife over groups of samples (Efron & Tibshirani 1993, chapter 11). One sample has none.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megamm.common.sample import IntArray

GROUPS = 20
"""Most groups of the jackknife: the statistic is computed once without each."""


class Unmeasurable(ValueError):
    """A sample, or all of them, cannot be measured; the message gives the reason."""


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error (None if it is unknown), and the number of samples."""

    value: float | None
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class MetricFigure:
    """One number of a report.

    left_out: number of samples that could not be measured, by reason. note: the reason for a missing value, or a
    caution. floor: the value that two halves of the real samples have against each other.
    """

    metric: str
    value: float | None
    standard_error: float | None
    n: int
    seed: int
    source: str | None = None
    direction: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    note: str | None = None
    extractor: dict[str, str] | None = None
    floor: float | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that have a value; `value` and `standard_error` always."""
        always = ("metric", "value", "standard_error", "n", "seed")
        return {key: value for key, value in asdict(self).items() if key in always or value not in (None, {})}


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean of finite values."""
    if not values:
        return Estimate(None, None, 0)
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else None
    return Estimate(float(array.mean()), error, len(array))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Return sum(numerators) / sum(denominators), for example a loss of samples with different numbers of tokens."""
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    n, total = int((below > 0).sum()), float(below.sum())
    if not total > 0:
        return Estimate(None, None, 0)
    value = float(above.sum()) / total
    residuals = above - value * below
    error = math.sqrt(float((residuals**2).sum()) * n / (n - 1)) / total if n > 1 else None
    return Estimate(value, error, n)


def jackknife(statistic: Callable[[IntArray], float], n: int, seed: int) -> Estimate:
    """Return statistic(all indices), with the standard error from the statistic without each group of samples.

    Raises Unmeasurable as `statistic` does for all samples; groups without which it cannot be computed give no error.
    """
    value = statistic(np.arange(n, dtype=np.int64))
    groups = min(n, GROUPS)
    if groups < 2:
        return Estimate(value, None, n)
    group_of: npt.NDArray[np.int64] = np.random.default_rng([seed, n]).permutation(np.arange(n) % groups)
    try:
        without = np.array([statistic(np.flatnonzero(group_of != g)) for g in range(groups)])
    except Unmeasurable:
        return Estimate(value, None, n)
    error = math.sqrt((groups - 1) / groups * float(((without - without.mean()) ** 2).sum()))
    return Estimate(value, error, n)
