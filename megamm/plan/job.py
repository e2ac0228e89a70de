"""What is predicted: a model, a layout, a batch, the data's document lengths and the techniques of the program.

A `Job` of this product comes from its config (`of_config`). Published runs of other programs become jobs with another
`Software`, so that the same formulas are checked against them (tests/lib/published_speeds.py).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

from megamm.config import ModelConfig, ParallelConfig, Recompute, RunConfig
from megamm.model import attention_kernel, layout

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
    def pairs(self, window: int, by_lengths: bool) -> float:
        """Mean number of pairs of a query and a key that a kernel computes in a row; window 0: the whole document.

        by_lengths: the kernel's blocks begin with each document. Otherwise they begin with the row, and a document
        begins anywhere in a block, which the documents in it share.
        """
        # A block of queries sees its own block of keys, and so many before it.
        before = -(-(window - 1) // ATTENTION_BLOCK) if window else None
        if by_lengths or len(self.lengths) == self.rows:
            blocks = (-(-n // ATTENTION_BLOCK) for n in self.lengths)
            return sum(n + _earlier_blocks(n, before) for n in blocks) * ATTENTION_BLOCK**2 / self.rows
        total = 0.0
        for n in self.lengths:
            whole, rest = divmod(n - 1, ATTENTION_BLOCK)  # the last token is so many blocks and tokens after the first
            for touched, share in ((whole + 1, 1 - rest / ATTENTION_BLOCK), (whole + 2, rest / ATTENTION_BLOCK)):
                total += share * _earlier_blocks(touched, before) * ATTENTION_BLOCK**2
        return (total + sum(self.lengths) * ATTENTION_BLOCK) / self.rows

    @property
    def mean_length(self) -> float:
        return sum(self.lengths) / len(self.lengths)


def _earlier_blocks(blocks: int, before: int | None) -> float:
    """Return how many blocks of keys all of so many blocks of queries see, each at most `before`, without its own."""
    most = blocks - 1 if before is None else min(before, blocks - 1)
    return most * (most + 1) / 2 + (blocks - 1 - most) * most


@dataclass(frozen=True)
class Software:
    """Techniques that change the time of the same computation. `PRODUCT` has those of this package on a GPU."""

    precision: Literal["16-bit", "fp8"] = "16-bit"
    """Of the linear layers' products; fp8 also converts their factors."""
    conversion: Literal["fused", "tensorwise", "rowwise"] = "fused"
    """To FP8. fused: one pass writes a factor and its transpose. Else by torch's operators, with this recipe."""
    attention: Literal["varlen", "flash", "flex", "unfused"] = "varlen"
    """Kernel of attention. varlen: FlashAttention 2, in torch. flash: the best known one. unfused: products with scores
    in memory, softmax and dropout between them."""
    elementwise: Literal["ops", "torch", "fused", "2021"] = "ops"
    """ops: the operators of csrc, and a norm that adds the residual. torch: plain torch (`ops: torch`). fused: also
    copies. 2021: LayerNorm, GELU, dropout."""
    is_gated: bool = True
    """Whether an MLP has a gate: three matrices instead of two."""
    fused_weight_gradients: bool = False
    """Products add weight gradients to their float32 buffer; otherwise a pass over them follows."""
    fused_expert_gradients: bool = True
    """The same of the products of experts, which have passes of their own otherwise."""
    fused_loss: bool = True
    """The output layer and the loss run in chunks of rows that add to a float32 gradient."""
    tensor_overlap: Literal["none", "backward", "all"] = "backward"
    """Tensor-parallel collectives that run beside products. backward: those that have an independent product."""
    grouped_experts: bool = True
    """The products of a rank's experts are one kernel; otherwise the host starts one expert after another."""
    expert_waits: int = 1
    """Waits of the host for numbers of tokens in a layer with experts."""
    deduplicated_dispatch: bool = False
    """A token crosses the network once for each node of its experts, not once for each expert."""
    expert_overlap: bool = False
    """The exchange of tokens runs beside the computation of another microbatch."""
    context_overlap: bool = False
    """Keys and values move beside attention."""
    pipeline_overlap: bool = True
    """Sends between stages run beside computation."""
    gradient_overlap: bool = True
    parameter_overlap: bool = True
    """Updated parameters are gathered beside the next forward pass."""
    sharded_optimizer: bool = True
    gradient_bytes: float = 4.0
    """Of one gradient element in the reduction over data-parallel ranks."""
    sharded_parameters: bool = False
    """FSDP: layers are gathered before use, in both passes."""
    recomputed_share: float = -1.0
    """Share of the layers that are fully recomputed; negative: as the job's recompute says."""


PRODUCT = Software(fused_weight_gradients=True, fused_expert_gradients=False)
SEQUENTIAL_EXPERTS = replace(PRODUCT, grouped_experts=False, expert_waits=3, fused_expert_gradients=True)


class LayerKind(NamedTuple):
    """What tells the layers of a model apart in time and memory."""

    window: int
    """0: attention over whole documents."""
    has_experts: bool
    in_fp8: bool = False
    """Whether its linear layers compute in FP8."""


def kinds_of_layers(m: ModelConfig, in_fp8: range = range(0)) -> tuple[LayerKind, ...]:
    """Return the kind of every layer of a model; in_fp8: those that compute in FP8."""
    first = m.moe.dense_layers if m.moe.num_experts else m.num_layers
    return _kinds_of_layers(m.num_layers, m.window.size, tuple(m.window.full_layers), first, in_fp8)


@lru_cache(maxsize=64)
def _kinds_of_layers(
    layers: int, window: int, full: tuple[int, ...], first_expert: int, in_fp8: range
) -> tuple[LayerKind, ...]:
    return tuple(LayerKind(0 if n in full else window, n >= first_expert, n in in_fp8) for n in range(layers))


@dataclass(frozen=True)
class Job:
    """A training job. split: layers of each pipeline chunk in model order; batch sizes in rows."""

    model: ModelConfig
    parallel: ParallelConfig
    vocabulary_size: int
    seq_length: int
    global_batch_size: int
    micro_batch_size: int
    recompute: Recompute
    world_size: int
    split: tuple[int, ...]
    documents: Documents
    software: Software = PRODUCT
    gpus_per_node: int = 8
    bytes_per_parameter: tuple[int, int, int] = (2, 4, 12)
    """Weight, gradient, optimizer state on the device."""
    moment_bytes: int = 4
    """Of each of the two stored moments of a parameter."""
    offloads_moments: bool = False
    """Moments are in host memory."""
    layers_in_fp8: range | None = None
    """Layers that compute in the software's precision, if it is fp8; None: all."""

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
    def kinds_by_layer(self) -> tuple[LayerKind, ...]:
        """The kind of every layer of the model."""
        if self.software.precision != "fp8":
            return kinds_of_layers(self.model)
        in_fp8 = self.layers_in_fp8
        return kinds_of_layers(self.model, range(self.model.num_layers) if in_fp8 is None else in_fp8)

    @cached_property
    def last_kind(self) -> LayerKind:
        """The kind of the last layer, which a multi-token-prediction module repeats."""
        return self.kinds_by_layer[-1]

    @cached_property
    def kinds_of_chunks(self) -> Sequence[Mapping[LayerKind, int]]:
        """The layers of each pipeline chunk in model order, counted by kind."""
        return _kinds_of_chunks(self.split, self.kinds_by_layer)

    @cached_property
    def kinds(self) -> list[LayerKind]:
        """The kinds of layers in the model."""
        return list(dict.fromkeys(kind for chunk in self.kinds_of_chunks for kind in chunk))

    @property
    def attention_by_lengths(self) -> bool:
        """Whether the kernel takes the lengths of documents (model/attention_kernel.py)."""
        return self.software.attention in ("varlen", "flash")

    def recomputes(self, module: str) -> bool:
        """Whether the backward pass computes these parts of a layer again (not the whole layer)."""
        return not isinstance(self.recompute, str) and module in self.recompute.modules

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
        software=_software(config),
        gpus_per_node=gpus_per_node,
        bytes_per_parameter=config.bytes_per_parameter,
        moment_bytes=2 if config.optimizer.moments == "bf16" else 4,
        offloads_moments=config.optimizer.offload_moments,
        layers_in_fp8=layout.fp8_layers(config),
    )


def _software(config: RunConfig) -> Software:
    """Return what a run on GPUs does with this config."""
    in_fp8 = config.train.precision == "fp8"
    form = SEQUENTIAL_EXPERTS if config.train.experts == "sequential" else PRODUCT
    attention: Literal["varlen", "flash", "flex"] = "flex"
    if attention_kernel.takes_lengths_on_a_gpu(config):
        attention = "flash" if config.train.attention == "flash" else "varlen"
    if config.model.megatron.get("gradient_accumulation_fusion") is False:
        form = replace(form, fused_weight_gradients=False, fused_expert_gradients=False)
    return replace(
        form,
        precision="fp8" if in_fp8 else "16-bit",
        conversion=config.train.fp8.recipe if in_fp8 else "fused",
        attention=attention,
        elementwise="torch" if config.ops == "torch" else "ops",
        parameter_overlap=config.parallel.overlap_param_gather is not False,
    )
