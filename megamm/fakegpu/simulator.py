"""Starts the process that simulates a GPU, and asks it for the figures of ranks.

with Simulator("h100") as simulator:
    memory = simulator.rank_memory(config, vocabulary_size=200000, world_size=64, rank=0)
"""

import contextlib
import json
import os
import subprocess
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

from megamm.common import gpu_constants, processes
from megamm.common.errors import UserError
from megamm.common.gpu_constants import GpuConstants
from megamm.config import RunConfig
from megamm.fakegpu import extrapolate
from megamm.fakegpu.results import GPUS_OF_NODE, Figures, ProbeRequest, ProbeResult, peak
from megamm.model import layout


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank at the peak of its step. kinds: bytes by kind (results.KINDS); phase: when the peak is."""

    kinds: dict[str, int]
    phase: str
    allowance: int
    capacity: int

    @property
    def total(self) -> int:
        """Bytes in use at the peak, without the allowance."""
        return sum(self.kinds.values())

    @property
    def fits(self) -> bool:
        return self.total + self.allowance <= self.capacity


def memory_of(figures: Figures, gpu: GpuConstants) -> RankMemory:
    """Return the memory at the largest peak of a training step or an evaluation."""
    phase, kinds = peak(figures)
    allowance = round(gpu.reserved(*communicators(figures)))
    return RankMemory({kind: round(size) for kind, size in kinds.items()}, phase, allowance, int(gpu.memory))


def communicators(figures: Figures) -> tuple[int, int]:
    """Return in how many groups the rank communicates, and with how many ranks of its node it exchanges tokens."""
    used = [name.split("|")[2:] for name in figures if name.startswith("count|")]
    groups = {(group, size) for _, group, size in used}
    exchanges = {(group, size) for operation, group, size in used if operation == "all_to_all"}
    return len(groups), sum(min(int(size), GPUS_OF_NODE) - 1 for _, size in exchanges)


class Simulator:
    """A process that simulates ranks on one kind of GPU, for use in a `with` block.

    imbalance: tokens that the experts of the simulated rank receive, relative to their share.
    """

    def __init__(self, gpu: str, imbalance: float = 1.0) -> None:
        found = gpu_constants.find(gpu)
        if found is None:
            remedy = f"use one of {', '.join(gpu_constants.kinds())}"
            raise UserError(f"--fake-gpu {gpu} is not a known GPU", remedy=remedy)
        self.gpu, self.imbalance = found, imbalance
        self._process: subprocess.Popen[str] | None = None

    def _started(self) -> "subprocess.Popen[str]":
        """Return the process, which is started by the first simulation."""
        if self._process is None:
            # It is a process of its own, not a rank of a job that this process may belong to.
            environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
            self._process = processes.start_module(
                "megamm.fakegpu.process",
                str(os.getpid()),
                self.gpu.name,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        return self._process

    def __enter__(self) -> "Simulator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def rank_memory(
        self, config: RunConfig, vocabulary_size: int, world_size: int, rank: int, exact: bool = False
    ) -> RankMemory:
        """Return a rank's memory, and whether it fits. UserError for a layout that cannot run."""
        return memory_of(self.simulate(config, vocabulary_size, world_size, rank, exact).figures, self.gpu)

    def simulate(
        self, config: RunConfig, vocabulary_size: int, world_size: int, rank: int, exact: bool = False
    ) -> ProbeResult:
        """Return the figures of a rank's step with all microbatches of the run.

        exact: build all layers; otherwise one and two of each kind are built and the figures are extrapolated, where
        this is less work. UserError for a layout that cannot run, or for what cannot be simulated.
        """
        layout.check(config, world_size)
        for key, value, only in (
            ("engine", config.engine, "native"),
            ("model.moe.dispatcher", config.model.moe.dispatcher, "alltoall"),
        ):
            if value != only:
                raise UserError(f"--fake-gpu simulates {key}: {only} only", remedy=f"set {key}={only}")
        if config.train.attention in ("flash", "sdpa"):
            raise UserError(
                "--fake-gpu simulates train.attention: varlen or flex only",
                remedy="set train.attention=auto, varlen or flex",
            )
        return extrapolate.whole_step(config, vocabulary_size, world_size, rank, exact, self._ask)

    def _ask(self, request: ProbeRequest) -> ProbeResult:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        question = json.dumps(asdict(replace(request, imbalance=self.imbalance)))
        # If the process has ended, it may still have answered.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{question}\n")
            process.stdin.flush()
        line = process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {}
        if "error" in answer:
            what, remedy = answer["error"]
            raise UserError(what, remedy=remedy)
        if "result" not in answer:
            raise RuntimeError(f"the simulation of rank {request.rank} ended with code {process.wait()}")
        return ProbeResult(**answer["result"])
