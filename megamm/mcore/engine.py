"""The native engine: Megatron's schedules, data-parallel gradient buffers and distributed optimizer (ZeRO-1)."""

from collections.abc import Sequence
from pathlib import Path

import torch

from megamm.config import RunConfig
from megamm.data.sample import Batch
from megamm.device import Device
from megamm.engine import StepResult
from megamm.mcore import backbone, optimizer, step, store
from megamm.mcore.groups import Groups
from megamm.objective import StepLoss


class NativeEngine:
    """megamm.engine.Engine at any layout that layout.check admits."""

    def __init__(self, config: RunConfig, vocabulary_size: int, groups: Groups, device: Device) -> None:
        self.config, self.groups = config, groups
        chunks = backbone.build_chunks(config, vocabulary_size, groups, device)
        self.chunks = backbone.wrap(chunks, groups, device)
        step.prepare(self.chunks)
        self.optimizer = optimizer.build(config, self.chunks)
        self.schedule = optimizer.build_schedule(config, self.optimizer)

    def train_step(self, batches: Sequence[Batch], loss_weights: torch.Tensor) -> StepResult:
        loss = step.run(self.chunks, batches, loss_weights, self.config.model.mtp.loss_weight, self.groups)
        lr = self.optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = self.optimizer.step()
        self.schedule.step(1)
        return StepResult(loss, float(grad_norm), lr)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], loss_weights: torch.Tensor) -> StepLoss:
        for chunk in self.chunks:
            chunk.eval()
        weight = self.config.model.mtp.loss_weight
        loss = step.run(self.chunks, batches, loss_weights, weight, self.groups, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        return loss

    def save(self, folder: Path) -> None:
        store.save(folder, self.chunks, self.optimizer, self.groups)

    def load(self, folder: Path, step: int, with_optimizer: bool) -> None:
        store.load(folder, self.chunks, self.optimizer if with_optimizer else None, self.groups, step)
        if not with_optimizer:
            self.optimizer.reload_model_params()
        self.schedule.step(step)
