"""The choice of the next token from logits: penalties, cut-offs, and noise that depends only on (seed, position).

A token is drawn by the Gumbel-max method: the largest sum of score and noise is a draw from the softmax of the scores
(Gumbel 1954; Maddison et al. 2014). The noise of a token is a hash of (seed, position, token id), so the draw depends
neither on the batch, nor on the order of calls, nor on the layout; it is the same on every device.

Order of the settings, as in transformers: repetition penalty, logit bias, valid ids, temperature, top-k, top-p, min-p.
Sources: Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p); Keskar et al. 2019 (repetition penalty); Steele et
al. 2014 (SplitMix64).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from megamm.common.errors import UserError

IdRanges = tuple[tuple[int, int], ...]
"""Ids in ascending ranges (start, stop)."""
_MASK = 2**64 - 1
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The constants of SplitMix64."""


@dataclass(frozen=True)
class TokenSampling:
    """Sampling settings of one request.

    temperature 0 takes the most likely token; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off. logit_bias:
    (token id, amount that is added to its logit). UserError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (0 <= self.temperature < math.inf, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
            "logit_bias": (not any(math.isnan(bias) for _, bias in self.logit_bias), "numbers"),
        }
        for name, (is_valid, remedy) in bounds.items():
            if not is_valid:
                what = f"invalid sampling setting {name} = {getattr(self, name)}"
                raise UserError(what, remedy=f"{name} must be {remedy}")

    @property
    def cuts(self) -> bool:
        """Whether any cut-off is on."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class TokenChoice:
    """What decides one token: settings, the item's seed, the token's index in its sequence, and the valid ids.

    valid None: all ids. previous: the ids before it, which the repetition penalty and nothing else reads.
    """

    sampling: TokenSampling
    seed: int
    position: int
    valid: IdRanges | None = None
    previous: Sequence[int] = ()


class ChosenTokens(NamedTuple):
    """Chosen ids int64 `[B]`, and float32 `[B]`: their log-probabilities by the model, and as they were sampled.

    sampled_logprob: after all settings and within the valid ids; at temperature 0 as at temperature 1.
    """

    ids: torch.Tensor
    logprob: torch.Tensor
    sampled_logprob: torch.Tensor


def choose_tokens(logits_BV: torch.Tensor, choices: Sequence[TokenChoice], with_logprobs: bool = True) -> ChosenTokens:
    """Choose a token for every row of logits (floating point, without padding of the vocabulary).

    Without log-probabilities these are NaN, which saves a pass over the logits.
    """
    logits = logits_BV.float()
    ids = torch.empty(len(choices), dtype=torch.int64, device=logits.device)
    own = torch.full((len(choices),), math.nan, device=logits.device)
    sampled = own.clone()
    groups: dict[tuple[TokenSampling, IdRanges | None], list[int]] = {}
    for row, choice in enumerate(choices):
        groups.setdefault((choice.sampling, choice.valid), []).append(row)
    for (sampling, valid), rows in groups.items():
        is_all = len(rows) == len(choices)
        part = logits if is_all else logits[rows]
        chosen = [choices[row] for row in rows]
        scores, start = _scores(part, sampling, valid, chosen)
        scores = _cut(scores, sampling) if sampling.temperature > 0 else scores
        local = (scores + _noise(chosen, start, scores) if sampling.temperature > 0 else scores).argmax(1)
        at = slice(None) if is_all else torch.tensor(rows, device=logits.device)
        ids[at] = local + start
        if with_logprobs:
            own[at] = part.gather(1, (local + start)[:, None])[:, 0] - part.logsumexp(1)
            sampled[at] = scores.gather(1, local[:, None])[:, 0] - scores.logsumexp(1)
    return ChosenTokens(ids, own, sampled)


def _scores(
    logits: torch.Tensor, sampling: TokenSampling, valid: IdRanges | None, choices: Sequence[TokenChoice]
) -> tuple[torch.Tensor, int]:
    """Return the logits of the ids from the first to the last valid one, with penalty and bias, and the first id."""
    if sampling.repetition_penalty != 1 or sampling.logit_bias:
        logits = logits.clone()
    if sampling.repetition_penalty != 1:
        for row, choice in enumerate(choices):
            seen = torch.tensor(sorted(set(choice.previous)), dtype=torch.int64, device=logits.device)
            score = logits[row, seen]
            factor = sampling.repetition_penalty
            logits[row, seen] = torch.where(score < 0, score * factor, score / factor)
    for token, bias in sampling.logit_bias:
        logits[:, token] += bias
    if valid is None:
        return logits, 0
    start, stop = valid[0][0], valid[-1][1]
    scores = logits[:, start:stop]
    if len(valid) > 1:
        scores = scores.clone()
        for (_, end), (following, _) in pairwise(valid):
            scores[:, end - start : following - start] = -math.inf
    return scores, start


def _cut(scores: torch.Tensor, sampling: TokenSampling) -> torch.Tensor:
    """Divide by the temperature, and exclude the ids below the cut-offs; ids that tie with the last one stay."""
    scores = scores / sampling.temperature
    if not sampling.cuts:
        return scores
    # In descending order, which is cut to the first `top_k`: top-p and min-p are of what top-k leaves.
    count = min(sampling.top_k or scores.shape[1], scores.shape[1])
    if sampling.top_p < 1:
        ordered = scores.topk(count).values if sampling.top_k else scores.sort(descending=True).values
        share = ordered.softmax(1)
        is_kept = share.cumsum(1) - share < sampling.top_p
        is_kept[:, 0] = True
        limit = torch.where(is_kept, ordered, math.inf).amin(1, keepdim=True)
    elif sampling.top_k:
        limit = scores.topk(count).values[:, -1:]
    else:
        limit = torch.full_like(scores[:, :1], -math.inf)
    if sampling.min_p > 0:
        limit = torch.maximum(limit, scores.amax(1, keepdim=True) + math.log(sampling.min_p))
    return scores.masked_fill(scores < limit, -math.inf)


def _noise(choices: Sequence[TokenChoice], start: int, like: torch.Tensor) -> torch.Tensor:
    """Return standard Gumbel noise `[B, ids]` for the ids from `start` on.

    The hash gives v in (0, 1), and -log(1 - v) is an exponential draw. Of the smallest draws, which win, float32 keeps
    all digits, so that no tail is cut off.
    """
    keys = torch.tensor([_signed(noise_key(c.seed, c.position)) for c in choices], device=like.device)
    index = torch.arange(start, start + like.shape[1], device=like.device)
    mixed = (index * _signed(_GOLDEN)).add(keys[:, None])
    mixed ^= (mixed >> 30) & (2**34 - 1)
    mixed *= _signed(_MIX1)
    mixed ^= (mixed >> 27) & (2**37 - 1)
    mixed *= _signed(_MIX2)
    mixed ^= (mixed >> 31) & (2**33 - 1)
    v = ((mixed >> 1) & (2**63 - 1)).float().add_(0.5).mul_(2.0**-63).clamp_(max=1 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()


def noise_key(seed: int, position: int) -> int:
    """Return the 64 bits from which the noise at a position of an item is hashed."""
    return _mix((_mix(seed) + position * _GOLDEN) & _MASK)


def sample_seed(seed: int, number: int) -> int:
    """Return the seed of one of several samples of the same request; the first has the request's own."""
    return seed if number == 0 else _mix((seed ^ _mix(number)) & _MASK)


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _MIX1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX2) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    """Return the signed integer of the same 64 bits."""
    return value - 2**64 if value >= 2**63 else value
