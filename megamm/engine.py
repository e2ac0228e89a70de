"""What the training loop asks of an engine, and the choice between the two: native (Megatron) and DeepSpeed.

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
    """Of one optimizer step: losses before it, norm of the whole gradient before clipping, learning rate used.

    These are the same on every rank. own_norms is this rank's own: the norm of its gradient in each bucket before it
    was summed over ranks, float32 `[buckets]`; None where the engine does not know it.
    """

    loss: StepLoss
    grad_norm: float
    lr: float
    own_norms: torch.Tensor | None = None


Judge = Callable[[StepResult, Callable[[], StepResult] | None], tuple[StepResult, bool]]
"""Told a step's result and how to run it again from the same state, gives the result to use and whether it may change

the weights. Without a way to run it again, the engine has changed them already.
"""


Fill = Callable[[Sequence[Block], Mapping[str, Shape], set[str]], None]
"""Sets blocks: of weights, and of main copies under `optimizer.state.param.NAME`. It is told all tensors of the whole

model with their shapes, and which have the vocabulary as their first axis.
"""


class Engine(Protocol):
    """Every rank calls every method, in the same order. loss_weights is float64 `[modalities]`."""

    clock: Clock
    """Counts "forward", in which no rank waits for another data-parallel one or stage, and "update"."""
    before_update: Callable[[], None]
    """Called in a train_step before weights and optimizer state change; to be set by who reads them meanwhile."""

    def train_step(
        self, batches: Sequence[Batch], loss_weights: torch.Tensor, judge: Judge | None = None
    ) -> StepResult:
        """Forward and backward of this rank's microbatches, one optimizer step, one step of the schedule.

        Both steps only if the judge lets them; if not, nothing is changed.
        """

    def evaluate(self, batches: Sequence[Batch], loss_weights: torch.Tensor) -> StepLoss:
        """Losses only."""

    def blocks(self) -> list[Block]:
        """This rank's share of the model and optimizer tensors: the same list at every call but for the data."""

    def start_from(self, fill: Fill) -> None:
        """Let `fill` set the weights, and their main copies where these are of another dtype; called once."""

    def files_to_load(self, folder: Path) -> set[str]:
        """Names of the files that `load` reads from this folder, which may have the index alone."""

    def load(self, folder: Path, step: int, with_optimizer: bool) -> None:
        """Read what any engine at any layout stored after `step` optimizer steps (updates made)."""


def build(config: RunConfig, vocabulary_size: int, groups: Groups, device: Device) -> Engine:
    """The configured engine, with freshly initialised weights."""
    if config.engine == "deepspeed":
        from megamm.zero.engine import DeepSpeedEngine

        return DeepSpeedEngine(config, vocabulary_size, groups, device)
    from megamm.mcore.engine import NativeEngine

    return NativeEngine(config, vocabulary_size, groups, device)
