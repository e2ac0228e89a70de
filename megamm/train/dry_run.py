"""Dry run: describes the layout and each stage's parameters and memory, and checks consistency, without starting a run.

It builds the real model of some ranks on the meta device (mcore/fake_world.py), enough to cover every shard of every
weight: all of tensor x pipeline and of expert x expert tensor x pipeline, and the last rank of every stage. It checks
the groups of the whole world, the pipeline split, the tokens of a row and the ownership of every parameter element.
Input: a resolved config, a vocabulary size, a world size. Output: a text, and the first inconsistency if there is one.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megamm.common.errors import UserError
from megamm.config import RunConfig
from megamm.convert import exportable
from megamm.mcore import ownership
from megamm.model import layout
from megamm.model.flops import parameter_count

if TYPE_CHECKING:
    from megamm.data.pipeline.run_data import RunData
    from megamm.mcore.fake_groups import GroupKind
    from megamm.mcore.fake_world import RankModel


class RankCoordinates(NamedTuple):
    """The index of a rank in each of its groups."""

    tensor: int
    context: int
    data: int
    pipeline: int
    expert: int


class Grid:
    """Megatron's rank order, fastest first: tensor, context, data, pipeline; experts: tensor, expert, data, pipeline.

    `dense` and `expert` have for each axis (by Megatron's name) the coordinate of every rank, int64 `[world]`.
    """

    def __init__(self, config: RunConfig, world_size: int) -> None:
        p = config.parallel
        self.world_size, self.stage = world_size, world_size // p.pipeline
        self.expert_ranks = p.expert_tensor * p.expert
        self.data = config.data_parallel(world_size)
        self.dense_replicas, self.expert_replicas = self.data * p.context, self.stage // self.expert_ranks
        self.tensor = p.tensor
        self.dense = _coordinates(world_size, {"tp": p.tensor, "cp": p.context, "dp": self.data, "pp": p.pipeline})
        sizes = {"tp": p.expert_tensor, "ep": p.expert, "dp": self.expert_replicas, "pp": p.pipeline}
        self.expert = _coordinates(world_size, sizes)

    def coordinates(self, rank: int) -> RankCoordinates:
        tensor, context, data, pipeline = (int(self.dense[axis][rank]) for axis in ("tp", "cp", "dp", "pp"))
        return RankCoordinates(tensor, context, data, pipeline, int(self.expert["ep"][rank]))

    def built_ranks(self) -> list[int]:
        """Return ranks that together hold every shard, then the last rank of each stage; see `first_with`."""
        # Within a stage, dense shards repeat every `tensor` ranks and expert shards every `expert_ranks`.
        each = max(self.tensor, self.expert_ranks)
        starts = range(0, self.world_size, self.stage)
        firsts = [start + i for start in starts for i in range(each)]
        return firsts + [start + self.stage - 1 for start in starts if each < self.stage]

    def first_with(self, rank: int, is_expert: bool) -> int:
        """Return the lowest rank that holds the same dense (or expert) shards."""
        start = rank - rank % self.stage
        return start + (rank - start) % (self.expert_ranks if is_expert else self.tensor)


def _coordinates(world_size: int, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The digits of every rank in the mixed radix of these sizes, the first axis varying fastest."""
    rest, found = np.arange(world_size), {}
    for axis, size in sizes.items():
        found[axis], rest = rest % size, rest // size
    return found


def groups_fault(families: Sequence["GroupKind"], grid: Grid) -> str | None:
    """Check that Megatron's groups of each kind contain every rank once and vary only along their own axes."""
    for family in families:
        name = f"{'expert ' if family.is_of_experts else ''}{'-'.join(family.axes)} groups"
        coordinates = grid.expert if family.is_of_experts else grid.dense
        if not np.array_equal(np.sort(family.ranks, axis=None), np.arange(grid.world_size)):
            return f"{name} do not contain every rank once"
        for axis, of_rank in coordinates.items():
            # Coordinates along the axis, [groups, members]: one value per group unless the kind varies along it.
            inside = of_rank[family.ranks]
            if axis not in family.axes and (inside != inside[:, :1]).any():
                row = int(np.argwhere(inside != inside[:, :1])[0][0])
                return f"the {name} mix ranks of several {axis} coordinates: {family.ranks[row][:4].tolist()}..."
        # With no foreign axis in it, a group of this size contains every combination of its own axes.
        count = np.prod([of_rank.max() + 1 for axis, of_rank in coordinates.items() if axis in family.axes], dtype=int)
        if family.ranks.shape[1] != count:
            return f"the {name} have {family.ranks.shape[1]} ranks, not {count}"
    return None


def stages_fault(models: Mapping[int, "RankModel"], grid: Grid, split: Sequence[int]) -> str | None:
    """Check that every rank has the coordinates and layers given by the layout; split: number of layers per chunk."""
    ends = np.cumsum([0, *split])
    stages = int(grid.dense["pp"][-1]) + 1
    for rank, model in models.items():
        expected = grid.coordinates(rank)
        if model.coordinates != expected:
            return f"rank {rank} is {model.coordinates} in Megatron's groups (tensor, context, data, pipeline, expert)"
        chunks = range(expected.pipeline, len(split), stages)
        wanted = [list(range(int(ends[chunk]) + 1, int(ends[chunk + 1]) + 1)) for chunk in chunks]
        if model.layers != wanted:
            return f"rank {rank} builds the layers {model.layers}, not {wanted}"
    return None


def shards_fault(models: Mapping[int, "RankModel"], grid: Grid) -> str | None:
    """Check that every element has one owner and as many copies as its gradient reduction sums, equal on replicas."""
    held = []
    for rank, model in models.items():
        described = sum(piece.size for piece in model.boxes if piece.is_parameter)
        if described != model.parameters:
            return f"rank {rank} holds {model.parameters} parameters, but a checkpoint would have {described} of them"
        for is_expert in (False, True):
            pieces = [piece for piece in model.boxes if piece.is_expert == is_expert]
            # Elements are counted on the first rank that holds them; its replicas must hold the same boxes.
            first = grid.first_with(rank, is_expert)
            if first == rank:
                ranks = grid.expert_replicas if is_expert else grid.dense_replicas
                held += [(piece, ranks) for piece in pieces]
                continue
            others = [piece for piece in models[first].boxes if piece.is_expert == is_expert]
            for piece, other in zip(pieces, others, strict=True):
                if piece != other._replace(is_owner=False):
                    return f"tensor {piece.key}: rank {rank} has {piece}, rank {first} has {other}"
    return ownership.fault(held)


def tokens_fault(config: RunConfig) -> str | None:
    """Check that every token of a row is on one context rank, in equal parts for sequence parallelism."""
    import torch

    from megamm.mcore.context import local_index

    p, length = config.parallel, config.data.seq_length
    parts = [local_index(length, rank, p.context, torch.device("cpu")) for rank in range(p.context)]
    if not torch.equal(torch.cat(parts).sort().values, torch.arange(length)):
        return f"the {length} tokens of a row are not each on one of {p.context} context ranks"
    if p.sequence and any(len(part) % p.tensor for part in parts):
        return f"{len(parts[0])} tokens do not split over {p.tensor} tensor ranks"
    return None


def size_fault(config: RunConfig, vocabulary_size: int, models: Mapping[int, "RankModel"]) -> str | None:
    """Check that the built tensors add up to the model in the config, including padding of the vocabulary."""
    p = config.parallel
    padded = layout.padded_vocabulary(vocabulary_size, p.tensor)
    wanted, built = parameter_count(config.model, padded), sum(_tensor_sizes(models).values())
    return None if built == wanted else f"the ranks hold a model of {built:,} parameters, not {wanted:,}"


def _tensor_sizes(models: Mapping[int, "RankModel"]) -> dict[str, int]:
    return {p.key: math.prod(p.shape) for m in models.values() for p in m.boxes if p.is_parameter}


def report(
    config: RunConfig, world_size: int, vocabulary_size: int | None = None, rank: int | None = None
) -> tuple[str, str | None]:
    """Return the text of `megamm train CONFIG --dry-run`, and what is inconsistent (then the run must not start).

    The default vocabulary size comes from the data, and `init_from` is checked against it. rank: a rank whose
    coordinates are printed too. UserError for an invalid layout or start, missing data, a run that cannot be exported
    although the config requires it, and a rank outside the world.
    """
    layout.check(config, world_size)
    if rank is not None and not 0 <= rank < world_size:
        raise UserError(f"rank {rank} is not one of {world_size} ranks", remedy=f"give --rank 0 to {world_size - 1}")
    vocabulary = origin = None
    long_samples: list[str] = []
    if vocabulary_size is None:
        from megamm.init_from.initialize import check as check_start

        data = _open_data(config)
        vocabulary, long_samples = data.vocabulary, [str(found) for found in data.long_samples if found]
        origin = check_start(config, vocabulary)
        vocabulary_size = vocabulary.size
    exported = exportable.check(config, vocabulary, origin)
    text, found = describe(config, vocabulary_size, world_size, rank)
    return "\n".join([text, *long_samples, exported]), found


def vocabulary_size_of(config: RunConfig) -> int:
    """Return the vocabulary size that follows from the run's data. UserError for missing data."""
    return _open_data(config).vocabulary.size


def _open_data(config: RunConfig) -> "RunData":
    from megamm.data.pipeline.run_data import open_run_data

    try:
        return open_run_data(config)
    except UserError as error:
        remedy = f"{error.remedy}, or add --vocabulary-size to the dry run"
        raise UserError(error.what, where=error.where, remedy=remedy) from None


def describe(
    config: RunConfig, vocabulary_size: int, world_size: int, rank: int | None = None
) -> tuple[str, str | None]:
    """Describe a layout that layout.check accepts, for a known vocabulary. Return lines and the first fault, if any.

    It cannot be called within a job.
    """
    from megamm.mcore.fake_world import FakeWorld

    start = time.monotonic()
    grid, world = Grid(config, world_size), FakeWorld(config, vocabulary_size, world_size)
    models = {r: world.rank(r) for r in dict.fromkeys(grid.built_ranks() + ([] if rank is None else [rank]))}
    found = (
        groups_fault(list(world.mesh.kinds.values()), grid)
        or stages_fault(models, grid, layout.layers_per_chunk(config, vocabulary_size))
        or shards_fault(models, grid)
        or size_fault(config, vocabulary_size, models)
        or tokens_fault(config)
    )
    lines = _layout_lines(config, grid, vocabulary_size) + _stage_lines(config, grid, models)
    lines += [] if rank is None else _rank_lines(config, models[rank], rank)
    lines.append(
        f"built {len(models):,} ranks without storage, with every shard of tensor x pipeline x expert; "
        f"the other {world_size - len(models):,} repeat their coordinates"
    )
    if not found:
        experts = f", of an expert by {grid.expert_replicas:,}" if config.model.moe.num_experts else ""
        lines.append(
            f"consistent: {len(_tensor_sizes(models))} tensors (layers stacked), each element owned once over "
            f"tensor x pipeline x expert, by {grid.dense_replicas:,} replicas{experts}; "
            f"{len(world.mesh.kinds)} kinds of groups, each with every rank once"
        )
    return "\n".join([*lines, f"took {time.monotonic() - start:.1f} s"]), found


def _layout_lines(config: RunConfig, grid: Grid, vocabulary_size: int) -> list[str]:
    p, t, s, data = config.parallel, config.train, config.data.seq_length, grid.data
    lines = [f"world size {grid.world_size} = tensor {p.tensor} x pipeline {p.pipeline} x data {data}"]
    lines[0] += f" x context {p.context}" + (", sequence parallel" if p.sequence else "")
    if config.model.moe.num_experts:
        lines.append(
            f"experts    {grid.world_size} = expert tensor {p.expert_tensor} x expert {p.expert} x "
            f"pipeline {p.pipeline} x data {grid.expert_replicas}"
        )
    return [
        *lines,
        f"model {parameter_count(config.model, vocabulary_size):,} parameters, vocabulary {vocabulary_size:,}",
        f"step {t.global_batch_size} rows x {s} = {t.global_batch_size * s:,} tokens in "
        f"{t.global_batch_size // (t.micro_batch_size * data)} microbatches of {t.micro_batch_size} rows "
        "on each data rank; "
        f"{t.steps:,} steps = {t.steps * t.global_batch_size * s:,} tokens",
    ]


def _stage_lines(config: RunConfig, grid: Grid, models: Mapping[int, "RankModel"]) -> list[str]:
    """Return one line per stage: its ranks do not differ in the numbers shown."""
    weight, gradient, state = config.bytes_per_parameter
    lines = ["stage  ranks  parameters of each  weights  gradients  optimizer (ZeRO-1)  GiB of each  layers"]
    for start in range(0, grid.world_size, grid.stage):
        model = models[start]
        sharded = model.dense_parameters / grid.dense_replicas + model.expert_parameters / grid.expert_replicas
        gib = [n / 2**30 for n in (model.parameters * weight, model.parameters * gradient, sharded * state)]
        layers = " ".join(_span(chunk) for chunk in model.layers)
        columns = "{:>7.2f}  {:>9.2f}  {:>18.2f}  {:>11.2f}".format(*gib, sum(gib))
        lines.append(f"{start // grid.stage:>5}  {grid.stage:>5}  {model.parameters:>18,}  {columns}  {layers}")
    return lines


def _span(layers: Sequence[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def _rank_lines(config: RunConfig, model: "RankModel", rank: int) -> list[str]:
    coordinates = zip(("tensor", "context", "data", "pipeline", "expert"), model.coordinates, strict=True)
    lines = [f"rank {rank}: " + ", ".join(f"{axis} {i}" for axis, i in coordinates)]
    lines[0] += "; layers " + " ".join(_span(chunk) for chunk in model.layers)
    for kind, members in model.members.items():
        if kind in ("ep", "expt_tp", "expt_dp") and not config.model.moe.num_experts:
            continue
        lines.append(f"  {kind:>7} group: {len(members):>6} ranks, {members[0]} to {members[-1]}")
    return lines
