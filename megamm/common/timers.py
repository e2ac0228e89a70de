"""Measures the seconds that a rank spends in each phase of its steps, with minimal overhead.

with clock.device("forward"): ...     work of the device; on a GPU by events on its stream, read out later
with clock.host("data"): ...          work of the process itself, including waiting
clock.take()                          {"data": ..., "forward": ...}, seconds since the last call
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

from megamm.common.device import Device, Mark


class Clock:
    """Clock of one rank; the caller names the phases."""

    def __init__(self, place: Device) -> None:
        self.place = place
        self._host: defaultdict[str, float] = defaultdict(float)
        self._device: defaultdict[str, list[tuple[Mark, Mark]]] = defaultdict(list)

    @contextlib.contextmanager
    def host(self, phase: str) -> Iterator[None]:
        """Add the body's wall time to a phase."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._host[phase] += time.perf_counter() - begin

    @contextlib.contextmanager
    def device(self, phase: str) -> Iterator[None]:
        """Add the time of the device's work that the body queues to a phase."""
        begin = self.place.mark()
        try:
            yield
        finally:
            self._device[phase].append((begin, self.place.mark()))

    def take(self) -> dict[str, float]:
        """Return the seconds of every phase since the last call; waits for the device."""
        self.place.synchronize()
        seconds = dict(self._host)
        for phase, spans in self._device.items():
            seconds[phase] = seconds.get(phase, 0.0) + sum(self.place.seconds_between(*span) for span in spans)
        self._host.clear()
        self._device.clear()
        return seconds
