"""The interface between the training loop and an engine, and the choice of the engine: native (Megatron) or DeepSpeed.

An engine owns model, optimizer and learning-rate schedule. Both run the same backbone on the same microbatches and
write the same checkpoint tensors (mcore/store.py), so that a run can change its engine at any checkpoint.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megamm.checkpoint.blocks import Block, Shape
from megamm.clock import Clock
from megamm.config import RunConfig
from megamm.data.sample import Batch
from megamm.device import Device
from megamm.mcore.groups import Groups
from megamm.objective import StepLoss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """Result of an optimizer step: losses before it, norm of the whole gradient before clipping, learning rate.

    These are the same on every rank. own_norms belongs to this rank: the norm of its gradient in each bucket before the
    sum over ranks, float32 `[buckets]`; None if the engine does not measure it.
    """

    loss: StepLoss
    grad_norm: float
    lr: float
    own_norms: torch.Tensor | None = None


Judge = Callable[[StepResult, Callable[[], StepResult] | None], tuple[StepResult, bool]]
"""Receives a step's result and a function that runs the step again from the same state; returns the result to use and
whether it may change the weights. If that function is None, the engine has already changed them.
"""


Fill = Callable[[Sequence[Block], Mapping[str, Shape], set[str]], None]
"""Sets blocks of weights, and of main copies under `optimizer.state.param.NAME`. It receives the shapes of all tensors
of the whole model, and the names of those whose first axis is the vocabulary.
"""


class Engine(Protocol):
    """Interface of an engine; all ranks call all methods, in the same order. loss_weights: float64 `[modalities]`."""

    clock: Clock
    """Measures "forward", in which a rank does not wait for other data-parallel ranks or stages, and "update"."""
    before_update: Callable[[], None]
    """Called in train_step before weights and optimizer state change; set by code that reads them in parallel."""

    def train_step(
        self, batches: Sequence[Batch], loss_weights: torch.Tensor, judge: Judge | None = None
    ) -> StepResult:
        """Run forward and backward of this rank's microbatches, one optimizer step, and one step of the schedule.

        Both steps are made only if the judge allows them; otherwise nothing changes.
        """

    def evaluate(self, batches: Sequence[Batch], loss_weights: torch.Tensor) -> StepLoss:
        """Compute only the losses."""

    def blocks(self) -> list[Block]:
        """Return this rank's share of the model and optimizer tensors: always the same list, except for the data."""

    def start_from(self, fill: Fill) -> None:
        """Let `fill` set the weights, and their main copies if these have another dtype; called once."""

    def files_to_load(self, folder: Path) -> set[str]:
        """Return the names of the files that `load` reads from this folder, which may contain only the index."""

    def load(self, folder: Path, step: int, with_optimizer: bool) -> None:
        """Load the state that any engine at any layout saved after `step` optimizer steps (applied updates)."""


def build(config: RunConfig, vocabulary_size: int, groups: Groups, device: Device) -> Engine:
    """Build the configured engine with newly initialised weights."""
    if config.engine == "deepspeed":
        from megamm.zero.engine import DeepSpeedEngine

        return DeepSpeedEngine(config, vocabulary_size, groups, device)
    from megamm.mcore.engine import NativeEngine

    return NativeEngine(config, vocabulary_size, groups, device)
