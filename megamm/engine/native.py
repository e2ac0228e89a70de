"""The native engine: Megatron's schedules, data-parallel gradient buffers and distributed optimizer (ZeRO-1).

A step has two phases, gradients and update (api.py). Between them nothing but generators and buffers has changed, so
that the same gradients can be computed again, or the step discarded.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megamm.checkpoint.tensor_shards import TensorShard
from megamm.common.device import Device
from megamm.common.sample import Batch
from megamm.common.timers import Timers
from megamm.config import RunConfig
from megamm.engine.api import DEFAULT_LIMITS, OnToken, StepResult, WeightInitializer
from megamm.mcore import backbone, generation, optimizer, rng, step, store
from megamm.mcore.process_groups import ProcessGroups
from megamm.model.generation import GeneratedTokens, GenerationLimits, GenerationRequest
from megamm.model.loss import StepLoss
from megamm.ops.proof import UNPROVEN, Proven


@dataclass
class _Step:
    """A step whose gradients are computed and whose update is not made yet, with the state to compute them again."""

    batches: Sequence[Batch]
    loss_weights: torch.Tensor
    generators: dict[str, torch.Tensor]
    buffers: list[torch.Tensor]
    grad_norm: float = math.nan


class NativeEngine:
    """megamm.engine.api.Engine at any layout that layout.check admits."""

    can_discard = True

    def __init__(
        self,
        config: RunConfig,
        vocabulary_size: int,
        groups: ProcessGroups,
        device: Device,
        proven: Proven = UNPROVEN,
    ) -> None:
        self.config, self.groups, self.device, self.timers = config, groups, device, Timers(device)
        self.vocabulary_size = vocabulary_size
        chunks = backbone.build_chunks(config, vocabulary_size, groups, device, proven)
        wanted = config.parallel.overlap_param_gather
        self.chunks = backbone.wrap(chunks, groups, device, device.is_gpu if wanted is None else wanted)
        step.prepare(self.chunks, groups)
        optimizer.keep_parameters(self.chunks)
        self.optimizer = optimizer.build(config, self.chunks, device, proven)
        self.schedule = optimizer.build_schedule(config, self.optimizer)
        self.local_grad_norms = optimizer.LocalGradNorms(self.chunks)
        self.before_update: Callable[[], None] = lambda: None
        self._step: _Step | None = None
        self.stored = store.EngineShards(self.chunks, self.optimizer, groups).to_save()

    def compute_gradients(self, batches: Sequence[Batch], loss_weights: torch.Tensor) -> StepResult:
        # All other state that a backward pass changes: random generators (dropout) and the routers' balancing bias.
        self._step = _Step(batches, loss_weights, rng.states(self.device), self._buffers())
        return self._gradients(self._step)

    def recompute_gradients(self) -> StepResult:
        assert self._step is not None, "compute_gradients comes first"
        rng.restore(self._step.generators, self.device)
        self._restore(self._step.buffers)
        return self._gradients(self._step)

    def apply_update(self) -> None:
        assert self._step is not None, "compute_gradients comes first"
        self.before_update()
        with self.timers.device("update"):
            optimizer.update(self.optimizer, self._step.grad_norm)
        self.schedule.step(1)
        self._step = None

    def discard(self) -> None:
        assert self._step is not None, "compute_gradients comes first"
        self._restore(self._step.buffers)
        self._step = None

    def _gradients(self, of: "_Step") -> StepResult:
        """Run forward and backward; the parameters do not change."""
        weight = self.config.model.mtp.loss_weight
        timed = partial(self.timers.device, "forward")
        loss = step.run(self.chunks, of.batches, of.loss_weights, weight, self.groups, timed=timed)
        optimizer.keep_parameters(self.chunks)
        of.grad_norm = optimizer.norm(self.optimizer)
        return StepResult(loss, of.grad_norm, self.optimizer.param_groups[0]["lr"], self.local_grad_norms.latest())

    def _buffers(self) -> list[torch.Tensor]:
        return [buffer.clone() for chunk in self.chunks for buffer in chunk.module.buffers()]

    @torch.no_grad()
    def _restore(self, saved: Sequence[torch.Tensor]) -> None:
        buffers = [buffer for chunk in self.chunks for buffer in chunk.module.buffers()]
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.copy_(value)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], loss_weights: torch.Tensor) -> StepLoss:
        for chunk in self.chunks:
            chunk.eval()
        weight = self.config.model.mtp.loss_weight
        loss = step.run(self.chunks, batches, loss_weights, weight, self.groups, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        return loss

    @torch.no_grad()
    def token_losses(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        for chunk in self.chunks:
            chunk.eval()
        losses = step.token_losses(self.chunks, batches, self.groups)
        for chunk in self.chunks:
            chunk.train()
        return losses

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        limits: GenerationLimits = DEFAULT_LIMITS,
        *,
        with_logprobs: bool = False,
        on_token: OnToken | None = None,
    ) -> list[list[GeneratedTokens]]:
        optimizer.finish_gathers(self.chunks)
        chunks = [chunk.module for chunk in self.chunks]
        size = self.vocabulary_size
        return generation.generate(self.config, chunks, self.groups, size, requests, limits, with_logprobs, on_token)

    def blocks(self) -> list[TensorShard]:
        return self.stored

    def init_weights(self, initializer: WeightInitializer) -> None:
        optimizer.finish_gathers(self.chunks)
        plan = store.EngineShards(self.chunks, self.optimizer, self.groups)
        initializer(plan.to_start(), *plan.whole(self.groups))

    def files_to_load(self, folder: Path) -> set[str]:
        return store.files_to_load(folder, self.chunks, self.optimizer, self.groups)

    def load(self, folder: Path, step: int, with_optimizer: bool) -> None:
        optimizer.finish_gathers(self.chunks)
        store.load(folder, self.chunks, self.optimizer if with_optimizer else None, self.groups, step)
        if not with_optimizer:
            # The optimizer's main copies still have the initial weights.
            self.optimizer.reload_model_params()
        optimizer.set_schedule(self.schedule, step)
