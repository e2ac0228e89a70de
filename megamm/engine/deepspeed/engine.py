"""The same model, losses and optimizer as the native engine, sharded by DeepSpeed's ZeRO-1, 2 or 3.

ZeRO shards optimizer state (1), gradients (2) and parameters (3) over the data-parallel ranks, optionally with the
optimizer's state and step on the host. Checkpoints have the native engine's format (zero_shards.py).
Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".
"""

import contextlib
import io
import logging
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megamm.checkpoint import index, reader
from megamm.checkpoint.tensor_shards import MAIN, MOMENTS, TensorShard
from megamm.common.device import Device
from megamm.common.errors import UserError
from megamm.common.sample import Batch
from megamm.common.timers import Timers
from megamm.config import RunConfig
from megamm.engine.api import StepResult, WeightInitializer
from megamm.mcore import backbone, generation, optimizer, step, store
from megamm.mcore.process_groups import ProcessGroups
from megamm.model.generation import GeneratedTokens
from megamm.model.loss import StepLoss
from megamm.ops.proof import UNPROVEN, Proven

log = logging.getLogger(__name__)

BUCKET = 50_000_000
"""Maximum number of elements that are reduced or gathered in one call."""


class DeepSpeedEngine:
    """Implements megamm.engine.api.Engine with data parallelism only; config.deepspeed sets the ZeRO stage."""

    can_discard = False

    def __init__(
        self,
        config: RunConfig,
        vocabulary_size: int,
        groups: ProcessGroups,
        device: Device,
        proven: Proven = UNPROVEN,
    ) -> None:
        """Build the engine. UserError if deepspeed is not installed."""
        self.before_update: Callable[[], None] = lambda: None
        deepspeed = import_deepspeed(device)
        from megamm.engine.deepspeed.zero_shards import Shards

        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed needs it even in a process without a launcher
        self.config, self.groups, self.timers = config, groups, Timers(device)
        (model,) = backbone.build_chunks(config, vocabulary_size, groups, device, proven)
        self.model = model
        self.specs = store.ParameterSpecs.of(model, groups)
        self.adam = _adam(config, model)
        with contextlib.redirect_stdout(io.StringIO()):  # in some stages it prints memory figures
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=self.adam, config=deepspeed_config(config, groups), dist_init_required=False
            )
        self.shards = Shards(model, self.specs, self.deepspeed.optimizer, self.adam)
        self.schedule = optimizer.build_schedule(config, self.adam)
        if groups.rank == 0:
            stage, adam_on = config.deepspeed.zero, "host" if config.deepspeed.offload_optimizer else "device"
            log.info(
                "engine: DeepSpeed %s, ZeRO-%d, Adam on the %s: as configured", deepspeed.__version__, stage, adam_on
            )

    def compute_gradients(self, batches: Sequence[Batch], loss_weights: torch.Tensor) -> StepResult:
        """Compute the gradients and change the weights: the optimizer step is part of DeepSpeed's backward pass."""
        self.before_update()
        lr, mtp = self.adam.param_groups[0]["lr"], self.config.model.mtp
        loss = step.run_unsharded(
            self.deepspeed,
            batches,
            loss_weights,
            mtp,
            self.groups,
            self._backward,
            partial(self.timers.device, "forward"),
        )
        step.finish_unsharded(self.model)
        norm = float(self.deepspeed.get_global_grad_norm())
        # In bf16 DeepSpeed returns -1 for a gradient that is not finite.
        return StepResult(loss, norm if norm >= 0 else math.nan, lr)

    def recompute_gradients(self) -> StepResult:
        raise NotImplementedError("DeepSpeed has made the update already")

    def apply_update(self) -> None:
        """Step the schedule only: the weights have changed in compute_gradients."""
        self.schedule.step(1)

    def discard(self) -> None:
        raise NotImplementedError("DeepSpeed has made the update already")

    def _backward(self, loss: torch.Tensor) -> None:
        """Run backward for one microbatch; DeepSpeed counts them and updates the parameters at the step's last one."""
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        self.deepspeed.step()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], loss_weights: torch.Tensor) -> StepLoss:
        self.deepspeed.eval()
        loss = step.run_unsharded(self.deepspeed, batches, loss_weights, self.config.model.mtp, self.groups)
        self.deepspeed.train()
        return loss

    def token_losses(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Raise the UserError that names the other engine."""
        raise UserError("evaluation.suite needs the native engine", remedy="set engine: native, or remove evaluation")

    def generate(self, *_: Any, **__: Any) -> list[list[GeneratedTokens]]:
        """Raise the UserError that names the other engine."""
        generation.check_supported(self.config)
        raise AssertionError("check_supported refuses this engine")

    def blocks(self) -> list[TensorShard]:
        return self.specs.blocks(self.shards.gather())

    def init_weights(self, initializer: WeightInitializer) -> None:
        kinds = self.shards.kinds((MAIN,))
        described = {part.key: part for parts in self.specs.by_name.values() for part in parts}
        whole = {key: part.shape for key, part in described.items()}
        tables = {key for key, part in described.items() if part.grows}
        owned = store.load_whole(
            lambda blocks: initializer(blocks, whole, tables), self.specs, self.shards.owned, kinds
        )
        self.shards.scatter(owned, kinds, 0)

    def files_to_load(self, folder: Path) -> set[str]:
        return {block.file for tensor in index.read(folder).values() for block in tensor.shards}  # by whole tensors

    def load(self, folder: Path, step: int, with_optimizer: bool) -> None:
        # Without optimizer state, main copies are set from the weights.
        kinds = self.shards.kinds((MAIN, *MOMENTS) if with_optimizer else (store.MODEL,))
        owned = store.load_whole(partial(reader.load, folder), self.specs, self.shards.owned, kinds)
        self.shards.scatter(owned, kinds, step)
        optimizer.set_schedule(self.schedule, step)


def import_deepspeed(device: Device) -> ModuleType:
    """Import deepspeed for the device of the run. UserError if it is missing."""
    if not device.is_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ModuleNotFoundError:
        raise UserError(
            "engine=deepspeed, but the package deepspeed is not installed",
            remedy="pip install deepspeed (megamm's extra `deepspeed`), or set engine=native",
            on_all_ranks=True,
        ) from None
    # None of its C++ operators is needed, but at start it compiles one (communication over shared memory) if it can:
    # this takes minutes, and leaves a lock behind if interrupted.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def deepspeed_config(config: RunConfig, groups: ProcessGroups) -> dict[str, Any]:
    """Return DeepSpeed's own configuration for this run."""
    t, zero = config.train, config.deepspeed
    stage: dict[str, Any] = {
        "stage": zero.zero,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        # Norm weights stay whole on every rank: gathering one costs more than keeping it.
        "stage3_param_persistence_threshold": config.model.hidden_size,
        # Megatron's linear layers keep no copy of a weight; DeepSpeed's would replace torch's for the whole process.
        "memory_efficient_linear": False,
    }
    if zero.offload_optimizer:
        stage["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": t.micro_batch_size,
        "gradient_accumulation_steps": t.global_batch_size // (t.micro_batch_size * groups.data_size),
        "gradient_clipping": config.optimizer.clip_grad,
        "zero_optimization": stage,
        "bf16": {"enabled": t.precision == "bf16"},
        # As in the native engine, gradients are accumulated and reduced in float32.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # Use torch's AdamW even with offload: DeepSpeed's own is compiled at first use, and is not faster.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def _adam(config: RunConfig, model: torch.nn.Module) -> torch.optim.AdamW:
    """Build AdamW for the model's parameters; norms and biases (vectors) have no weight decay, as in Megatron."""
    o = config.optimizer
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "wd_mult": 1.0},
        {"params": [p for p in parameters if p.dim() <= 1], "wd_mult": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, fused=True
    )
