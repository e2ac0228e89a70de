"""Process groups of a run: sets up and destroys torch.distributed and Megatron's TP x CP x PP x EP x DP device mesh.

A single process without a launcher gets a world of one over an in-memory store: no port, no network.
"""

import contextlib
import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megamm.common.device import Device
from megamm.config import ParallelConfig
from megamm.mcore import cpu


@dataclass(frozen=True)
class ProcessGroups:
    """This rank's coordinates in the device mesh; `collection` is Megatron's ProcessGroupCollection."""

    collection: Any
    rank: int
    world_size: int

    @property
    def tensor_rank(self) -> int:
        return self.collection.tp.rank()

    @property
    def pipeline_rank(self) -> int:
        return self.collection.pp.rank()

    @property
    def data_rank(self) -> int:
        return self.collection.dp.rank()

    @property
    def data_size(self) -> int:
        return self.collection.dp.size()

    @property
    def context_rank(self) -> int:
        return self.collection.cp.rank()

    @property
    def context_size(self) -> int:
        return self.collection.cp.size()

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.collection.pp.size() - 1

    def sum_over_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce (sum) over data and context parallel ranks, in place; returns the tensor."""
        dist.all_reduce(tensor, group=self.collection.dp_cp)
        return tensor

    def sum_over_job(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce (sum) over all ranks, in place; returns the tensor, which has the same bits on every rank."""
        dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Gather every rank's tensor of this shape, in rank order."""
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return parts

    def describe(self) -> str:
        return (
            f"rank {self.rank}: tensor {self.tensor_rank}, context {self.context_rank}, pipeline {self.pipeline_rank}, "
            f"data {self.data_rank}, expert {self.collection.ep.rank()}"
        )


TIMEOUT = datetime.timedelta(minutes=10)
"""Limit of a collective, for the world and for every group of the mesh; the hang detector usually acts before."""


def start(device: Device) -> None:
    """Join the job from torchrun's environment; without one, create a world of this process only."""
    if not device.is_gpu:
        cpu.install()
    if dist.is_initialized():
        return
    # With its GPU, a process connects at once instead of in its first collective, its groups split from the world's
    # communicator, and a barrier need not guess the GPU.
    options: dict[str, Any] = {"timeout": TIMEOUT} | ({"device_id": device.torch_device} if device.is_gpu else {})
    if "RANK" in os.environ:
        dist.init_process_group(device.backend, **options)
    else:
        dist.init_process_group(device.backend, store=dist.HashStore(), rank=0, world_size=1, **options)


def build(parallel: ParallelConfig, seed: int) -> ProcessGroups:
    """Create the device mesh over the started job and seed the parallel regions' generators."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    with cpu.shared_groups() if dist.get_backend() == "gloo" else contextlib.nullcontext():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            distributed_timeout_minutes=TIMEOUT // datetime.timedelta(minutes=1),
            # For Megatron's own checkpoints of the optimizer; each would connect a data-parallel group a second time.
            create_gloo_process_groups=False,
        )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    # Stages initialise different weights, data-parallel replicas the same; Megatron varies the seed over TP and EP.
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * collection.pp.rank(), force_reset_rng=True)
    torch.manual_seed(seed + 100 * collection.pp.rank())
    return ProcessGroups(collection, dist.get_rank(), dist.get_world_size())


def destroy() -> None:
    """Undo `build`, if it was called, so that a process can create another mesh (tests and conversion do)."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return
    # Megatron only drops its references; each group keeps threads and sockets until it is destroyed.
    values = list(vars(parallel_state).values())
    flat = [group for value in values for group in (value if isinstance(value, list) else [value])]
    for group in {id(group): group for group in flat if isinstance(group, dist.ProcessGroup)}.values():
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def stop() -> None:
    """Leave the job."""
    if dist.is_initialized():
        dist.destroy_process_group()
