"""Records the steps of metrics.profile on this rank: a trace of torch's profiler, or the range for Nsight Systems.

Out: RUN/profile/steps_00000010-00000013_rank_00000.json.gz, with a step's phases (common/timers.py) as ranges. Both
tools use the same interface of the GPU, so under Nsight Systems torch emits its ranges as NVTX ranges instead.
"""

import logging
import os
from pathlib import Path

import torch

from megamm.common.device import Device
from megamm.config import ProfileConfig

log = logging.getLogger(__name__)
PROFILE = "profile"
NSIGHT = "NSYS_PROFILING_SESSION_ID"
"""In the environment of a process that Nsight Systems observes."""


class StepProfiler:
    """The profiler of a rank. `begin` and `end` surround every step; without a config they do nothing."""

    def __init__(self, config: ProfileConfig | None, run: Path, rank: int, device: Device) -> None:
        self._config = config if config is not None and rank in config.ranks else None
        self._run, self._rank, self._device = run, rank, device
        self._first: int | None = None
        """The first step of the recording in progress."""
        self._profiler: torch.profiler.profile | None = None
        self._ranges: torch.autograd.profiler.emit_nvtx | None = None

    def begin(self, step: int) -> None:
        """Start recording if this is one of the steps; a run that resumes in the middle records the rest."""
        if (
            self._config is None
            or self._first is not None
            or not self._config.steps[0] <= step <= self._config.steps[1]
        ):
            return
        self._first = step
        if NSIGHT in os.environ:
            self._ranges = torch.autograd.profiler.emit_nvtx(record_shapes=True)
            self._ranges.__enter__()
        else:
            self._profiler = torch.profiler.profile(record_shapes=True)  # of all activities that the build supports
            self._profiler.start()
        self._device.profile_range(is_begin=True)

    def end(self, step: int) -> None:
        """Write the recording if this is its last step."""
        if self._config is None or self._first is None or step < self._config.steps[1]:
            return
        self._device.synchronize()  # what the last step has queued belongs to it
        self._device.profile_range(is_begin=False)
        first, self._first = self._first, None
        if self._ranges is not None:
            self._ranges.__exit__(None, None, None)
            self._ranges = None
            log.info("profiler: steps %d to %d are recorded by Nsight Systems", first, step)
            return
        assert self._profiler is not None
        self._profiler.stop()
        path = self._run / PROFILE / f"steps_{first:08d}-{step:08d}_rank_{self._rank:05d}.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        self._profiler.export_chrome_trace(str(temporary))
        temporary.replace(path)
        self._profiler = None
        log.info("profiler: wrote %s", path)

    def close(self) -> None:
        """Drop a recording that is not complete."""
        if self._profiler is not None:
            self._profiler.stop()
            log.warning("profiler: the run ends before the last step of metrics.profile.steps, no trace is written")
        self._profiler = None
