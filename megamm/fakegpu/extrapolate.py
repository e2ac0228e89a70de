"""From simulated steps with few layers and microbatches to the whole step of a run.

Figures are linear in the number of layers of each kind that a rank has: a run with one layer of each kind in every
chunk and one with two of a kind give the figures of a layer. They are linear in the number of microbatches too, as soon
as there are enough to fill the pipeline. Peaks are extrapolated phase by phase, as the largest phase may be another one
with more layers.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from megamm.config import RunConfig
from megamm.fakegpu.results import Figures, ProbeRequest, ProbeResult
from megamm.model.layout import fp8_layers, layers_per_chunk

Ask = Callable[[ProbeRequest], ProbeResult]
LayerKind = tuple[bool, bool, bool]
"""Whether a layer of a mixture of experts is dense, whether it has no attention window, and whether it has FP8."""


def whole_step(
    config: RunConfig, vocabulary_size: int, world_size: int, rank: int, exact: bool, ask: Ask
) -> ProbeResult:
    """Return the figures of a rank in a step of the run; see Simulator.simulate. ask: simulates one request."""
    split = layers_per_chunk(config, vocabulary_size)
    whole = kinds_by_chunk(config, split)
    microbatches = config.train.global_batch_size // (config.train.micro_batch_size * config.data_parallel(world_size))
    simulated = min(microbatches, enough_microbatches(config))
    request = ProbeRequest(config.model_dump(mode="json"), vocabulary_size, world_size, rank, simulated)

    def of(chunks: Sequence[Sequence[LayerKind]]) -> ProbeResult:
        return ask(replace(request, config=with_layers(config, chunks).model_dump(mode="json")))

    own = range(rank * config.parallel.pipeline // world_size, len(split), config.parallel.pipeline)
    result = None if exact or "moe_layer_freq" in config.model.megatron else _from_few(whole, own, of)
    result = result or of(whole)
    return replace(result, figures=_with_microbatches(result.figures, microbatches / simulated))


def enough_microbatches(config: RunConfig) -> int:
    """Return how many microbatches reach the largest number in flight of the pipeline's schedule, and one backward."""
    p = config.parallel
    if p.pipeline == 1:
        return 1
    # Interleaved, the first stage starts with 2 (p - 1) + (v - 1) p + 1 forward passes of chunks, of v p microbatches.
    return p.pipeline + 1 if p.virtual_pipeline == 1 else 2 * p.pipeline


def _from_few(
    whole: Sequence[Sequence[LayerKind]], own: range, of: Callable[[Sequence[Sequence[LayerKind]]], ProbeResult]
) -> ProbeResult | None:
    """Return extrapolated figures, or None where it is less work to build all layers."""
    base = [_at_most(chunk, Counter()) for chunk in whole]
    repeated = [kind for kind in sorted(set().union(*whole)) if _count(whole, own, kind) > _count(base, own, kind)]
    twice = {kind: [_at_most(chunk, Counter({kind: 1})) for chunk in whole] for kind in repeated}
    work = sum(len(chunks[i]) for chunks in (base, *twice.values()) for i in own)
    if work >= sum(len(whole[i]) for i in own):
        return None
    result = of(base)
    figures = dict(result.figures)
    for kind, chunks in twice.items():
        more = of(chunks)
        added = _count(chunks, own, kind) - _count(base, own, kind)
        factor = (_count(whole, own, kind) - _count(base, own, kind)) / added
        for name in figures.keys() | more.figures.keys():
            step = more.figures.get(name, 0.0) - result.figures.get(name, 0.0)
            figures[name] = figures.get(name, 0.0) + factor * step
        result = replace(result, seconds=result.seconds + more.seconds)
    return replace(result, figures=figures)


def kinds_by_chunk(config: RunConfig, split: Sequence[int]) -> list[list[LayerKind]]:
    m, kinds, first = config.model, list[list[LayerKind]](), 0
    in_fp8 = fp8_layers(config)
    for count in split:
        layers = range(first, first + count)
        kinds.append([(n < m.moe.dense_layers, n in m.window.full_layers, n in in_fp8) for n in layers])
        first += count
    return kinds


def _at_most(chunk: Sequence[LayerKind], more: Counter[LayerKind]) -> list[LayerKind]:
    """Return one layer of each kind of the chunk, in its order, and `more` of some kinds if it has them."""
    left = Counter(dict.fromkeys(chunk, 1)) + more
    taken = []
    for kind in chunk:
        if left[kind]:
            left[kind] -= 1
            taken.append(kind)
    return taken


def _count(chunks: Sequence[Sequence[LayerKind]], own: range, kind: LayerKind) -> int:
    return sum(chunks[i].count(kind) for i in own)


def with_layers(config: RunConfig, chunks: Sequence[Sequence[LayerKind]]) -> RunConfig:
    """Return the config of a model with these layers in each chunk of the pipeline."""
    layers = [kind for chunk in chunks for kind in chunk]
    m = config.model
    moe = m.moe.model_copy(update={"dense_layers": sum(dense for dense, _, _ in layers)})
    full = [number for number, (_, is_full, _) in enumerate(layers) if is_full]
    window = m.window.model_copy(update={"full_layers": full})
    model = m.model_copy(update={"num_layers": len(layers), "moe": moe, "window": window})
    parallel = config.parallel.model_copy(update={"layers_per_chunk": [len(chunk) for chunk in chunks]})
    in_fp8 = [n for n, (_, _, has_fp8) in enumerate(layers) if has_fp8]
    kept = {"first_layers_bf16": in_fp8[0], "last_layers_bf16": len(layers) - 1 - in_fp8[-1]} if in_fp8 else {}
    train = config.train.model_copy(update={"fp8": config.train.fp8.model_copy(update=kept)})
    return config.model_copy(update={"model": model, "parallel": parallel, "train": train})


def _with_microbatches(figures: Figures, factor: float) -> Figures:
    """Scale what happens for each microbatch, and the inputs, of which all are on the device for the whole step."""
    scaled = {}
    for name, value in figures.items():
        parts = [*name.split("|"), "", ""]
        is_repeated = parts[1] == "microbatch" or parts[2] == "inputs"
        scaled[name] = value * factor if is_repeated else value
    return scaled
