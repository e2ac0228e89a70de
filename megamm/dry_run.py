"""What a run would be, without starting it: ranks to layout, parameters per rank, tokens per step."""

from dataclasses import dataclass

from megamm.config import RunConfig
from megamm.metrics import parameter_count


@dataclass(frozen=True)
class Place:
    """A rank's coordinates; Megatron's order: tensor fastest, then data, then pipeline."""

    rank: int
    tensor: int
    data: int
    pipeline: int
    expert: int


def places(config: RunConfig, world_size: int) -> list[Place]:
    """Coordinates of every rank; the expert grid (TP 1) is laid over the same ranks."""
    p, data = config.parallel, config.data_parallel(world_size)
    stage = p.tensor * data
    return [
        Place(
            rank,
            rank % p.tensor,
            rank // p.tensor % data,
            rank // stage,
            rank % stage % p.expert,
        )
        for rank in range(world_size)
    ]


def parameters_of_rank(config: RunConfig, vocabulary_size: int, pipeline: int) -> int:
    """Parameters that a rank of this stage holds, run-time padding of the vocabulary included."""
    m, p = config.model, config.parallel
    layers = m.num_layers // p.pipeline
    attention = m.hidden_size * m.head_dim * (2 * m.num_attention_heads + 2 * m.num_query_groups) // p.tensor
    norms = 2 * m.head_dim + 2 * m.hidden_size
    if m.moe.num_experts:
        expert = 3 * m.hidden_size * m.moe.ffn_hidden_size
        mlp = m.moe.num_experts * m.hidden_size + m.moe.num_experts // p.expert * expert
    else:
        mlp = 3 * m.hidden_size * m.ffn_hidden_size // p.tensor
    table = -(-vocabulary_size // p.tensor) * m.hidden_size
    first, last = pipeline == 0, pipeline == p.pipeline - 1
    shared = first and last and m.tie_embeddings
    ends = table * (int(first) + int(last) - int(shared)) + (m.hidden_size if last else 0)
    return layers * (attention + norms + mlp) + ends


def describe(config: RunConfig, vocabulary_size: int, world_size: int) -> str:
    """The printed text of `megamm train CONFIG --dry-run`."""
    t, s = config.train, config.data.seq_length
    data = config.data_parallel(world_size)
    lines = [
        f"world size {world_size} = tensor {config.parallel.tensor} x pipeline {config.parallel.pipeline} x data {data}"
        f" (expert parallel {config.parallel.expert}, sequence parallel {config.parallel.sequence})",
        f"model {parameter_count(config.model, vocabulary_size):,} parameters, vocabulary {vocabulary_size:,}",
        f"step {t.global_batch} rows x {s} = {t.global_batch * s:,} tokens in "
        f"{t.global_batch // (t.micro_batch * data)} microbatches of {t.micro_batch} rows on each data rank; "
        f"{t.steps:,} steps = {t.steps * t.global_batch * s:,} tokens",
        "rank  tensor  data  pipeline  expert  parameters",
    ]
    for place in places(config, world_size):
        count = parameters_of_rank(config, vocabulary_size, place.pipeline)
        columns = (place.rank, place.tensor, place.data, place.pipeline, place.expert)
        lines.append("{:>4}  {:>6}  {:>4}  {:>8}  {:>6}".format(*columns) + f"  {count:>10,}")
    return "\n".join(lines)
