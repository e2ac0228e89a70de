"""Gathers whole tensors from ZeRO's shards and scatters them back, one parameter at a time.

A rank holds only its share of the whole tensors (store.ParameterSpecs.owners), plus the one in transit.
For every parameter, ZeRO shards a float32 main copy and Adam's moments over the ranks; stages 1 and 2 shard the
concatenation of a group of parameters, stage 3 shards every parameter.
"""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed import utils

from megamm.checkpoint.tensor_shards import MAIN, MOMENTS
from megamm.mcore.store import MODEL, ParameterSpecs, WholeTensors


class Shards:
    """The tensors of a model that DeepSpeed has sharded; every rank calls every method."""

    def __init__(self, model: torch.nn.Module, specs: ParameterSpecs, zero: Any, adam: torch.optim.AdamW) -> None:
        """Create the (zero) Adam state of every shard. zero: DeepSpeed's optimizer around `adam`."""
        self.model, self.specs, self.zero, self.adam = model, specs, zero, adam
        self.parameters = dict(model.named_parameters())
        self.owners = specs.owners(dist.get_world_size())
        self.owned = [name for name, rank in self.owners.items() if rank == dist.get_rank()]
        self._prime()

    def _prime(self) -> None:
        """Create moments of 0 before the first step, so that they can be read and set at any time."""
        flats, parts = _flat_shards(self.zero)
        for flat in flats:
            state = self.adam.state[flat]
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(flat.data)
        for flat, parameters in zip(flats, parts, strict=True):
            utils.lazy_init_hp_params_optimizer_state(parameters, flat, self.adam.state)

    def kinds(self, of_parameter: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """Return what to read for each stored tensor: these kinds for a parameter, the value for a buffer."""
        return {name: of_parameter if name in self.parameters else (MODEL,) for name in self.specs.by_name}

    def gather(self) -> WholeTensors:
        """Return this rank's share of whole tensors, on the CPU."""
        owned: WholeTensors = {name: {} for name in self.owned}
        buffers = dict(self.model.named_buffers())
        for name in self.specs.by_name:
            if name in self.parameters:
                parameter = self.parameters[name]
                for kind in (MAIN, *MOMENTS):
                    # A collective: every rank takes part for every parameter, and only the owner keeps the result.
                    whole = _get(parameter, kind)
                    if name in owned:
                        owned[name][kind] = whole.cpu()
                        if kind == MAIN:
                            owned[name][MODEL] = whole.to("cpu", self.specs.dtypes[name])
            elif name in owned:
                owned[name][MODEL] = buffers[name].detach().cpu()
        return owned

    @torch.no_grad()
    def scatter(self, owned: WholeTensors, kinds: dict[str, tuple[str, ...]], step: int) -> None:
        """Set `kinds` of every tensor from its owner's; with Adam's moments, also set Adam's step count to `step`."""
        buffers = dict(self.model.named_buffers())
        # In the same order on all ranks, because `_from_owner` is a broadcast.
        for name, wanted in kinds.items():
            for kind in wanted:
                if name in self.parameters:
                    parameter = self.parameters[name]
                    whole = self._from_owner(owned, name, kind, torch.float32, parameter.device)
                    _set(parameter, MAIN if kind == MODEL else kind, whole)
                    if kind in (MODEL, MAIN) and hasattr(parameter, "ds_id"):
                        # The weight used in computation; stages 1 and 2 set it from the main copies below.
                        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=self.owners[name]):
                            parameter.data.copy_(whole)
                else:
                    buffer = buffers[name]
                    buffer.copy_(self._from_owner(owned, name, kind, buffer.dtype, buffer.device))
        if hasattr(self.zero, "update_lp_params"):
            self.zero.update_lp_params()
        if any(MOMENTS[0] in wanted for wanted in kinds.values()):
            for state in self.adam.state.values():
                state["step"].fill_(step)

    def _from_owner(
        self, owned: WholeTensors, name: str, kind: str, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        if name in owned:
            whole = owned[name][kind].to(device, dtype)
        else:
            whole = torch.empty(self.specs.shapes[name], dtype=dtype, device=device)
        dist.broadcast(whole, src=self.owners[name])
        return whole


def _flat_shards(zero: Any) -> tuple[list[torch.Tensor], list[list[torch.nn.Parameter]]]:
    """Return this rank's flat main copies (keys of Adam's state), and for each the parameters to link to its state."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3 looks the state up at each access
        flats = list(zero.fp32_partitioned_groups_flat)
        return flats, [[] for _ in flats]
    if hasattr(zero, "fp32_groups_flat_partition"):  # stage 1 in bf16
        return zero.fp32_groups_flat_partition, zero.bf16_groups
    return zero.single_partition_of_fp32_groups, zero.bit16_groups


def _get(parameter: Any, kind: str) -> torch.Tensor:
    """Return the whole float32 main copy or moment, on every rank."""
    if kind == MAIN:
        return utils.safe_get_full_fp32_param(parameter)
    return utils.safe_get_full_optimizer_state(parameter, kind)


def _set(parameter: Any, kind: str, whole: torch.Tensor) -> None:
    """Set this rank's part from a whole float32 tensor."""
    if not hasattr(parameter, "ds_id"):
        if kind == MAIN:
            utils.safe_set_full_fp32_param(parameter, whole)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, kind)
        return
    # Stage 3's functions split a tensor wrongly if its size is not divisible by the number of ranks: split it here.
    size = parameter.ds_tensor.numel()
    part = F.pad(whole.flatten(), (0, size * dist.get_world_size() - whole.numel()))
    part = part.narrow(0, size * dist.get_rank(), size)
    if kind == MAIN:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, kind)
