"""What is predicted: a model, a layout, a batch, the data's document lengths and the techniques of the program.

A `Job` of this product comes from its config (`of_config`). Published runs of other programs become jobs with another
`Software`, so that the same formulas are checked against them (tests/lib/published_speeds.py).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

from megamm.config import ModelConfig, ParallelConfig, RunConfig
from megamm.model import layout

ATTENTION_BLOCK = 128
"""Queries and keys of a block of the attention kernels: a block with one visible pair is computed whole."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Lengths of the documents in a sample of packed rows. Equal only to itself: it is part of a key of many jobs."""

    lengths: tuple[int, ...]
    rows: int
    are_measured: bool
    """Whether they come from the run's data; otherwise every row is one document."""

    @classmethod
    def whole_rows(cls, seq_length: int) -> "Documents":
        return cls((seq_length,), 1, False)

    @cache  # noqa: B019  there is one sample in a plan
    def pairs(self, window: int) -> float:
        """Mean number of pairs of a query and a key that a kernel computes in a row; window 0: the whole document."""
        total = 0.0
        for n in self.lengths:
            w = min(window or n, n)
            # n - w queries see w keys, the first w see half of it; half a block more at each end of a row of blocks.
            total += w * (n - w) + w * w / 2 + n * min(ATTENTION_BLOCK, n) / 2
        return total / self.rows

    @property
    def mean_length(self) -> float:
        return sum(self.lengths) / len(self.lengths)


@dataclass(frozen=True)
class Software:
    """Techniques that change the time of the same computation. The defaults are those of this package on a GPU."""

    precision: Literal["16-bit", "fp8"] = "16-bit"
    """Of the linear layers' products; fp8 also casts their inputs."""
    attention: Literal["flex", "flash", "unfused"] = "flex"
    """Kernel of attention; unfused: products with scores in memory, softmax and dropout between them."""
    elementwise: Literal["torch", "fused", "2021"] = "torch"
    """torch: norm and SwiGLU fused, RoPE and copies by torch. fused: also these. 2021: LayerNorm, GELU, dropout."""
    is_gated: bool = True
    """Whether an MLP has a gate: three matrices instead of two."""
    fused_weight_gradients: bool = False
    """Products add weight gradients to their float32 buffer; otherwise a pass over them follows."""
    fused_loss: bool = True
    """The output layer and the loss run in chunks of rows that add to a float32 gradient."""
    tensor_overlap: Literal["none", "backward", "all"] = "none"
    """Tensor-parallel collectives that run beside products. backward: those that have an independent product."""
    grouped_experts: bool = False
    """The products of a rank's experts are one kernel; otherwise the host starts one expert after another."""
    deduplicated_dispatch: bool = False
    """A token crosses the network once for each node of its experts, not once for each expert."""
    expert_overlap: bool = False
    """The exchange of tokens runs beside the computation of another microbatch."""
    context_overlap: bool = False
    """Keys and values move beside attention."""
    pipeline_overlap: bool = True
    """Sends between stages run beside computation."""
    gradient_overlap: bool = True
    parameter_overlap: bool = False
    """Updated parameters are gathered beside the next forward pass."""
    sharded_optimizer: bool = True
    gradient_bytes: float = 4.0
    """Of one gradient element in the reduction over data-parallel ranks."""
    sharded_parameters: bool = False
    """FSDP: layers are gathered before use, in both passes."""
    recomputed_share: float = -1.0
    """Share of the layers that are fully recomputed; negative: as the job's recompute says."""


PRODUCT = Software()


class LayerKind(NamedTuple):
    """What tells the layers of a model apart in time and memory."""

    window: int
    """0: attention over whole documents."""
    has_experts: bool


def kinds_of_layers(m: ModelConfig) -> tuple[LayerKind, ...]:
    """Return the kind of every layer of a model."""
    first = m.moe.dense_layers if m.moe.num_experts else m.num_layers
    return _kinds_of_layers(m.num_layers, m.window.size, tuple(m.window.full_layers), first)


@lru_cache(maxsize=64)
def _kinds_of_layers(layers: int, window: int, full: tuple[int, ...], first_expert: int) -> tuple[LayerKind, ...]:
    return tuple(LayerKind(0 if n in full else window, n >= first_expert) for n in range(layers))


@dataclass(frozen=True)
class Job:
    """A training job. split: layers of each pipeline chunk in model order; batch sizes in rows."""

    model: ModelConfig
    parallel: ParallelConfig
    vocabulary_size: int
    seq_length: int
    global_batch_size: int
    micro_batch_size: int
    recompute: Literal["none", "selective", "full"]
    world_size: int
    split: tuple[int, ...]
    documents: Documents
    software: Software = PRODUCT
    gpus_per_node: int = 8

    @cached_property
    def data(self) -> int:
        """Data-parallel ranks."""
        p = self.parallel
        return self.world_size // (p.tensor * p.pipeline * p.context)

    @cached_property
    def microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.data)

    @cached_property
    def tokens(self) -> int:
        """Tokens of a microbatch on one context rank."""
        return self.micro_batch_size * self.seq_length // self.parallel.context

    @cached_property
    def scattered_tokens(self) -> float:
        """Tokens of a rank between its products: a part of `tokens` with sequence parallelism."""
        return self.tokens / (self.parallel.tensor if self.parallel.sequence else 1)

    @cached_property
    def last_kind(self) -> LayerKind:
        """The kind of the last layer, which a multi-token-prediction module repeats."""
        return kinds_of_layers(self.model)[-1]

    @cached_property
    def kinds_of_chunks(self) -> Sequence[Mapping[LayerKind, int]]:
        """The layers of each pipeline chunk in model order, counted by kind."""
        return _kinds_of_chunks(self.split, kinds_of_layers(self.model))

    @cached_property
    def kinds(self) -> list[LayerKind]:
        """The kinds of layers in the model."""
        return list(dict.fromkeys(kind for chunk in self.kinds_of_chunks for kind in chunk))

    def chunks_of(self, stage: int) -> Sequence[Mapping[LayerKind, int]]:
        """Return the layers of each chunk of a pipeline stage."""
        return self.kinds_of_chunks[stage :: self.parallel.pipeline]


@lru_cache(maxsize=1024)
def _kinds_of_chunks(split: tuple[int, ...], kinds: tuple[LayerKind, ...]) -> Sequence[Mapping[LayerKind, int]]:
    starts = [0, *accumulate(split)]
    return [Counter(kinds[start:stop]) for start, stop in pairwise(starts)]


def of_config(
    config: RunConfig,
    world_size: int,
    vocabulary_size: int,
    documents: Documents,
    split: Sequence[int] | None = None,
    gpus_per_node: int = 8,
) -> Job:
    """Return the job of a config that layout.check accepts; split: its layers per chunk if known already."""
    return Job(
        model=config.model,
        parallel=config.parallel,
        vocabulary_size=vocabulary_size,
        seq_length=config.data.seq_length,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        recompute=config.train.recompute,
        world_size=world_size,
        split=tuple(split or layout.layers_per_chunk(config, vocabulary_size)),
        documents=documents,
        gpus_per_node=gpus_per_node,
    )
