"""One rank's work for the tests of generation: an engine with weights that depend on their names, and its answers."""

import zlib
from dataclasses import dataclass, field

import numpy as np
import torch

from megamm.common.device import choose
from megamm.engine.build import build_engine
from megamm.mcore import process_groups, shard_specs
from megamm.model.generation import GeneratedTokens, GenerationLimits, GenerationRequest
from megamm.model.grammar import DocumentGrammar, DocumentState
from megamm.model.sampling import TokenChoice, TokenSampling, choose_tokens
from megamm.model.vocabulary import Vocabulary
from megamm.parity.case import Case

SIZE = 301
VOCABULARY = Vocabulary.of({"text": (200, "t"), "image": (29, "v"), "audio": (40, "a")})
assert VOCABULARY.size == SIZE


@dataclass(frozen=True)
class ToyMedium:
    """The parts of a modality that the grammar reads: a grid of rows of `stride` ids, of fixed or variable length."""

    vocabulary_size: int
    tokens_per_item: int | None
    stride: int
    levels: int = 1

    def positions(self, length):
        index = np.arange(length)
        return np.stack([index // self.stride, index % self.stride, index * 0])

    def valid_token_ids(self, index):
        size = self.vocabulary_size // self.levels
        return range(index % self.levels * size, index % self.levels * size + size)


TOYS = {"text": ToyMedium(200, None, 1), "image": ToyMedium(29, 6, 3), "audio": ToyMedium(40, None, 2, 2)}


def grammar(outputs=("text", "image", "audio"), longest=48):
    return DocumentGrammar(VOCABULARY, TOYS, outputs, longest)


@dataclass(frozen=True)
class GenerationJob:
    """Requests of each call of generate, with its limits."""

    case: Case
    calls: dict[str, tuple[list[GenerationRequest], GenerationLimits]]
    compares: bool = False
    """Whether to run each answer without a cache too, by the forward pass of training."""


@dataclass
class Answers:
    """Answers of each call; plain: the ids that the forward pass of training gives, and the largest difference."""

    made: dict[str, list[list[GeneratedTokens]]] = field(default_factory=dict)
    plain: dict[str, list[list[list[int]]]] = field(default_factory=dict)
    logprob_error: float = 0.0
    streamed: list[tuple[int, int, int]] = field(default_factory=list)


def requests(temperature, guidance=1.0, count=6, **settings):
    """Requests of mixed lengths: text, then whatever the grammar admits."""
    rng = np.random.default_rng(3)
    found = []
    for number in range(count):
        text = rng.integers(0, 200, 2 + 3 * number % 11).tolist()
        prompt = [VOCABULARY.document_start, *text]
        sampling = TokenSampling(temperature=temperature, **settings)
        found.append(
            GenerationRequest(
                prompt,
                12 + number,
                sampling,
                7 + number,
                1 + number % 2,
                grammar=grammar(),
                guidance=guidance,
                without=prompt[:1] if guidance != 1 else (),
            )
        )
    return found


def generate(job):
    """Run the job; every rank of a world calls it."""
    config = job.case.config
    groups = process_groups.build(config.parallel, seed=1)
    engine = build_engine(config, SIZE, groups, choose("cpu"))
    set_weights(engine, groups)
    result = Answers()
    for name, (asked, limits) in job.calls.items():
        result.made[name] = engine.generate(
            asked, limits, with_logprobs=True, on_token=lambda *token: result.streamed.append(token)
        )
        if job.compares:
            result.plain[name] = [
                [plain(engine, request, answer, result) for answer in answers]
                for request, answers in zip(asked, result.made[name], strict=True)
            ]
    assert all(chunk.training for chunk in engine.chunks)
    return result


def set_weights(engine, groups):
    """Set weights by name, the same at every layout, and without the symmetries of an initialisation."""
    for chunk in engine.chunks:
        for spec in shard_specs.of(chunk.module, groups):
            rng = np.random.default_rng(zlib.crc32(spec.key.encode()))
            whole = torch.from_numpy(rng.standard_normal(spec.shape)).float() * 0.15
            whole = 1 + 0.2 * whole if "norm" in spec.key else whole
            box = whole[tuple(slice(start, start + n) for start, n in zip(spec.offset, spec.size, strict=True))]
            spec.tensor.data.view(-1)[spec.start : spec.stop].view(spec.size).copy_(box)


@torch.no_grad()
def plain(engine, request, answer, result):
    """Return the ids of an answer as the forward pass of training gives them, token by token; only one sample."""
    (chunk,) = [chunk.module.eval() for chunk in engine.chunks]
    ids = [*request.prompt, *answer.ids]
    positions, states, state = [], [], DocumentState()
    for token in ids:
        states.append(state)
        positions.append(request.grammar.position(state, token))
        state = request.grammar.advance(state, token)
    metadata = torch.cat((torch.zeros(1, len(ids), dtype=torch.int64), torch.tensor(positions).T), 0)[None]
    logits = chunk(torch.tensor([ids]), None, metadata)[0, :, :SIZE]
    chunk.train()
    chosen, start = [], len(request.prompt)
    for number, token in enumerate(answer.ids):
        at = start + number
        choice = TokenChoice(request.sampling, request.seed, number, request.grammar.allowed(states[at]), ids[:at])
        picked = choose_tokens(logits[at - 1 : at], [choice])
        chosen.append(int(picked.ids))
        theirs = float(logits[at - 1].log_softmax(0)[token])
        result.logprob_error = max(result.logprob_error, abs(theirs - answer.logprobs[number]))
    return chosen
