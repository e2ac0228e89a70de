"""Brings tokens to the ranks and rows of their experts, and results back: Megatron-core's exchange without its waits.

Steps and collectives are those of Megatron's dispatchers, as MoELayer calls them: permute, exchange between expert
ranks, gather over expert-tensor ranks, sort by local expert; then all of it backwards. Megatron's host waits three
times a layer for numbers of tokens. Here it waits once, for the sizes of the exchange, and not at all if a rank has all
experts: indices are sorted on the device (ops/routing.py), and the experts read their sizes there
(ops/grouped_linear.py).

Shapes: T tokens of this rank, H hidden size, E experts, L local experts, R rows of this rank's experts.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from megamm.ops import routing
from megamm.ops.routing import Order, Rows


class SortedDispatcher(MoETokenDispatcher):
    """What both exchanges have in common; `tp` and `ep` are expert-tensor and expert ranks, as in Megatron."""

    def __init__(
        self, num_local_experts: int, local_expert_indices: list[int], config: TransformerConfig, pg_collection: Any
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.num_local_experts, self.first_expert = num_local_experts, local_expert_indices[0]
        self.hidden_shape = torch.Size()
        self.probs_dtype = torch.float32
        self.rows: Rows | None = None

    @property
    def is_local(self) -> bool:
        """Whether this rank has every expert, whole."""
        return self.tp_size * self.ep_size == 1

    def _own(self, per_expert: torch.Tensor) -> torch.Tensor:
        """Return the part of this rank's experts, `[..., E]` -> `[..., L]`."""
        return per_expert.narrow(-1, self.first_expert, self.num_local_experts)

    def _begin(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        self.hidden_shape, self.probs_dtype = hidden_states.shape, probs.dtype
        return hidden_states.view(-1, self.hidden_shape[-1])


class SortedAllToAll(SortedDispatcher):
    """Sends each row to the rank of its expert."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Tokens for each local expert from each rank, `[tp, ep, L]`, and its rows in the order of experts.
        self.received = torch.empty(0)
        self.order: Order | None = None
        # Rows to and from each expert rank; rows of each expert-tensor rank. None: equal parts.
        self.sent_sizes: list[int] | None = None
        self.received_sizes: list[int] | None = None
        self.tensor_sizes: list[int] | None = None
        self.sizes_on_host: torch.Tensor | None = None
        self.sizes_arrived: Any = None

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states `[S, B, H]`, routing_map bool and probs `[T, E]` -> rows `[T * top_k, H]`, their weights."""
        hidden_TH = self._begin(hidden_states, probs)
        self._count(routing_map.sum(0))
        self.rows = routing.rows_of(routing_map, len(routing_map) * self.config.moe_router_topk)
        return routing.gather(hidden_TH, self.rows), probs.flatten().index_select(0, self.rows.choice)

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Exchange rows and weights between expert ranks."""
        if self.ep_size > 1:
            self.sent_sizes, self.received_sizes, self.tensor_sizes = self._sizes()
        sizes = self.received_sizes, self.sent_sizes
        return all_to_all(self.ep_group, hidden_states, *sizes), all_to_all(self.ep_group, probs, *sizes)

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rows sorted by local expert `[R, H]`, the number of each expert's rows `[L]`, weights `[R]`."""
        if self.tp_size > 1:
            sizes = self.tensor_sizes
            hidden_states, probs = (
                gather_from_sequence_parallel_region(x, group=self.tp_group, output_split_sizes=sizes)
                for x in (hidden_states, probs)
            )
        if not self.is_local and self.num_local_experts > 1:
            # Rows arrive by rank, and from each rank by expert.
            experts = torch.arange(self.num_local_experts, device=probs.device).repeat(self.tp_size * self.ep_size)
            self.order = routing.sort(
                experts.repeat_interleave(self.received.flatten(), output_size=len(hidden_states))
            )
            hidden_states, probs = routing.reorder(hidden_states, self.order), routing.reorder(probs, self.order)
        return hidden_states, self.received.sum((0, 1)), probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the experts' results in the order of ranks, summed over expert-tensor ranks."""
        if self.order is not None:
            hidden_states = routing.reorder(hidden_states, self.order.reversed())
        if self.tp_size > 1:
            hidden_states = reduce_scatter_to_sequence_parallel_region(
                hidden_states.to(self.probs_dtype), group=self.tp_group, input_split_sizes=self.tensor_sizes
            ).to(hidden_states.dtype)
        return hidden_states

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Send results back."""
        return all_to_all(self.ep_group, hidden_states, self.sent_sizes, self.received_sizes)

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the sum of each token's results, `[S, B, H]`."""
        assert self.rows is not None
        return routing.combine(hidden_states, self.rows).view(self.hidden_shape)

    def _count(self, own_E: torch.Tensor) -> None:
        """Exchange the number of tokens for each expert, and start to copy the sizes that the host needs."""
        all_E = gather_from_sequence_parallel_region(own_E, group=self.tp_ep_group)
        self.received = self._own(all_E.view(self.ep_size, self.tp_size, -1).transpose(0, 1))
        if self.ep_size == 1:  # sequence parallel ranks have equal numbers of tokens
            return
        from_rank = self.received.sum(2)
        sizes = [own_E.view(self.ep_size, -1).sum(1), from_rank[self.tp_rank], from_rank.sum(1)]
        # The host waits for this copy when it needs the sizes; until then it queues the permutation.
        self.sizes_on_host = torch.cat(sizes).to("cpu", non_blocking=True)
        self.sizes_arrived = torch.get_device_module(own_E.device).Event()
        self.sizes_arrived.record()

    def _sizes(self) -> tuple[list[int], list[int], list[int]]:
        """Wait for the copy; return rows to each expert rank, from each, and of each expert-tensor rank."""
        assert self.sizes_on_host is not None
        self.sizes_arrived.synchronize()
        sizes, n = self.sizes_on_host.tolist(), self.ep_size
        return sizes[:n], sizes[n : 2 * n], sizes[2 * n :]


class SortedAllGather(SortedDispatcher):
    """Gathers the tokens of all ranks, takes those of the own experts, and sums results over all ranks."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.routing_map = torch.empty(0)

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states `[S, B, H]`, routing_map bool and probs `[T, E]` -> tokens `[T, H]`, probs."""
        self.routing_map = routing_map
        return self._begin(hidden_states, probs), probs

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and probs of all ranks."""
        if self.is_local:
            return hidden_states, probs
        group = self.tp_ep_group
        with torch.no_grad():
            self.routing_map = gather_from_sequence_parallel_region(self.routing_map, group=group)
        probs = gather_from_sequence_parallel_region(probs, group=group)
        return gather_from_sequence_parallel_region(hidden_states, group=group, use_global_buffer=True), probs

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rows sorted by local expert `[R, H]`, the number of each expert's rows `[L]`, weights `[R]`."""
        own = self._own(self.routing_map)
        sizes = own.sum(0)
        # The router decides how many rows a part of the experts gets: the one wait.
        number = len(own) * self.config.moe_router_topk if self.is_local else int(sizes.sum())
        self.rows = routing.rows_of(own, number)
        weights = self._own(probs).flatten().index_select(0, self.rows.choice)
        return routing.gather(hidden_states, self.rows), sizes, weights

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the sum of the own experts' results for the tokens of all ranks."""
        assert self.rows is not None
        return routing.combine(hidden_states, self.rows)

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks for the own tokens, `[T, H]`."""
        if self.is_local:
            return hidden_states
        return reduce_scatter_to_sequence_parallel_region(
            hidden_states.to(self.probs_dtype), group=self.tp_ep_group
        ).to(hidden_states.dtype)

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the results as `[S, B, H]`."""
        return hidden_states.view(self.hidden_shape)
