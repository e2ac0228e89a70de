"""The routed experts of a rank as two products with all their matrices, in place of one MLP after another.

Megatron's SequentialMLP starts ten kernels and more for each expert, and the host has to know how many tokens each
gets. Here the matrices of all experts are two parameters, and the sizes stay on the device (ops/grouped_linear.py,
mcore/token_dispatch.py). Initial weights, and names and shapes in checkpoints, are those of SequentialMLP: a run can
change between both. Sequential experts remain as the reference, and for what this form does not have.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from megamm.common.device import Device
from megamm.common.errors import UserError
from megamm.config import RunConfig
from megamm.mcore.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megamm.mcore.layers import recomputing
from megamm.mcore.process_groups import ProcessGroups
from megamm.mcore.token_dispatch import SortedAllGather, SortedAllToAll
from megamm.ops.grouped_fp8 import grouped_linear_fp8
from megamm.ops.grouped_linear import grouped_linear, grouped_linear_torch, why_not
from megamm.ops.proof import AGAIN, UNPROVEN, Proven

DISPATCHERS = {"alltoall": SortedAllToAll, "allgather": SortedAllGather}
_NEEDS: dict[str, Any] = {
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "fp8": None,
    "fp4": None,
    "moe_latent_size": None,
    "moe_apply_probs_on_input": False,
    "moe_shared_expert_overlap": False,
    "moe_permute_fusion": False,
    "moe_expert_capacity_factor": None,
    "moe_pad_expert_input_to_capacity": False,
    "moe_router_padding_for_quantization": False,
    "delay_wgrad_compute": False,
    "overlap_moe_expert_parallel_comm": False,
    "overlap_dispatch_backward_with_experts_wgrad": False,
}
"""Megatron's fields that change its experts or its dispatchers -> the value that this form supports."""


def choose(
    config: RunConfig, megatron_config: TransformerConfig, device: Device, proven: Proven = UNPROVEN
) -> tuple[str, str]:
    """Return grouped, or sequential and the reason. UserError for `grouped` with fields that need the other form.

    Grouped experts whose product disagrees with plain torch run one after another: with `grouped`, a UserError. In FP8
    that needs another form of the experts, which multiplies in FP8 too.
    """
    if config.train.experts == "sequential":
        return "sequential", "requested"
    wrong = [f for f, value in _NEEDS.items() if getattr(megatron_config, f, value) != value]
    wrong += [f for f in config.model.megatron if "_graph" in f]  # parts of a graph are cut inside Megatron's own
    if megatron_config.moe_token_dispatcher_type not in DISPATCHERS:
        wrong.append("moe_token_dispatcher_type")
    if wrong and config.train.experts == "grouped":
        raise UserError(
            f"train.experts=grouped does not support model.megatron.{wrong[0]}",
            remedy="remove that field, or set train.experts=sequential",
            on_all_ranks=True,
        )
    if wrong:
        return "sequential", f"model.megatron.{wrong[0]} needs it"
    in_fp8 = config.train.precision == "fp8"
    if in_fp8 and device.why_no_grouped_fp8:
        if config.train.experts == "grouped":
            raise UserError(
                f"train.experts=grouped with train.precision=fp8: {device.why_no_grouped_fp8}",
                remedy="set train.experts=auto, or train.precision=bf16",
                on_all_ranks=True,
            )
        return "sequential", device.why_no_grouped_fp8
    problem = proven.problem("grouped_fp8", "grouped") if in_fp8 else ""
    if problem and config.train.experts == "auto":
        return "sequential", f"grouped products in FP8 disagree with plain torch: {problem}"
    problem = problem or proven.problem("grouped_linear", "grouped")
    if problem and config.train.experts == "grouped":
        raise UserError(
            f"train.experts=grouped: the grouped product disagrees with plain torch on this device: {problem}",
            remedy=f"set train.experts=auto or sequential; {AGAIN}",
            on_all_ranks=True,
        )
    return "grouped", ""


def use_grouped(
    model: torch.nn.Module,
    groups: ProcessGroups,
    activate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    recomputes_activation: bool,
    proven: Proven = UNPROVEN,
) -> str:
    """Replace the experts of a built model, and the dispatchers; return why products run one by one, or "".

    activate: (the first product's result `[R, 2F]`, routing weights `[R]`) -> `[R, F]`.
    """
    # Only whether it agrees: the time of products one by one does not include the host's wait for their sizes.
    problem, reasons = proven.problem("grouped_linear", "grouped"), [""]
    for layer in [module for module in model.modules() if isinstance(module, MoELayer)]:
        layer.experts = GroupedExperts(layer.experts, activate, recomputes_activation, problem)
        reasons.append(layer.experts.why_one_by_one)
        layer.token_dispatcher = DISPATCHERS[layer.config.moe_token_dispatcher_type](
            layer.num_local_experts, layer.local_expert_indices, layer.config, groups.collection
        )
    return max(reasons)


class GroupedExperts(MegatronModule):
    """linear_fc1 `[L, 2F, H]` (gate, then up) and linear_fc2 `[L, H, F]` of L local experts; F is a tensor rank's part.

    It replaces a SequentialMLP and takes over its weights with their attributes. It does not communicate: dispatchers
    gather tokens over expert-tensor ranks and sum results.
    """

    def __init__(
        self,
        replaced: SequentialMLP,
        activate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        recomputes_activation: bool,
        why_one_by_one: str = "",
    ) -> None:
        """why_one_by_one: why the grouped product is not used; empty if sizes and dtype decide."""
        super().__init__(config=replaced.config)
        self.ep_group, self.tp_group, self.dp_group = replaced.ep_group, replaced.tp_group, replaced.dp_group
        self.activate, self.recomputes_activation = activate, recomputes_activation
        experts = list(replaced.local_experts)
        kinds = type(experts[0].linear_fc1), type(experts[0].linear_fc2)
        in_fp8 = kinds == (Fp8ColumnParallelLinear, Fp8RowParallelLinear)
        assert in_fp8 or kinds == (ColumnParallelLinear, RowParallelLinear), f"{kinds} compute something else"
        self.linear_fc1 = _stacked([expert.linear_fc1.weight for expert in experts])
        self.linear_fc2 = _stacked([expert.linear_fc2.weight for expert in experts])
        widths = (*self.linear_fc1.shape[1:], self.linear_fc2.shape[2])
        self.why_one_by_one = why_one_by_one or why_not(self.linear_fc1.dtype, widths, self.linear_fc1.device)
        self.product: Callable[..., torch.Tensor]
        if in_fp8:
            self.product, self.why_one_by_one = partial(grouped_linear_fp8, scaling=experts[0].linear_fc1.scaling), ""
        else:
            self.product = grouped_linear_torch if self.why_one_by_one else grouped_linear

    def forward(
        self, rows: torch.Tensor, tokens_per_expert: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """rows `[R, H]` sorted by expert, tokens_per_expert `[L]` on the device, weights `[R]` -> `[R, H]`, no bias."""
        gate_up = self.product(rows, self.linear_fc1, tokens_per_expert)

        def second(hidden: torch.Tensor) -> torch.Tensor:
            return self.product(hidden, self.linear_fc2, tokens_per_expert)

        if self.recomputes_activation:
            return recomputing(self.activate, second, gate_up, weights), None
        return second(self.activate(gate_up, weights)), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensorFactory]:
        """Describe each expert's matrices under the names and in the shapes that SequentialMLP gives them."""
        # Tensor ranks have rows of the gate and of the up projection, and columns of the second product's matrix.
        return {
            f"{prefix}{name}": ShardedTensorFactory(
                f"{prefix}experts.{name}.weight",
                stack,
                partial(self._boxes, sharded_offsets, halves, axis),
                lambda parts, shape=stack.shape: torch.cat(parts).view(shape),
                (0, 0, self.dp_group.rank()),
            )
            for name, stack, halves, axis in (
                ("linear_fc1", self.linear_fc1, 2, 0),
                ("linear_fc2", self.linear_fc2, 1, 1),
            )
        }

    def _boxes(
        self, stacked: tuple[Any, ...], halves: int, axis: int, key: str, stack: torch.Tensor, replica: Any, _: Any
    ) -> list[ShardedTensor]:
        """Return the boxes of a stack in the whole model's tensor `[*stacked, experts, rows, columns]`.

        stacked: axes before the experts', as (axis, index, count). axis: of a matrix, along which each of its halves is
        split over tensor ranks.
        """
        ranks, rank, leading = self.tp_group.size(), self.tp_group.rank(), len(stacked)
        count, first = self.ep_group.size() * len(stack), self.ep_group.rank() * len(stack)
        return [
            ShardedTensor.from_rank_offsets(
                key,
                data,
                *stacked,
                (leading, expert, count),
                (leading + 1 + axis, half * ranks + rank, halves * ranks),
                replica_id=replica,
                prepend_axis_num=leading + 1,
            )
            for expert, matrix in enumerate(stack.detach().unbind(), start=first)
            for half, data in enumerate(matrix.chunk(halves))
        ]


def _stacked(matrices: Sequence[torch.Tensor]) -> torch.nn.Parameter:
    """Return one parameter of all matrices, with Megatron's attributes: how it is split, and its gradient's group."""
    stack = torch.nn.Parameter(torch.stack([matrix.detach() for matrix in matrices]))
    stack.__dict__.update({k: v for k, v in matrices[0].__dict__.items() if k not in stack.__dict__})
    if hasattr(stack, "partition_dim"):
        stack.partition_dim += 1
    return stack
