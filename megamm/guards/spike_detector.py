"""Spike detection: finds results of a step that are not finite, or far above the last good ones.

A value x is a spike if (x - median) / deviation > threshold, over a window of good values, with
deviation = 1.4826 * median(|value - median|), which is the standard deviation of normally distributed values (Hampel
1974). The deviation is at least a hundredth of the median, since steps can be almost equal. Spikes inside the window
hardly change median and deviation.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

LEAST_DEVIATION = 0.01
"""Smallest deviation, as a share of the median."""


class SpikeDetector:
    """Watches named values of every step: the losses (nats per token) and the gradient norm."""

    def __init__(self, threshold: float, window: int) -> None:
        """threshold: in deviations; with 0 only values that are not finite are bad. window: in good steps.

        Spikes are detected once the window is half full.
        """
        self.threshold, self.window = threshold, window
        self._good: dict[str, deque[float]] = {}

    def why_bad(self, values: Mapping[str, float]) -> str:
        """Return what is wrong with a step's values, in words; empty if nothing is."""
        for name, value in values.items():
            if not math.isfinite(value):
                return f"{name} {value}"
        for name, value in values.items():
            good = self._good.get(name, ())
            if self.threshold and 2 * len(good) >= self.window:
                median = statistics.median(good)
                spread = 1.4826 * statistics.median(abs(x - median) for x in good)
                deviations = (value - median) / max(spread, LEAST_DEVIATION * abs(median), 1e-30)
                if deviations > self.threshold:
                    return f"{name} {value:.4g} is {deviations:.1f} deviations above the median {median:.4g}"
        return ""

    def note_good(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._good.setdefault(name, deque(maxlen=self.window)).append(value)

    def state(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self._good.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self._good = {name: deque(values, maxlen=self.window) for name, values in state.items()}
