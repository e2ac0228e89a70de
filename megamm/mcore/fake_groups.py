"""Process groups of one rank of a simulated world of any size, in one process that communicates with no other.

Source: torch's fake process group, whose collectives do nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megamm.config import RunConfig
from megamm.mcore import process_groups


@dataclass(frozen=True)
class GroupKind:
    """Groups of one kind over the whole world: ranks `[groups, members]`, and the axes that vary within a group."""

    is_of_experts: bool
    axes: tuple[str, ...]
    ranks: np.ndarray


class FakeMesh:
    """Megatron's device mesh of a world. kinds: every kind of group of the mesh (filled by the first rank built)."""

    def __init__(self, config: RunConfig, world_size: int) -> None:
        assert not dist.is_initialized(), "a process in a job cannot take the role of other ranks"
        self.parallel, self.seed, self.world_size = config.parallel, config.train.seed, world_size
        self.kinds: dict[tuple[Any, ...], GroupKind] = {}
        self._group_of_rank: dict[tuple[Any, ...], np.ndarray] = {}

    @contextmanager
    def groups_of(self, rank: int, for_optimizer: bool = False) -> Iterator[process_groups.ProcessGroups]:
        """Take the role of a rank: the process groups that contain it, until the end of the block.

        for_optimizer: with the group of all ranks that share an optimizer, which takes the time of a large world.
        """
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=self.world_size)
        try:
            with self._only_groups_of(rank, for_optimizer):
                built = process_groups.build(self.parallel, self.seed)
            yield built
        finally:
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()  # destroys all groups

    @contextmanager
    def _only_groups_of(self, rank: int, for_optimizer: bool) -> Iterator[None]:
        """Make Megatron's mesh return only the groups that contain the rank, and create only fake groups.

        Otherwise every rank would create the groups of the whole world, a hundred thousand objects each time.

        Megatron loops over the groups of each kind, creates all of them, and keeps the one that contains its rank.
        Invariant: the group that it keeps is the one that it would keep in a real job, because the lists of ranks are
        Megatron's own (`get_ranks` below) and exactly one of a kind contains the rank. `groups_fault` of the dry run
        checks the latter. A kind of group is identified by the mesh's order and sizes and by its axes (`token`).

        The optimizer's group is the only one that joins several groups of a kind: Megatron asks for that kind twice.
        """
        from megatron.core.parallel_state import RankGenerator

        get_ranks, new_group = RankGenerator.get_ranks, dist.new_group

        asked = set[tuple[Any, ...]]()

        def own_group(generator: Any, token: str) -> list[list[int]]:
            key = (generator.order, tuple(generator.ordered_size), token)
            if key not in self.kinds:
                ranks = np.array(get_ranks(generator, token))
                self.kinds[key] = GroupKind(self._is_expert_mesh(generator), tuple(token.split("-")), ranks)
                group_of_rank = np.full(self.world_size, -1)
                group_of_rank[ranks] = np.arange(len(ranks))[:, None]
                self._group_of_rank[key] = group_of_rank
            if for_optimizer and token == "tp-ep-pp" and key in asked:
                return self.kinds[key].ranks.tolist()
            asked.add(key)
            return [self.kinds[key].ranks[self._group_of_rank[key][rank]].tolist()]

        # A group derived from these lists, such as the first and last stage for embeddings, may lack the rank.
        def fake_group(ranks: list[int], backend: str | None = None, device_id: Any = None, **options: Any) -> Any:
            return new_group(ranks, backend="fake", **options) if rank in ranks else dist.GroupMember.NON_GROUP_MEMBER

        # Both names are read at every call, so replacing the attributes reaches all of Megatron.
        RankGenerator.get_ranks = own_group
        dist.new_group = fake_group  # type: ignore[assignment]
        try:
            yield
        finally:
            RankGenerator.get_ranks, dist.new_group = get_ranks, new_group

    def _is_expert_mesh(self, generator: Any) -> bool:
        """Whether it is the mesh (tensor, expert, data, ...) of experts, not (tensor, context, data, pipeline)."""
        p = self.parallel
        return (generator.tp, generator.cp, generator.ep) != (p.tensor, p.context, 1)
