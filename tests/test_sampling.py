"""Choosing tokens: settings as transformers applies them, noise that depends on (seed, position), and the grammar."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from generation_worker import TOYS, VOCABULARY, ToyMedium
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megamm.common.errors import UserError
from megamm.common.sample import Document, Part
from megamm.data.pipeline.packing import PackingSpec, document_length, pack
from megamm.model.grammar import DocumentGrammar, DocumentState
from megamm.model.sampling import TokenChoice, TokenSampling, choose_tokens, sample_seed

SETTINGS = {
    "temperature": TokenSampling(temperature=0.7),
    "top-k": TokenSampling(temperature=1.3, top_k=5),
    "top-p": TokenSampling(top_p=0.6),
    "top-k, top-p": TokenSampling(top_k=9, top_p=0.5),
    "min-p": TokenSampling(min_p=0.2),
    "all": TokenSampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.4),
}


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
def test_settings_are_those_of_transformers(sampling):
    logits = 3 * torch.randn(64, 50, generator=torch.Generator().manual_seed(4))
    previous = [3, 8, 8, 21]
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    theirs += [TemperatureLogitsWarper(sampling.temperature)]
    theirs += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    theirs += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    theirs += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    expected = theirs(torch.tensor([previous]).expand(64, -1), logits.clone()).log_softmax(1)
    raw = logits.log_softmax(1)
    seen: list[set[int]] = [set() for _ in logits]
    for seed in range(200):
        choices = [TokenChoice(sampling, seed, row, None, previous) for row in range(64)]
        chosen = choose_tokens(logits, choices)
        at = chosen.ids[:, None]
        torch.testing.assert_close(chosen.sampled_logprob, expected.gather(1, at)[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(chosen.logprob, raw.gather(1, at)[:, 0], atol=1e-5, rtol=1e-5)
        for row, token in enumerate(chosen.ids.tolist()):
            seen[row].add(token)
    # Whatever transformers leaves and is not rare is drawn.
    for row, tokens in enumerate(seen):
        assert set((expected[row] > math.log(0.05)).nonzero()[:, 0].tolist()) <= tokens


def test_draws_follow_the_softmax_also_in_its_tail():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -6.0, -torch.inf])
    rows = 200_000
    choices = [TokenChoice(TokenSampling(), seed % 500, seed // 500) for seed in range(rows)]
    drawn = choose_tokens(logits.expand(rows, -1), choices, with_logprobs=False).ids
    observed, expected = torch.bincount(drawn, minlength=6), logits.softmax(0) * rows
    assert observed[5] == 0
    chi_square = ((observed[:5] - expected[:5]) ** 2 / expected[:5]).sum().item()
    assert chi_square < 18.5  # four degrees of freedom: 0.999 quantile


def test_a_draw_depends_on_seed_and_position_only():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    choices = [TokenChoice(TokenSampling(top_k=1 + 7 * (i % 2)), i, 3 * i, ((5, 9), (12, 30))) for i in range(6)]
    together = choose_tokens(logits, choices).ids.tolist()
    assert together == [int(choose_tokens(logits[i : i + 1], choices[i : i + 1]).ids) for i in range(6)]
    assert all(5 <= token < 9 or 12 <= token < 30 for token in together)
    flat = torch.zeros(1, 1000)
    draws = {int(choose_tokens(flat, [TokenChoice(TokenSampling(), s, p)]).ids) for s in range(8) for p in range(8)}
    assert len(draws) > 55
    assert len({sample_seed(5, n) for n in range(100)}) == 100
    assert sample_seed(5, 0) == 5


def test_bias_and_greedy_settings():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    assert int(choose_tokens(logits, [TokenChoice(TokenSampling(0.0), 1, 1)]).ids) == 1
    biased = TokenSampling(0.0, logit_bias=((1, -5.0), (2, 1.5)))
    assert int(choose_tokens(logits, [TokenChoice(biased, 1, 1)]).ids) == 2
    assert logits.tolist() == [[0.0, 3.0, 1.0, 2.0]]


@pytest.mark.parametrize(
    "setting", [{"temperature": -1.0}, {"top_p": 0.0}, {"min_p": 1.5}, {"repetition_penalty": 0.0}, {"top_k": -1}]
)
def test_a_setting_out_of_range_is_a_user_error(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        TokenSampling(**setting)


def random_grammar(rng):
    """A grammar with random lengths of parts, outputs and room."""
    levels = int(rng.integers(1, 3))
    toys = {
        "text": TOYS["text"],
        "image": ToyMedium(29, int(rng.integers(1, 4)) * 2, 2),
        "audio": ToyMedium(40, None, levels * int(rng.integers(1, 3)), levels),
    }
    outputs = [name for name in toys if rng.random() < 0.6] or ["audio"]
    return DocumentGrammar(VOCABULARY, toys, outputs, int(rng.integers(2, 40)), bool(rng.random() < 0.2)), toys


def test_a_thousand_random_documents_are_those_of_training():
    complete = 0
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        grammar, toys = random_grammar(rng)
        state, ids, positions = DocumentState(), [], []
        while allowed := grammar.allowed(state):
            choices = np.concatenate([np.arange(*bounds) for bounds in allowed])
            token = int(rng.choice(choices))
            if len(choices) > 2 and rng.random() < 0.3:  # marks are rare among so many ids
                token = int(rng.choice(choices[choices >= 200]) if (choices >= 200).any() else token)
            assert (grammar.forced(state) == token) == (len(choices) == 1)
            ids.append(token)
            positions.append(grammar.position(state, token))
            state = grammar.advance(state, token)
        assert len(ids) <= grammar.longest
        if ids[-1] != grammar.end:
            assert grammar.single
            continue
        complete += 1
        document = parsed(ids, grammar)
        specs = {n: PackingSpec(t.positions, t.tokens_per_item is not None) for n, t in toys.items()}
        specs["text"] = PackingSpec(lambda length: np.tile(np.arange(length), (3, 1)), False)
        row = pack([document], VOCABULARY, len(ids), specs)
        assert row.input_ids.tolist() == ids
        assert row.position.T.tolist() == [list(p) for p in positions]
    assert complete > 700


def parsed(ids, grammar):
    """The parts of a complete document, by hand."""
    parts, at = [], 1
    while ids[at] != grammar.end:
        name = grammar.begins.get(ids[at], "text")
        start = at + (name != "text")
        stop = start
        first, size = VOCABULARY[name].start, VOCABULARY[name].size
        while first <= ids[stop] < first + size:
            stop += 1
        parts.append(Part(name, np.array(ids[start:stop]) - first))
        at = stop + (name != "text")
    document = Document("d", parts)
    assert document_length(*document.sizes) == len(ids)
    return document


def test_ids_that_belong_to_no_document_are_refused():
    grammar = DocumentGrammar(VOCABULARY, TOYS, ["text"], 40)
    with pytest.raises(ValueError, match="id 231 is not valid at index 0"):
        grammar.advance(DocumentState(), 231)
    with pytest.raises(UserError, match="no modality 'video'"):
        DocumentGrammar(VOCABULARY, TOYS, ["video"], 40)
    bare = dataclasses.replace(VOCABULARY, ranges=VOCABULARY.ranges[:1])
    with pytest.raises(UserError, match="no control ids"):
        DocumentGrammar(bare, {"text": TOYS["text"]}, ["text"], 40)
