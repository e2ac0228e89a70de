"""Measures the seconds that a rank spends in each phase of its steps, with minimal overhead.

with timers.device("forward"): ...    work of the device; on a GPU by events on its stream, read out later
with timers.host("data"): ...         work of the process itself, including waiting
timers.take()                         {"data": ..., "forward": ...}, seconds since the last call

A phase is also a range in the traces of torch's profiler (observability/profiler.py).
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch

from megamm.common.device import Device, DeviceEvent


class Timers:
    """Timers of one rank, by phase; the caller names the phases."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._host_seconds: defaultdict[str, float] = defaultdict(float)
        self._device_spans: defaultdict[str, list[tuple[DeviceEvent, DeviceEvent]]] = defaultdict(list)

    @contextlib.contextmanager
    def host(self, phase: str) -> Iterator[None]:
        """Add the body's wall time to a phase."""
        begin = time.perf_counter()
        try:
            with torch.profiler.record_function(phase):
                yield
        finally:
            self._host_seconds[phase] += time.perf_counter() - begin

    @contextlib.contextmanager
    def device(self, phase: str) -> Iterator[None]:
        """Add the time of the device's work that the body queues to a phase."""
        # Events are only recorded here: reading their times would wait for the device in every phase.
        begin = self._device.record_event()
        try:
            with torch.profiler.record_function(phase):
                yield
        finally:
            self._device_spans[phase].append((begin, self._device.record_event()))

    def take(self) -> dict[str, float]:
        """Return the seconds of every phase since the last call; waits for the device."""
        self._device.synchronize()
        seconds = dict(self._host_seconds)
        for phase, spans in self._device_spans.items():
            seconds[phase] = seconds.get(phase, 0.0) + sum(self._device.seconds_between(*span) for span in spans)
        self._host_seconds.clear()
        self._device_spans.clear()
        return seconds
