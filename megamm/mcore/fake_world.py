"""Builds the real model of any rank of a simulated world, with fake process groups and tensors without storage.

One process takes the role of one rank after another. Megatron computes its own device mesh for the whole world (16,384
ranks in a second), but only the groups that contain the rank are created (fake_groups.py); it builds that rank's layers
on the meta device.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megamm.common.device import Device
from megamm.config import RunConfig
from megamm.mcore import cpu, process_groups
from megamm.mcore.fake_groups import FakeMesh
from megamm.mcore.ownership import HeldBox
from megamm.model.layout import layers_per_chunk

META = Device(torch.device("meta"), "gloo")


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
    """The simulated world; `mesh.kinds` are its kinds of groups, once a rank is built."""

    def __init__(self, config: RunConfig, vocabulary_size: int, world_size: int) -> None:
        cpu.install()  # no device is used, not even on a machine with a GPU
        self.vocabulary_size, self.mesh = vocabulary_size, FakeMesh(config, world_size)
        self._fast_config = _quick_to_build(config, vocabulary_size)

    def rank(self, rank: int) -> RankModel:
        """Build the rank's chunks on the meta device and describe them."""
        with self.mesh.groups_of(rank) as built:
            from megamm.mcore import backbone

            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                chunks = backbone.build_chunks(self._fast_config, self.vocabulary_size, built, META)
                return self._describe(chunks, built)

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


def _quick_to_build(config: RunConfig, vocabulary_size: int) -> RunConfig:
    """Return a config of the same model with a fixed split of its layers and without weight initialisation.

    Initialising weights on the meta device has no effect, but would take half of the time. The accumulation of
    gradients does not change any number counted here, and its fused form may need packages that only the job's machines
    have; so may the attention kernel, which has no parameters.
    """

    def leave(_: torch.Tensor) -> None: ...

    methods = dict.fromkeys(("init_method", "output_layer_init_method", "embedding_init_method"), leave)
    passed_on = config.model.megatron | methods | {"gradient_accumulation_fusion": False}
    model = config.model.model_copy(update={"megatron": passed_on})
    split = {"layers_per_chunk": layers_per_chunk(config, vocabulary_size)}
    parallel = config.parallel.model_copy(update=split)
    train = config.train.model_copy(update={"attention": "auto"})
    return config.model_copy(update={"model": model, "parallel": parallel, "train": train})


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
