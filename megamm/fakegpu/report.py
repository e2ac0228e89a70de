"""The text of `megamm train CONFIG --dry-run --fake-gpu GPU`: memory, communication, host waits and work of ranks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megamm.common.errors import UserError
from megamm.common.gpu_constants import GIB
from megamm.config import Recompute, RecomputeConfig, RunConfig, recompute_override
from megamm.fakegpu.results import KINDS, Figures, ProbeResult
from megamm.fakegpu.simulator import RankMemory, Simulator, memory_of

SCALES = {"microbatch": "all microbatches", "step": "once a step"}


@dataclass(frozen=True)
class Question:
    """What to simulate: a run with a vocabulary on a world of this size; exact: with all layers."""

    config: RunConfig
    vocabulary_size: int
    world_size: int
    exact: bool = False


def ranks_to_simulate(config: RunConfig, world_size: int, rank: int | None, stages: bool) -> list[int]:
    """Return the ranks that the options select: one, one of each pipeline stage, or of the first and the last stage.

    Ranks of one stage have the same layers and as many experts; they differ only in the bounds of their optimizer's
    part. UserError for a rank outside the world.
    """
    if rank is not None:
        if not 0 <= rank < world_size:
            raise UserError(
                f"rank {rank} is not one of {world_size} ranks", remedy=f"give --rank 0 to {world_size - 1}"
            )
        return [rank]
    count = config.parallel.pipeline
    each = [stage * (world_size // count) for stage in range(count)]
    return each if stages else sorted({each[0], each[-1]})


def report(simulator: Simulator, question: Question, ranks: Sequence[int]) -> tuple[str, bool]:
    """Return the report on these ranks, and whether all of them fit. UserError for a layout that cannot run."""
    results = {
        rank: simulator.simulate(
            question.config, question.vocabulary_size, question.world_size, rank, exact=question.exact
        )
        for rank in ranks
    }
    memory = {rank: memory_of(result.figures, simulator.gpu) for rank, result in results.items()}
    worst = max(memory, key=lambda rank: memory[rank].total)
    fits = memory[worst].fits
    lines = [*_head(simulator, question, results), *_memory_table(memory), ""]
    for rank, result in results.items():
        lines += [*_rank_lines(rank, result), ""]
    if not fits:
        lines += list(_levers(simulator, question, worst))
    return "\n".join(lines).rstrip(), fits


def _head(simulator: Simulator, question: Question, results: Mapping[int, ProbeResult]) -> Iterator[str]:
    kernels = next(iter(results.values())).kernels
    layers = "all layers built" if question.exact else "extrapolated from few layers of each kind"
    yield f"simulated {simulator.gpu.device_name} ({simulator.gpu.name}); no GPU was used; {layers}"
    share = "" if simulator.imbalance == 1 else f" x {simulator.imbalance:g}"
    yield f"attention {kernels['attention']}, ops {kernels['ops']}; each row is one document"
    if question.config.model.moe.num_experts:
        yield f"the experts of a rank receive their equal share of the tokens{share}"


def _memory_table(memory: Mapping[int, RankMemory]) -> Iterator[str]:
    """Yield the memory of each rank at its peak."""
    yield f"{'GiB at the peak':<16}" + "".join(f"{kind:>12}" for kind in KINDS) + f"{'total':>9}  peak in"
    for rank, of in memory.items():
        sizes = "".join(f"{of.kinds.get(kind, 0) / GIB:>12.2f}" for kind in KINDS)
        yield f"rank {rank:<11}{sizes}{of.total / GIB:>9.2f}  {of.phase}"
    for rank, of in memory.items():
        needed, has = (of.total + of.allowance) / GIB, of.capacity / GIB
        verdict = "fits" if of.fits else f"does not fit: {needed - has:.2f} GiB too much"
        allowance = f"{of.allowance / GIB:.1f} GiB for the context, NCCL and fragmentation"
        yield f"rank {rank}: {of.total / GIB:.2f} GiB + {allowance} = {needed:.2f} of {has:.2f} GiB: {verdict}"


def _rank_lines(rank: int, result: ProbeResult) -> Iterator[str]:
    figures = result.figures
    yield f"{result.coordinates}; {figures['parameters']:,.0f} parameters, simulated in {result.seconds:.0f} s"
    yield f"  checkpoint  {figures['host|checkpoint'] / GIB:.2f} GiB of page-locked host memory"
    flops = {scope: _sum(figures, f"flops|{scope}|") for scope in SCALES}
    launches = {scope: figures.get(f"launches|{scope}", 0.0) for scope in SCALES}
    yield f"  work        {sum(flops.values()):.4g} FLOPs, {sum(launches.values()):,.0f} kernel launches in a step"
    yield "  collectives                                 messages          GiB"
    for scope, text in SCALES.items():
        for name in sorted(name for name in figures if name.startswith(f"count|{scope}|")):
            operation, group, size = name.split("|")[2:]
            count, volume = figures[name], figures[f"bytes{name.removeprefix('count')}"]
            what = f"{operation} over {group} ({size} ranks)"
            yield f"    {what:<40}{count:>10,.0f}{volume / GIB:>13.3f}  {text}"
    yield "  host waits for the GPU"
    for name, count in sorted(figures.items(), key=lambda item: -item[1]):
        if name.startswith("wait|") and count:
            scope, kind, file, function, line = name.split("|")[1:]
            yield f"    {count:>10,.0f}  {kind} at {file}:{line} in {function}, {SCALES[scope]}"


def _sum(figures: Figures, start: str) -> float:
    return sum(value for name, value in figures.items() if name.startswith(start))


def _levers(simulator: Simulator, question: Question, rank: int) -> Iterator[str]:
    """Yield what the rank would need with each change of the config that keeps the world's size."""
    yield f"changes that lower the memory of rank {rank}, each simulated on its own:"
    for text, config in _changes(question.config):
        try:
            memory = simulator.rank_memory(config, question.vocabulary_size, question.world_size, rank)
        except UserError as error:
            yield f"  {text:<44} not possible: {error.what}"
        else:
            verdict = "fits" if memory.fits else "does not fit"
            yield f"  {text:<44} {(memory.total + memory.allowance) / GIB:.2f} GiB: {verdict}"


def _more_recomputation(config: RunConfig) -> Iterator[Recompute]:
    m = config.model
    if config.train.recompute == "none":
        yield RecomputeConfig(modules=["norms", "moe" if m.moe.num_experts else "mlp"])
    if config.train.recompute != "full":
        yield "full"


def _changes(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    t, p = config.train, config.parallel

    def with_parallel(**changes: object) -> RunConfig:
        return config.model_copy(update={"parallel": p.model_copy(update=changes | {"layers_per_chunk": []})})

    for recompute in _more_recomputation(config):
        train = t.model_copy(update={"recompute": recompute})
        yield recompute_override(recompute), config.model_copy(update={"train": train})
    if t.micro_batch_size > 1:
        half = t.micro_batch_size // 2
        train = t.model_copy(update={"micro_batch_size": half})
        yield f"train.micro_batch_size={half}", config.model_copy(update={"train": train})
    yield f"parallel.context={2 * p.context}", with_parallel(context=2 * p.context)
    tensor = with_parallel(tensor=2 * p.tensor, sequence=True)
    yield f"parallel.tensor={2 * p.tensor} parallel.sequence=true", tensor
    yield f"parallel.pipeline={2 * p.pipeline}", with_parallel(pipeline=2 * p.pipeline)
    if config.model.moe.num_experts:
        yield f"parallel.expert={2 * p.expert}", with_parallel(expert=2 * p.expert)
