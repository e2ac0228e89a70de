"""AdamW with Megatron's distributed optimizer (ZeRO-1), its learning-rate schedule, and norms of gradients.

Sources: Loshchilov and Hutter 2019 (AdamW); Rajbhandari et al. 2020 (ZeRO); Hu et al. 2024 (WSD).
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import Adam as PackageAdam
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megamm.common.device import DTYPES, Device
from megamm.config import RunConfig
from megamm.mcore import compat
from megamm.mcore.adam import StoredMomentsAdamW
from megamm.ops.proof import UNPROVEN, Proven

log = logging.getLogger(__name__)


def build(
    config: RunConfig, chunks: Sequence[DistributedDataParallel], device: Device, proven: Proven = UNPROVEN
) -> Any:
    """Build Megatron's optimizer for the chunks' parameters; norms and biases have no weight decay."""
    o, bf16 = config.optimizer, DTYPES[config.train.precision] is torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=o.lr,
                min_lr=o.min_lr,
                weight_decay=o.weight_decay,
                adam_beta1=o.beta1,
                adam_beta2=o.beta2,
                adam_eps=o.eps,
                clip_grad=o.clip_grad,
                bf16=bf16,
                params_dtype=DTYPES[config.train.precision],
                use_distributed_optimizer=True,
            ),
            list(chunks),
            use_gloo_process_groups=False,
        )
    kind, why = proven.choose("adam", adams(device))
    for part in parts(optimizer):
        groups = part.optimizer.param_groups
        if o.moments != "fp32" or o.offload_moments:
            part.optimizer = StoredMomentsAdamW(groups, DTYPES[o.moments], o.offload_moments, device)
        elif kind in TORCH_ADAMS and not isinstance(part.optimizer, torch.optim.AdamW):
            part.optimizer = torch.optim.AdamW(groups)
        # The moments exist before the first step, so that the engine's blocks are always the same list.
        compat.prime_adam(part, step=0)
        for group in part.optimizer.param_groups:
            # One fused pass over a parameter; torch's default on a CPU is one pass per operation.
            if "fused" in group and group.get("foreach") is None:
                group["fused"] = kind != "plain"
    if why and torch.distributed.get_rank() == 0:
        log.info("adam: %s, %s", kind, why)
    return optimizer


TORCH_ADAMS = ("fused", "plain")
"""torch's AdamW in one pass over a parameter, and in one pass for each operation."""


def adams(device: Device) -> tuple[str, ...]:
    """Return the implementations of AdamW on the device: what Megatron has imported from a package, then torch's."""
    is_package = device.is_gpu and not issubclass(PackageAdam, torch.optim.AdamW)
    return (PackageAdam.__module__.partition(".")[0], *TORCH_ADAMS) if is_package else TORCH_ADAMS


def adam(kind: str, parameters: list[torch.nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """Make one of the `adams` with these hyperparameters."""
    if kind in TORCH_ADAMS:
        return torch.optim.AdamW(parameters, fused=kind == "fused", **settings)
    made: torch.optim.Optimizer = PackageAdam(parameters, adam_w_mode=True, **settings)
    return made


def parts(optimizer: Any) -> list[Any]:
    """Return the inner distributed optimizers: one for dense parameters, and one for experts if they are parallel."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def norm(optimizer: Any) -> float:
    """Prepare the gradient for `update` and return its norm over the whole job.

    The norm is the same on every rank, and not finite if the gradient is not finite.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


class LocalGradNorms:
    """Norms of this rank's own gradients, bucket by bucket (also of experts), just before the data-parallel sum.

    After the sum it is unknown which rank produced a wrong value. The cost is one pass over the gradient per step.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        self._norms: dict[int, torch.Tensor] = {}
        for chunk in chunks:
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                group.start_grad_sync = self._watching(group, group.start_grad_sync)

    def latest(self) -> torch.Tensor:
        """Return the norms of the last backward pass, float32 `[buckets]`, always in the same order."""
        return torch.stack([self._norms[key] for key in sorted(self._norms)])

    def _watching(self, group: Any, start_grad_sync: Callable[..., Any]) -> Callable[..., Any]:
        first = len(self._norms)
        for number, bucket in enumerate(group.buckets, start=first):
            self._norms[number] = bucket.grad_data.new_zeros(())

        # Called once a step per bucket group: with overlap, as soon as the backward pass has filled its buckets.
        def watched(*args: Any, **kwargs: Any) -> Any:
            for number, bucket in enumerate(group.buckets, start=first):
                self._norms[number] = torch.linalg.vector_norm(bucket.grad_data)
            return start_grad_sync(*args, **kwargs)

        return watched


def update(optimizer: Any, grad_norm: float) -> None:
    """Clip the gradient, given its norm, and update the parameters; `norm` and `update` replace Megatron's `step`.

    With parallel.overlap_param_gather, the parameters of other data-parallel ranks are still being gathered afterwards.
    """
    for part in parts(optimizer):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
    # Not the parts' own method: each would then gather all parameters, of the other part too.
    for part in parts(optimizer):
        super(DistributedOptimizer, part).step_with_ready_grads()
    chunks = {id(chunk): chunk for part in parts(optimizer) for chunk in part.model_chunks}
    for group in _bucket_groups(list(chunks.values())):
        group.start_param_sync()


def finish_gathers(chunks: Sequence[DistributedDataParallel]) -> None:
    """Wait until all parameters of the last update are gathered; then they may be written."""
    for group in _bucket_groups(chunks):
        if group.param_gather_handle is not None:
            group.finish_param_sync(skip_next_bucket_dispatch=True)


def keep_parameters(chunks: Sequence[DistributedDataParallel]) -> None:
    """Let forward passes use the parameters as they are until the next update.

    Megatron otherwise gathers them at the first forward pass, and again after each backward pass.
    """
    for group in _bucket_groups(chunks):
        group.param_gather_dispatched = True


def _bucket_groups(chunks: Sequence[DistributedDataParallel]) -> list[Any]:
    """Return all bucket groups in the order in which a forward pass uses them: the first bucket has the last layers."""
    found = []
    for chunk in chunks:
        found += [*reversed(chunk.bucket_groups), *reversed(chunk.expert_parallel_bucket_groups)]
    return found


def build_schedule(config: RunConfig, optimizer: Any) -> OptimizerParamScheduler:
    """Build the schedule: linear warm-up, then cosine to min_lr, or constant with a linear decay at the end (WSD)."""
    o, steps = config.optimizer, config.train.steps
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=o.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style="WSD" if o.schedule == "wsd" else "cosine",
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=o.decay_steps if o.schedule == "wsd" else None,
        lr_wsd_decay_style="linear" if o.schedule == "wsd" else None,
    )
    set_schedule(schedule, 0)
    return schedule


def set_schedule(schedule: OptimizerParamScheduler, updates: int) -> None:
    """Set the schedule to its state after `updates` updates; a roll-back moves it backwards."""
    schedule.num_steps = 0
    schedule.step(1 + updates)  # at 0 the first step would have learning rate 0 and be wasted
