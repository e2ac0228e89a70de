"""The interface between the training loop and an engine.

An engine owns model, optimizer and learning-rate schedule. A step has two phases: `compute_gradients`, then
`apply_update` or `discard`, so that the loss guard can look at the gradients in between. Both engines run the same
backbone on the same microbatches and write the same checkpoint tensors (mcore/store.py), so that a run can change its
engine at any checkpoint.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megamm.checkpoint.tensor_shards import Shape, TensorShard
from megamm.common.sample import Batch
from megamm.common.timers import Timers
from megamm.model.generation import GeneratedTokens, GenerationLimits, GenerationRequest
from megamm.model.loss import StepLoss


@dataclass(frozen=True)
class StepResult:
    """Result of an optimizer step: losses before it, norm of the whole gradient before clipping, learning rate.

    These are the same on every rank. local_grad_norms belongs to this rank: the norm of its gradient in each bucket
    before the sum over ranks, float32 `[buckets]`; None if the engine does not measure it.
    """

    loss: StepLoss
    grad_norm: float
    lr: float
    local_grad_norms: torch.Tensor | None = None


WeightInitializer = Callable[[Sequence[TensorShard], Mapping[str, Shape], set[str]], None]
"""Sets blocks of weights, and of main copies under `optimizer.state.param.NAME`. It receives the shapes of all tensors
of the whole model, and the names of those whose first axis is the vocabulary.
"""


OnToken = Callable[[int, int, int], None]
"""Called with (request, sample, token) as each token of the rank's own samples is chosen."""
DEFAULT_LIMITS = GenerationLimits()


class Engine(Protocol):
    """Interface of an engine; all ranks call all methods, in the same order. loss_weights: float64 `[modalities]`."""

    timers: Timers
    """Measures "forward", in which a rank does not wait for other data-parallel ranks or stages, and "update"."""
    before_update: Callable[[], None]
    """Called before weights and optimizer state change; set by code that reads them in parallel."""

    can_discard: bool
    """Whether gradients can be computed again or discarded. If not, computing them also changes the weights."""

    def compute_gradients(self, batches: Sequence[Batch], loss_weights: torch.Tensor) -> StepResult:
        """Run forward and backward of this rank's microbatches. `apply_update` or `discard` must follow."""

    def recompute_gradients(self) -> StepResult:
        """Compute the gradients of the same microbatches again, from the same state. Needs `can_discard`."""

    def apply_update(self) -> None:
        """Make the optimizer step of the computed gradients, and a step of the learning-rate schedule."""

    def discard(self) -> None:
        """Make no update: weights, optimizer, schedule and buffers are as before. Needs `can_discard`."""

    def evaluate(self, batches: Sequence[Batch], loss_weights: torch.Tensor) -> StepLoss:
        """Compute only the losses."""

    def token_losses(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Return the cross entropy of each label, float32 `[B, S]` of each of this data rank's microbatches."""

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        limits: GenerationLimits = DEFAULT_LIMITS,
        *,
        with_logprobs: bool = False,
        on_token: OnToken | None = None,
    ) -> list[list[GeneratedTokens]]:
        """Return each request's answers, on every rank; data ranks share the samples.

        UserError for a request that cannot run, or a layout that generation does not support.
        """

    def blocks(self) -> list[TensorShard]:
        """Return this rank's share of the model and optimizer tensors: always the same list, except for the data."""

    def init_weights(self, initializer: WeightInitializer) -> None:
        """Let `initializer` set the weights, and their main copies if these have another dtype; called once."""

    def files_to_load(self, folder: Path) -> set[str]:
        """Return the names of the files that `load` reads from this folder, which may contain only the index."""

    def load(self, folder: Path, step: int, with_optimizer: bool) -> None:
        """Load the state that any engine at any layout saved after `step` optimizer steps (applied updates)."""
