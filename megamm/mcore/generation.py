"""Generation at the training layout: one loop on every rank, in step where ranks need each other.

    requests -> each data rank's share -> Scheduler.plan -> PagedDecoder.run -> choose_tokens -> ... -> all answers

Every rank of a data rank's group (tensor and pipeline ranks) plans the same steps. The last stage chooses tokens, the
same on all its tensor ranks because noise is a function of (seed, position), and sends them to the other stages. Ranks
that share experts make the same number of steps with the same number of tokens, padded where a rank has fewer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megamm.config import RunConfig
from megamm.mcore.backbone import Backbone
from megamm.mcore.paged_decoder import PagedDecoder, check_supported
from megamm.mcore.process_groups import ProcessGroups
from megamm.model.generation import (
    GeneratedTokens,
    GenerationLimits,
    GenerationRequest,
    Sample,
    Scheduler,
    Segment,
    blocks_needed,
    samples_of,
)
from megamm.model.sampling import choose_tokens


@torch.inference_mode()
def generate(
    config: RunConfig,
    chunks: Sequence[Backbone],
    groups: ProcessGroups,
    vocabulary_size: int,
    requests: Sequence[GenerationRequest],
    limits: GenerationLimits,
    with_logprobs: bool,
    on_token: Callable[[int, int, int], None] | None,
) -> list[list[GeneratedTokens]]:
    """Return each request's answers, on every rank; all ranks call it with the same requests.

    UserError, before anything runs, for a request or a layout that is not supported.
    """
    check_supported(config)
    every = samples_of(requests, vocabulary_size, limits)
    own = every[groups.data_rank :: groups.data_size]
    decoder = PagedDecoder(config, chunks, groups, min(limits.blocks, blocks_needed(own, limits)) + 1)
    scheduler = Scheduler(own, limits)
    shares_experts = config.parallel.expert > 1
    with _in_eval_mode(chunks):
        while True:
            segments = scheduler.plan() if not scheduler.is_done else []
            padded_to = sum(segment.size for segment in segments)
            if shares_experts:
                most = torch.tensor([padded_to], device=decoder.device)
                dist.all_reduce(most, op=dist.ReduceOp.MAX, group=groups.collection.dp)
                padded_to = int(most)
            if padded_to == 0:
                break
            logits = decoder.run(segments, padded_to)
            _choose(logits, segments, decoder, groups, with_logprobs, on_token)
            scheduler.finish_step(segments)
    return _gathered(requests, own, every, groups)


@contextmanager
def _in_eval_mode(chunks: Sequence[Backbone]) -> Iterator[None]:
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)


def _choose(
    logits: torch.Tensor | None,
    segments: Sequence[Segment],
    decoder: PagedDecoder,
    groups: ProcessGroups,
    with_logprobs: bool,
    on_token: Callable[[int, int, int], None] | None,
) -> None:
    """Add the next token to each sample whose last token has run, and further ones as long as its drafts are right."""
    rows = _rows(segments)
    step = 0
    while rows:
        chosen: list[list[float]] = []
        if logits is not None:
            picked = choose_tokens(_combined(logits, rows, step), [s.choice() for s, _ in rows], with_logprobs)
            # An id is exact in float64.
            packed = torch.stack([value.double() for value in picked])
        else:
            packed = torch.empty(3, len(rows), dtype=torch.float64, device=decoder.device)
        pipeline = groups.collection.pp
        if pipeline.size() > 1:
            dist.broadcast(packed, dist.get_global_rank(pipeline, pipeline.size() - 1), group=pipeline)
        chosen = packed.tolist()
        following = []
        for (sample, at), token, own, sampled in zip(rows, map(int, chosen[0]), chosen[1], chosen[2], strict=True):
            sample.add(token)
            sample.logprobs.append(own)
            sample.sampled_logprobs.append(sampled)
            if on_token is not None:
                on_token(sample.number, sample.copy, token)
            if not sample.reason and step < len(sample.drafts) and sample.drafts[step] == token:
                following.append((sample, at))
        rows, step = following, step + 1


def _rows(segments: Sequence[Segment]) -> list[tuple[Sample, list[int]]]:
    """Return the samples whose next token is chosen, each with its tracks' first rows of the logits."""
    first, found = 0, dict[int, tuple[Sample, list[int]]]()
    by_track: dict[tuple[int, int], int] = {}
    for segment in segments:
        if segment.wanted:
            sample = segment.sample
            track = next(i for i, t in enumerate(sample.tracks) if t is segment.track)
            by_track[id(sample), track] = first
            found.setdefault(id(sample), (sample, []))
            first += segment.wanted
    for key, (sample, rows) in found.items():
        rows += [by_track[key, track] for track in range(len(sample.tracks))]
    return list(found.values())


def _combined(logits: torch.Tensor, rows: Sequence[tuple[Sample, list[int]]], step: int) -> torch.Tensor:
    """Return the logits `[B, V]` at a step of each sample: with guidance, of its two tracks."""
    index = [at[0] + step for _, at in rows]
    own = logits if index == list(range(len(logits))) else logits[index]
    guided = [(i, at[1], sample.request.guidance) for i, (sample, at) in enumerate(rows) if len(at) > 1]
    if not guided:
        return own
    own = own.float()
    if own.data_ptr() == logits.data_ptr():
        own = own.clone()
    for i, without, guidance in guided:
        own[i] = logits[without].float().lerp(own[i], guidance)
    return own


def _gathered(
    requests: Sequence[GenerationRequest], own: Sequence[Sample], every: Sequence[Sample], groups: ProcessGroups
) -> list[list[GeneratedTokens]]:
    """Return the answers of all data ranks, by request."""
    made = [(s.order, GeneratedTokens(s.generated, s.reason, s.logprobs, s.sampled_logprobs)) for s in own]
    parts = [made]
    if groups.data_size > 1:
        parts = [made for _ in range(groups.data_size)]
        dist.all_gather_object(parts, made, group=groups.collection.dp)
    answers = dict(entry for part in parts for entry in part)
    result: list[list[GeneratedTokens]] = [[] for _ in requests]
    for sample in every:
        result[sample.number].append(answers[sample.order])
    return result
