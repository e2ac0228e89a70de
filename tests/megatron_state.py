"""Whole tensors out of sharded ones, for comparison: gradients and parameters by their global names."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def save_assembled(folder: Path, model: Any, value_of: Callable[[Any], torch.Tensor]) -> None:
    """Write value_of(parameter) for every parameter as one whole tensor per name; every rank calls it."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = {}
    for key, entry in model.module.sharded_state_dict(metadata=metadata).items():
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and isinstance(entry.data, torch.nn.Parameter):
            value = value_of(entry.data).detach()
            changes = {"dtype": value.dtype} if isinstance(entry, ShardedTensor) else {}
            state[key] = replace(entry, data=value, **changes)
    assert len(state) == len(list(model.module.named_parameters())), "a parameter would go uncompared"
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist_checkpointing.save(state, str(folder))
    logging.disable(logging.NOTSET)
