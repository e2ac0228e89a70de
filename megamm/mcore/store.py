"""Describes a rank's share of model and optimizer tensors as blocks, which checkpoints save and load without gathering.

Every tensor is stored in the shape of the whole model, so a folder loads at any TP x PP x EP x CP x DP. A weight is
stored as `KEY`, its main copy and Adam's moments as `optimizer.state.{param,exp_avg,exp_avg_sq}.KEY`. Every
data-parallel rank stores those elements of a weight and its state that its part of the distributed optimizer (ZeRO-1)
updates: nothing is gathered, the shares are equal, and every element is stored once. The optimizer's step count and
hyperparameters are not stored here (the step is in the checkpoint's state, the rest in the config), so a dense
optimizer's state can be loaded into an expert-parallel one.

`EngineShards` describes an engine with Megatron's shards (native). `ParameterSpecs` is for an engine that shards by
itself (DeepSpeed): each whole parameter is saved by one rank, with the same names, shapes and formats.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import nn

from megamm import __version__
from megamm.checkpoint import code_version, index, reader
from megamm.checkpoint.tensor_shards import MAIN, MOMENTS, STATE, Shape, TensorShard
from megamm.mcore import compat, optimizer, shard_specs
from megamm.mcore.backbone import Backbone
from megamm.mcore.process_groups import ProcessGroups
from megamm.mcore.shard_specs import ShardSpec

MODEL = "model"
"""Kind of a parameter's value in the run's precision; MAIN and MOMENTS are float32."""

WholeTensors = dict[str, dict[str, torch.Tensor]]
"""Parameter or buffer name -> kind (MODEL, MAIN, one of MOMENTS) -> whole tensor."""


@dataclass(frozen=True, eq=False)
class OptimizerShard:
    """The part of one parameter that this rank's optimizer updates: elements from `first` on, flattened.

    kinds: main copy (for a float32 weight the weight itself) and moments, float32 `[elements]`.
    """

    parameter: torch.Tensor
    first: int
    kinds: dict[str, torch.Tensor]

    @property
    def weight(self) -> torch.Tensor:
        """The elements in the model's compute precision, `[elements]`."""
        return self.parameter.detach().view(-1)[self.first : self.first + len(self.kinds[MAIN])]


def _owned(optim: Any) -> Iterator[OptimizerShard]:
    """Yield this rank's part of every parameter that it updates at least partly."""
    for part in optimizer.parts(optim):
        # Gradient buffers, by dtype, by bucket: which elements of each parameter this rank's optimizer updates.
        for ranges in part.gbuf_ranges:
            for buckets in ranges.values():
                for parameter, ranges_of_it in (item for bucket in buckets for item in bucket["param_map"].items()):
                    group, order = part.model_param_group_index_map[parameter]
                    # The optimizer holds the main copy of just these elements; its state is stored under that tensor.
                    main = part.optimizer.param_groups[group]["params"][order]
                    state = part.optimizer.state[main]
                    yield OptimizerShard(
                        parameter, ranges_of_it["param"].start, {MAIN: main} | {m: state[m] for m in MOMENTS}
                    )


class EngineShards:
    """Blocks of an engine's tensors. Create it after the engine: it refers to the live tensors, which must not move."""

    def __init__(self, chunks: Sequence[DistributedDataParallel], optim: Any | None, groups: ProcessGroups) -> None:
        """optim None: only weights."""
        self.specs = [spec for chunk in chunks for spec in shard_specs.of(chunk.module, groups)]
        self.owned = list(_owned(optim)) if optim is not None else []
        self.updated = {
            id(p) for o in (optimizer.parts(optim) if optim is not None else []) for b in o.buffers for p in b.params
        }

    def to_save(self) -> list[TensorShard]:
        """Return this rank's share of the model; the shares of all ranks have every element exactly once."""
        by_tensor = self._by_tensor()
        blocks = []
        for owned in self.owned:
            # Copies on data-parallel ranks are divided among them; on tensor ranks and stages only the first is stored.
            for spec in (p for p in by_tensor[id(owned.parameter)] if not any(p.replica[:-1])):
                blocks += spec.blocks(owned.weight, owned.first)
                for kind, tensor in owned.kinds.items():
                    blocks += spec.blocks(tensor, owned.first, f"{STATE}{kind}.")
        rest = [spec for spec in self.specs if id(spec.tensor) not in self.updated and spec.is_main]
        return blocks + [spec.block(spec.tensor) for spec in rest]

    def to_load(self) -> list[TensorShard]:
        """Return all that this rank uses: its whole weights, and the optimizer state that it owns."""
        by_tensor = self._by_tensor()
        blocks = [spec.block(spec.tensor) for spec in self.specs]
        for owned in self.owned:
            for spec in by_tensor[id(owned.parameter)]:
                for kind, tensor in owned.kinds.items():
                    blocks += spec.blocks(tensor, owned.first, f"{STATE}{kind}.")
        return blocks

    def to_start(self) -> list[TensorShard]:
        """Return its whole weights, and the main copies that it owns, unless they are the weights themselves."""
        by_tensor = self._by_tensor()
        blocks = [spec.block(spec.tensor) for spec in self.specs]
        for owned in self.owned:
            if owned.kinds[MAIN].dtype != owned.parameter.dtype:
                for spec in by_tensor[id(owned.parameter)]:
                    blocks += spec.blocks(owned.kinds[MAIN], owned.first, f"{STATE}{MAIN}.")
        return blocks

    def whole(self, groups: ProcessGroups) -> tuple[dict[str, Shape], set[str]]:
        """Return name and shape of every tensor of the model, and the names of those padded along the vocabulary."""
        stages: list[Any] = [None] * groups.collection.pp.size()
        # The ranks of a stage hold parts of the same tensors.
        own = {spec.key: (spec.shape, spec.grows) for spec in self.specs}
        dist.all_gather_object(stages, own, group=groups.collection.pp)
        found = {key: described for stage in stages for key, described in stage.items()}
        return {key: shape for key, (shape, _) in found.items()}, {key for key, (_, grows) in found.items() if grows}

    def _by_tensor(self) -> dict[int, list[ShardSpec]]:
        found: dict[int, list[ShardSpec]] = {}
        for spec in self.specs:
            found.setdefault(id(spec.tensor), []).append(spec)
        return found


def load(
    folder: Path, chunks: Sequence[DistributedDataParallel], optim: Any | None, groups: ProcessGroups, step: int
) -> None:
    """Read this rank's share of the model and of the optimizer's state after `step` steps."""
    if optim is not None:
        for part in optimizer.parts(optim):
            compat.prime_adam(part, step)
    reader.load(folder, EngineShards(chunks, optim, groups).to_load())


def load_weights(folder: Path, models: Sequence[nn.Module], groups: ProcessGroups) -> None:
    """Read this rank's share of the weights into a model that is not wrapped and has no gradient buffers."""
    reader.load(folder, [spec.block(spec.tensor) for model in models for spec in shard_specs.of(model, groups)])


def files_to_load(
    folder: Path, chunks: Sequence[DistributedDataParallel], optim: Any, groups: ProcessGroups
) -> set[str]:
    """Return the names of the files that `load` reads."""
    stored, blocks = index.read(folder), EngineShards(chunks, optim, groups).to_load()
    reader.check(folder, stored, blocks)
    return reader.needed_files(stored, blocks)


def versions() -> dict[str, str]:
    """Return the software versions to record in a checkpoint."""
    own = {"megamm": __version__, "code": code_version()}
    return own | {"torch": torch.__version__, "megatron-core": megatron.core.__version__}


@dataclass(frozen=True)
class ParameterSpecs:
    """Shard specs of a model's parameters and persistent buffers, by their name in the module.

    Create it while the model is still whole on every rank: it keeps Megatron's description of every tensor, without
    data, which is lost when an engine shards the parameters.
    """

    by_name: Mapping[str, list[ShardSpec]]
    shapes: Mapping[str, torch.Size]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, model: Backbone, groups: ProcessGroups) -> "ParameterSpecs":
        """Create the specs of a model that is whole on this rank."""
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        name_of = {id(tensor): name for name, tensor in tensors.items()}
        found: dict[str, list[ShardSpec]] = {}
        for spec in shard_specs.of(model, groups):
            without_data = replace(spec, tensor=torch.empty_like(spec.tensor, device="meta"))
            found.setdefault(name_of[id(spec.tensor)], []).append(without_data)
        return cls(found, {n: tensors[n].shape for n in found}, {n: tensors[n].dtype for n in found})

    def owners(self, ranks: int) -> dict[str, int]:
        """Return the rank that keeps and writes each tensor, in shares of about equal size; the same on every rank."""
        load, owner = [0] * ranks, {}
        for name in sorted(self.by_name, key=lambda n: (-self.shapes[n].numel(), n)):
            owner[name] = load.index(min(load))
            load[owner[name]] += self.shapes[name].numel()
        return owner

    def blocks(self, tensors: WholeTensors) -> list[TensorShard]:
        """Return the blocks of whole tensors."""
        return [
            spec.block(data, "" if kind == MODEL else f"{STATE}{kind}.")
            for name, kinds in tensors.items()
            for kind, data in kinds.items()
            for spec in self.by_name[name]
        ]


def load_whole(
    read: Callable[[Sequence[TensorShard]], None],
    specs: ParameterSpecs,
    owned: Iterable[str],
    kinds: Mapping[str, Iterable[str]],
) -> WholeTensors:
    """Load the tensors that this rank owns, on the CPU: the `kinds` of each name; `read` fills their blocks."""
    empty = {
        name: {
            kind: torch.empty(specs.shapes[name], dtype=specs.dtypes[name] if kind == MODEL else torch.float32)
            for kind in kinds[name]
        }
        for name in owned
    }
    read(specs.blocks(empty))
    return empty
