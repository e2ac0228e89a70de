"""Builds the real model of any rank of a simulated world, with fake process groups and tensors without storage.

One process takes the role of one rank after another. Megatron computes its own device mesh for the whole world (16,384
ranks in a second), but only the groups that contain the rank are created; it builds that rank's layers on the meta
device.
Source: torch's fake process group, whose collectives do nothing.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megamm.common.device import Device
from megamm.config import RunConfig
from megamm.mcore import cpu, process_groups
from megamm.mcore.ownership import HeldBox
from megamm.model.layout import layers_per_chunk

META = Device(torch.device("meta"), "gloo")


@dataclass(frozen=True)
class GroupKind:
    """Groups of one kind over the whole world: ranks `[groups, members]`, and the axes that vary within a group."""

    is_of_experts: bool
    axes: tuple[str, ...]
    ranks: np.ndarray


@dataclass(frozen=True)
class RankModel:
    """Contents of one rank. layers: 1-based layer numbers of each chunk; coordinates: from Megatron's groups."""

    coordinates: tuple[int, int, int, int, int]
    """Rank in the tensor, context, data, pipeline and expert group."""
    layers: list[list[int]]
    dense_parameters: int
    expert_parameters: int
    boxes: list[HeldBox]
    members: dict[str, list[int]]

    @property
    def parameters(self) -> int:
        return self.dense_parameters + self.expert_parameters


class FakeWorld:
    """The simulated world. group_kinds: every kind of group of Megatron's mesh (filled by the first rank built)."""

    def __init__(self, config: RunConfig, vocabulary_size: int, world_size: int) -> None:
        assert not dist.is_initialized(), "a process in a job cannot take the role of other ranks"
        cpu.install()  # no device is used, not even on a machine with a GPU
        self.config, self.vocabulary_size, self.world_size = config, vocabulary_size, world_size
        self._fast_config = _quick_to_build(config, vocabulary_size)
        self.group_kinds: dict[tuple[Any, ...], GroupKind] = {}
        self._group_of_rank: dict[tuple[Any, ...], np.ndarray] = {}

    def rank(self, rank: int) -> RankModel:
        """Build the rank's chunks on the meta device and describe them."""
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=self.world_size)
        try:
            with self._only_groups_of(rank):
                built = process_groups.build(self.config.parallel, self.config.train.seed)
            from megamm.mcore import backbone

            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                chunks = backbone.build_chunks(self._fast_config, self.vocabulary_size, built, META)
                return self._describe(chunks, built)
        finally:
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()  # destroys all groups

    def _describe(self, chunks: list[Any], built: process_groups.ProcessGroups) -> RankModel:
        boxes = [box for chunk in chunks for box in _boxes(chunk, built)]
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        experts = sum(p.numel() for p in parameters if _is_expert(p))
        g = built.collection
        kinds = ("tp", "cp", "dp", "pp", "ep", "expt_tp", "expt_dp", "dp_cp")
        return RankModel(
            (g.tp.rank(), g.cp.rank(), g.dp.rank(), g.pp.rank(), g.ep.rank()),
            [[layer.layer_number for layer in chunk.decoder.layers] for chunk in chunks],
            sum(p.numel() for p in parameters) - experts,
            experts,
            boxes,
            {kind: dist.get_process_group_ranks(getattr(g, kind)) for kind in kinds},
        )

    @contextmanager
    def _only_groups_of(self, rank: int) -> Iterator[None]:
        """Make Megatron's mesh return only the groups that contain the rank, and create only fake groups.

        Otherwise every rank would create the groups of the whole world, a hundred thousand objects each time.

        Megatron loops over the groups of each kind, creates all of them, and keeps the one that contains its rank.
        Invariant: the group that it keeps is the one that it would keep in a real job, because the lists of ranks are
        Megatron's own (`get_ranks` below) and exactly one of a kind contains the rank. `groups_fault` of the dry run
        checks the latter. A kind of group is identified by the mesh's order and sizes and by its axes (`token`).
        """
        from megatron.core.parallel_state import RankGenerator

        get_ranks, new_group = RankGenerator.get_ranks, dist.new_group

        def own_group(generator: Any, token: str) -> list[list[int]]:
            key = (generator.order, tuple(generator.ordered_size), token)
            if key not in self.group_kinds:
                ranks = np.array(get_ranks(generator, token))
                self.group_kinds[key] = GroupKind(self._is_expert_mesh(generator), tuple(token.split("-")), ranks)
                group_of_rank = np.full(self.world_size, -1)
                group_of_rank[ranks] = np.arange(len(ranks))[:, None]
                self._group_of_rank[key] = group_of_rank
            return [self.group_kinds[key].ranks[self._group_of_rank[key][rank]].tolist()]

        # A group derived from these lists, such as the first and last stage for embeddings, may lack the rank.
        def fake_group(ranks: list[int], backend: str | None = None, **options: Any) -> Any:
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
        p = self.config.parallel
        return (generator.tp, generator.cp, generator.ep) != (p.tensor, p.context, 1)


def _quick_to_build(config: RunConfig, vocabulary_size: int) -> RunConfig:
    """Return a config of the same model with a fixed split of its layers and without weight initialisation.

    Initialising weights on the meta device has no effect, but would take half of the time. The accumulation of
    gradients does not change any number counted here, and its fused form may need packages that only the job's machines
    have.
    """

    def leave(_: torch.Tensor) -> None: ...

    methods = dict.fromkeys(("init_method", "output_layer_init_method", "embedding_init_method"), leave)
    passed_on = config.model.megatron | methods | {"gradient_accumulation_fusion": False}
    model = config.model.model_copy(update={"megatron": passed_on})
    split = {"layers_per_chunk": layers_per_chunk(config, vocabulary_size)}
    parallel = config.parallel.model_copy(update=split)
    return config.model_copy(update={"model": model, "parallel": parallel})


def _is_expert(parameter: torch.Tensor) -> bool:
    """Whether Megatron reduces the parameter's gradient over the expert-data group."""
    return not getattr(parameter, "allreduce", True)


def _boxes(chunk: Any, built: process_groups.ProcessGroups) -> Iterator[HeldBox]:
    """Yield the boxes that a checkpoint of this chunk stores, with the number of copies in gradient reduction."""
    from megamm.mcore import shard_specs  # after cpu.install

    parameters = {id(p) for p in chunk.parameters()}
    for spec in shard_specs.of(chunk, built):
        is_parameter = id(spec.tensor) in parameters
        yield HeldBox(
            spec.key,
            spec.shape,
            spec.offset,
            spec.size,
            spec.is_main,
            is_parameter and _is_expert(spec.tensor),
            is_parameter,
            _copies(spec.tensor if is_parameter else None, built.collection),
        )


def _copies(parameter: torch.Tensor | None, collection: Any) -> int:
    """Return the number of ranks whose gradients Megatron sums, by the parameter's attributes; None: a buffer."""
    is_sharded = getattr(parameter, "tensor_model_parallel", False)
    if parameter is not None and _is_expert(parameter):
        return collection.expt_dp.size() * (1 if is_sharded else collection.expt_tp.size())
    stages = collection.embd.size() if getattr(parameter, "shared_embedding", False) else 1
    return collection.dp_cp.size() * (1 if is_sharded else collection.tp.size()) * stages
