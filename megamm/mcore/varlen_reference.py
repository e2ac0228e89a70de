"""The operator of torch's varlen attention in plain torch on a CPU, for which torch has no kernel.

`register` adds it to torch's own operator, so that the public function, its autograd formula and what it saves are
those of a GPU. The contract is that of FlashAttention's kernels: what they require is checked, and what they leave
unwritten is NaN. Beyond it, float32 and float64 are allowed, so that tests can be exact.
Sources: Dao 2023 (FlashAttention-2): the backward pass computes the weights again from the log-sum-exp.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

BLOCK = 256
"""Queries whose scores are computed at once."""


@functools.cache
def register() -> None:
    """Add the CPU kernels to torch's operator; safe to call again."""
    import torch.nn.attention.varlen  # defines the operator

    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the result `[Tq, N, D]`, the log-sum-exp of each query's scores `[N, Tq]`, and an unused generator state.

    query `[Tq, N, D]`, key and value `[Tk, G, D]`; arguments are torch's.
    """
    assert cu_seq_k is not None and seqused_k is None and block_table is None and num_splits is None
    left = _left(is_causal, window_size)
    _check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    per_group, factor = query.shape[1] // key.shape[1], _scale(scale, query)
    assert enable_gqa or per_group == 1, "grouped queries"
    result = torch.full_like(query, torch.nan)
    exact = _exact(query.dtype)
    log_sum_exp = torch.full((query.shape[1], query.shape[0]), torch.nan, dtype=exact)
    for block in _blocks(cu_seq_q, cu_seq_k, left):
        scores = _scores(query, key, block, factor)
        of_block = scores.logsumexp(-1)
        weights = (scores - of_block[..., None]).exp()
        log_sum_exp[:, block.queries] = of_block.flatten(0, 1)
        context = torch.einsum("gpqk,kgd->qgpd", weights, value[block.keys].to(exact))
        result[block.queries] = context.flatten(1, 2).to(query.dtype)
    return result, log_sum_exp, torch.zeros(2, dtype=torch.uint64)


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: torch.Tensor,
    scale: float | None = None,
    window_size: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value; arguments are torch's."""
    left = _left(is_causal, window_size)
    _check(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    groups, factor, exact = key.shape[1], _scale(scale, query), _exact(query.dtype)
    gradients = [torch.full(x.shape, torch.nan, dtype=exact) for x in (query, key, value)]
    of_query, of_key, of_value = gradients
    for one in _sequences(cu_seq_q, cu_seq_k):
        # Keys that no query sees have the gradient 0.
        of_key[one.keys], of_value[one.keys] = 0, 0
    delta = (grad_out.to(exact) * out.to(exact)).sum(-1)
    for block in _blocks(cu_seq_q, cu_seq_k, left):
        q, gradient = (x[block.queries].to(exact).unflatten(1, (groups, -1)) for x in (query, grad_out))
        k, v = (x[block.keys].to(exact) for x in (key, value))
        per_query = (lse[:, block.queries], delta[block.queries].T)
        log_sum_exp, mean = (x.unflatten(0, (groups, -1))[..., None] for x in per_query)
        weights = (_scores(query, key, block, factor) - log_sum_exp).exp()
        of_value[block.keys] += torch.einsum("gpqk,qgpd->kgd", weights, gradient)
        of_scores = weights * (torch.einsum("qgpd,kgd->gpqk", gradient, v) - mean) * factor
        of_query[block.queries] = torch.einsum("gpqk,kgd->qgpd", of_scores, k).flatten(1, 2)
        of_key[block.keys] += torch.einsum("gpqk,qgpd->kgd", of_scores, q)
    dq, dk, dv = (x.to(query.dtype) for x in gradients)
    return dq, dk, dv


class _Sequence(NamedTuple):
    queries: slice
    keys: slice


class _Block(NamedTuple):
    """Some queries of a sequence, the keys of which they see any, and which they see: bool `[q, k]`."""

    queries: slice
    keys: slice
    seen: torch.Tensor


def _sequences(cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor) -> Iterator[_Sequence]:
    starts, key_starts = cu_seq_q.tolist(), cu_seq_k.tolist()
    for i in range(len(starts) - 1):
        yield _Sequence(slice(*starts[i : i + 2]), slice(*key_starts[i : i + 2]))


def _blocks(cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor, left: int) -> Iterator[_Block]:
    """Yield the blocks of all sequences that have queries; left: keys before a query that it sees, -1: all."""
    for queries, keys in _sequences(cu_seq_q, cu_seq_k):
        # The last query sees the last key.
        shift = (keys.stop - keys.start) - (queries.stop - queries.start)
        for start in range(0, queries.stop - queries.start, BLOCK):
            stop = min(start + BLOCK, queries.stop - queries.start)
            first = max(0, start + shift - left) if left >= 0 else 0
            position = torch.arange(start, stop)[:, None] + shift
            key = torch.arange(first, stop + shift)
            seen = key <= position
            if left >= 0:
                seen &= key >= position - left
            yield _Block(
                slice(queries.start + start, queries.start + stop),
                slice(keys.start + first, keys.start + stop + shift),
                seen,
            )


def _scores(query: torch.Tensor, key: torch.Tensor, block: _Block, scale: float) -> torch.Tensor:
    """Return the scaled scores `[G, N / G, q, k]` of a block, -inf where a key is not seen."""
    q, k = (x.to(_exact(query.dtype)) for x in (query[block.queries], key[block.keys]))
    scores = torch.einsum("qgpd,kgd->gpqk", q.unflatten(1, (key.shape[1], -1)), k) * scale
    return scores.masked_fill_(~block.seen, -torch.inf)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scale(scale: float | None, query: torch.Tensor) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _left(is_causal: bool, window_size: list[int] | None) -> int:
    """Return how many keys before its own a query sees, -1: all. It must see none behind itself."""
    left, right = window_size or (-1, -1)
    assert is_causal or right == 0, "attention that is not causal"
    return left


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
) -> None:
    """Check what the kernels require of their arguments."""
    (_, heads, size), (_, groups, _) = query.shape, key.shape
    assert key.shape[2] == size and value.shape == key.shape, "heads of one size"
    assert size % 8 == 0 and size <= 256, f"a head of {size} channels"
    assert heads % groups == 0, f"{heads} heads in {groups} groups"
    assert query.dtype == key.dtype == value.dtype
    assert all(x.stride(-1) == 1 for x in (query, key, value)), "the last axis is contiguous"
    for begins, tokens, most in ((cu_seq_q, query.shape[0], max_q), (cu_seq_k, key.shape[0], max_k)):
        assert begins.dtype == torch.int32 and begins.is_contiguous() and begins.shape == cu_seq_q.shape
        sizes = begins.diff()
        assert int(begins[0]) == 0 and int(begins[-1]) == tokens, "every token is in a sequence"
        assert bool((sizes >= 0).all()) and bool((sizes <= most).all()), "sizes of sequences"
    assert bool((cu_seq_k.diff() >= cu_seq_q.diff()).all()), "a query without a key"
