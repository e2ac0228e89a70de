"""Continuous batches: which tokens of which requests run in a step, and in which blocks of the cache they are kept.

    GenerationRequest -> Sample (one of its n answers) -> Track (what it has in the cache) -> Segment (its part of a
    step)

A sample has one track, or two with guidance: with the prompt and without its condition. Each step feeds every running
sample, then prompts in chunks up to a limit of tokens. A sample is admitted while the cache has free blocks for its
prompt. When blocks run out, the youngest running sample gives its blocks back, and later computes them again
(preemption by recompute). None of this changes a result: it depends on (seed, position) alone (model/sampling.py).
Every rank plans the same steps from the same requests. Sources: Yu et al. 2022, Orca (continuous batches); Kwon et al.
2023 (paged cache); Agrawal et al. 2023 (chunked prefill); Ho and Salimans 2022 (guidance); Saxena 2023 (prompt lookup).
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megamm.common.errors import UserError
from megamm.model.grammar import DocumentGrammar, DocumentState, Position
from megamm.model.sampling import TokenChoice, TokenSampling, sample_seed

BLOCK_TOKENS = 64
"""Tokens of a block of the cache."""
SCRATCH = 0
"""The block that belongs to no sample: tokens that only keep ranks in step are written there."""
_LOOKUP = (3, 2)
"""Lengths of the last tokens that prompt lookup searches for, the longest first."""


@dataclass(frozen=True)
class GenerationRequest:
    """Token ids to continue.

    samples: answers, each with noise of its own. stop_ids: an answer ends with one of these, which is its last id.
    grammar: limits the ids, and gives positions; None: any ids, with positions that count tokens. ends: gives for each
    answer a function that is called with every new id and returns whether the answer is complete. without: the prompt
    without its condition, for classifier-free guidance: logits are without + guidance * (with - without).
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: TokenSampling = field(default_factory=TokenSampling)
    seed: int = 0
    samples: int = 1
    stop_ids: frozenset[int] = frozenset()
    grammar: DocumentGrammar | None = None
    ends: Callable[[], Callable[[int], bool]] | None = None
    guidance: float = 1.0
    without: Sequence[int] = ()


@dataclass(frozen=True)
class GenerationLimits:
    """Limits of a rank: tokens in the cache, samples at a time, tokens of a step, and drafted tokens per sample.

    draft_tokens 0: no speculation; otherwise the tokens that followed the last ones earlier in the sequence are tried,
    and those that would have been generated anyway are accepted at once.
    """

    cache_tokens: int = 32768
    running: int = 64
    step_tokens: int = 512
    draft_tokens: int = 0

    def __post_init__(self) -> None:
        least = {"cache_tokens": BLOCK_TOKENS, "running": 1, "step_tokens": 1, "draft_tokens": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"invalid limit {name} = {getattr(self, name)}", remedy=f"use at least {low}")

    @property
    def blocks(self) -> int:
        """Blocks of the cache, without the scratch block."""
        return self.cache_tokens // BLOCK_TOKENS


@dataclass(frozen=True)
class GeneratedTokens:
    """One answer: its new ids, why it ended ("stop" or "length"), and each id's log-probabilities (sampling.py).

    log-probabilities are NaN where they were not requested.
    """

    ids: list[int]
    reason: str
    logprobs: list[float]
    sampled_logprobs: list[float]


@dataclass
class Track:
    """A sequence in the cache: its prompt, the blocks it has, and how many of its tokens they hold."""

    prompt: list[int]
    positions: list[Position]
    """Of the prompt and of all generated tokens."""
    state: DocumentState
    blocks: list[int] = field(default_factory=list)
    cached: int = 0


@dataclass
class Sample:
    """One answer in progress; `order` is its place in the queue."""

    request: GenerationRequest
    number: int
    """Number of the request in the call."""
    copy: int
    order: int
    tracks: list[Track]
    ends: Callable[[int], bool] | None
    generated: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    """Tokens that this step tries after the last one."""
    draft_positions: list[Position] = field(default_factory=list)
    reason: str = ""

    @property
    def seed(self) -> int:
        return sample_seed(self.request.seed, self.copy)

    def length(self, track: Track) -> int:
        return len(track.prompt) + len(self.generated)

    def tokens(self, track: Track, start: int, stop: int) -> list[int]:
        """Return the tokens [start, stop) of a track, of which the last may be drafts."""
        before = len(track.prompt)
        if stop == start + 1 and start >= before and not self.drafts:
            return [self.generated[start - before]]
        return (track.prompt + self.generated + self.drafts)[start:stop]

    def positions(self, track: Track, start: int, stop: int) -> list[Position]:
        """Return the positions of the same tokens."""
        if stop <= len(track.positions):
            return track.positions[start:stop]
        return (track.positions + self.draft_positions)[start:stop]

    def add(self, token: int) -> None:
        """Take the next token, and note whether it is the last."""
        for track in self.tracks:
            _append(self.request.grammar, track, token)
        self.generated.append(token)
        grammar = self.request.grammar
        is_end = token in self.request.stop_ids or (grammar is not None and self.tracks[0].state.is_ended)
        if is_end or (self.ends is not None and self.ends(token)):
            self.reason = "stop"
        elif len(self.generated) == self.request.max_tokens:
            self.reason = "length"

    def choice(self) -> TokenChoice:
        """Return what decides the next token."""
        request, track = self.request, self.tracks[0]
        valid = request.grammar.allowed(track.state) if request.grammar else None
        is_read = request.sampling.repetition_penalty != 1
        previous = track.prompt + self.generated if is_read else ()
        return TokenChoice(request.sampling, self.seed, len(self.generated), valid, previous)


class Segment(NamedTuple):
    """Tokens [start, stop) of a track that run in a step; the logits of the last `wanted` are needed."""

    sample: Sample
    track: Track
    start: int
    stop: int
    wanted: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def _append(grammar: DocumentGrammar | None, track: Track, token: int) -> None:
    if grammar is None:
        track.positions.append((len(track.positions),) * 3)
    else:
        track.positions.append(grammar.position(track.state, token))
        track.state = grammar.advance(track.state, token)


def samples_of(requests: Sequence[GenerationRequest], vocabulary_size: int, limits: GenerationLimits) -> list[Sample]:
    """Return the samples of all requests, in order. UserError for a request that cannot run."""
    found: list[Sample] = []
    for number, request in enumerate(requests):
        where = f"request {number}"
        prompts = [list(request.prompt)] + ([list(request.without)] if request.guidance != 1 else [])
        for prompt in prompts:
            if not prompt or min(prompt) < 0 or max(prompt) >= vocabulary_size:
                what = "an empty prompt" if not prompt else f"ids {min(prompt)} to {max(prompt)} in the prompt"
                remedy = (
                    f"give ids from 0 to {vocabulary_size - 1}; with guidance, also of the prompt without condition"
                )
                raise UserError(what, where=where, remedy=remedy)
        if request.max_tokens < 1 or request.samples < 1:
            raise UserError("max_tokens and samples must be at least 1", where=where, remedy="set them to at least 1")
        needed = sum(_blocks(len(prompt), request, limits) for prompt in prompts)
        if needed > limits.blocks:
            what = f"{needed * BLOCK_TOKENS} tokens do not fit into a cache of {limits.blocks * BLOCK_TOKENS}"
            raise UserError(what, where=where, remedy="raise the cache's size, or lower max_tokens")
        for copy in range(request.samples):
            ends = request.ends() if request.ends else None
            tracks = [_track(request.grammar, prompt, where) for prompt in prompts]
            found.append(Sample(request, number, copy, len(found), tracks, ends))
    return found


def _blocks(prompt: int, request: GenerationRequest, limits: GenerationLimits) -> int:
    return -(-(prompt + request.max_tokens + limits.draft_tokens) // BLOCK_TOKENS)


def blocks_needed(samples: Sequence[Sample], limits: GenerationLimits) -> int:
    """Return the blocks that all samples take if they run at the same time: a larger cache has no use."""
    return sum(_blocks(len(track.prompt), s.request, limits) for s in samples for track in s.tracks)


def _track(grammar: DocumentGrammar | None, prompt: list[int], where: str) -> Track:
    track = Track(prompt, [], DocumentState())
    try:
        for token in prompt:
            _append(grammar, track, token)
    except ValueError as error:
        raise UserError(
            f"the prompt is not a document: {error}", where=where, remedy="render it as training does"
        ) from (error)
    return track


class Scheduler:
    """Plans the steps of a rank's samples; `plan` and `finish_step` alternate until `is_done`."""

    def __init__(self, samples: Sequence[Sample], limits: GenerationLimits) -> None:
        self.limits = limits
        self.free = list(range(limits.blocks, SCRATCH, -1))
        self.waiting = deque(samples)
        self.running: list[Sample] = []
        self.segments: list[Segment] = []
        """Of the step that is being planned."""
        self.preemptions = 0

    @property
    def is_done(self) -> bool:
        return not self.waiting and not self.running

    def plan(self) -> list[Segment]:
        """Return the segments of the next step, those with the same number of tokens side by side."""
        self.segments, before, budget = [], self.preemptions, self.limits.step_tokens
        for sample in list(self.running):
            # A sample that was preempted for an older one is not running any more.
            if sample in self.running:
                budget -= self._feed(sample, budget)
        while self.waiting and budget > 0 and len(self.running) < self.limits.running and before == self.preemptions:
            sample = self.waiting[0]
            needed = sum(-(-sample.length(track) // BLOCK_TOKENS) for track in sample.tracks)
            if needed > len(self.free):
                break
            self.running.append(self.waiting.popleft())
            budget -= self._feed(sample, budget)
        return sorted(self.segments, key=lambda s: s.size)

    def _feed(self, sample: Sample, budget: int) -> int:
        """Plan the segments of a sample, as far as the budget goes; return their tokens.

        With two tracks, both reach their end in the same step, because their last logits are combined.
        """
        self._draft(sample)
        left = [sample.length(track) - track.cached for track in sample.tracks]
        is_last = sum(left) <= budget or max(left) == 1  # a sample whose prompt is done is never held up
        if not is_last:
            sample.drafts, sample.draft_positions = [], []
        used = 0
        for track, pending in zip(sample.tracks, left, strict=True):
            most = pending if len(sample.tracks) == 1 else pending - 1
            count = pending + len(sample.drafts) if is_last else min(most, budget - used)
            if count <= 0:
                continue
            if not self._reserve(sample, track, track.cached + count):
                return 0
            wanted = 1 + len(sample.drafts) if is_last else 0
            self.segments.append(Segment(sample, track, track.cached, track.cached + count, wanted))
            used += count
        return used

    def _reserve(self, sample: Sample, track: Track, tokens: int) -> bool:
        """Give a track blocks for so many tokens, of the youngest samples if none are free; False: it was preempted."""
        while len(track.blocks) * BLOCK_TOKENS < tokens:
            if not self.free:
                youngest = max(self.running, key=lambda s: s.order)
                self._preempt(youngest)
                if youngest is sample:
                    return False
                continue
            track.blocks.append(self.free.pop())
        return True

    def _preempt(self, sample: Sample) -> None:
        self._release(sample)
        self.running.remove(sample)
        self.segments = [segment for segment in self.segments if segment.sample is not sample]
        self.preemptions += 1
        # The queue is in order: whoever was preempted came before all that wait.
        self.waiting.appendleft(sample)
        self.waiting = deque(sorted(self.waiting, key=lambda s: s.order))

    def _release(self, sample: Sample) -> None:
        for track in sample.tracks:
            self.free += reversed(track.blocks)
            track.blocks, track.cached = [], 0

    def _draft(self, sample: Sample) -> None:
        """Draft the tokens that followed the last occurrence of the sequence's last tokens, while they are valid."""
        request, track = sample.request, sample.tracks[0]
        sample.drafts, sample.draft_positions = [], []
        most = min(self.limits.draft_tokens, request.max_tokens - len(sample.generated) - 1)
        if most < 1 or not sample.generated or len(sample.tracks) > 1:
            return
        ahead = Track([], list(track.positions), track.state)
        for token in _lookup(track.prompt + sample.generated, most):
            if request.grammar and not any(a <= token < b for a, b in request.grammar.allowed(ahead.state)):
                break
            _append(request.grammar, ahead, token)
            sample.drafts.append(token)
        sample.draft_positions = ahead.positions[len(track.positions) :]

    def finish_step(self, segments: Sequence[Segment]) -> list[Sample]:
        """Note what the step has cached; return the samples that are complete, whose blocks are free again.

        The accepted tokens have been added to the samples before. A cached token that was not accepted is overwritten.
        """
        for segment in segments:
            # The newest token is never cached yet: it is fed in the next step.
            segment.track.cached = min(segment.stop, segment.sample.length(segment.track) - 1)
        done = [sample for sample in self.running if sample.reason]
        for sample in done:
            self._release(sample)
            self.running.remove(sample)
        return done


def _lookup(sequence: list[int], most: int) -> list[int]:
    """Return at most `most` tokens that followed the last tokens of a sequence where they last occurred before."""
    for size in _LOOKUP:
        tail = sequence[-size:]
        for at in range(len(sequence) - size - 1, -1, -1):
            if sequence[at : at + size] == tail:
                return sequence[at + size : at + size + most]
    return []
