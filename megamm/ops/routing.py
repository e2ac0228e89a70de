"""Rows of experts: a token has one for each expert that it is sent to, and rows are sorted by expert.

    gather:   rows[r] = tokens[token[r]]
    combine:  tokens[t] = sum of the rows r with token[r] = t

Each is the gradient of the other, and both read rows instead of adding to them: there are no atomics, so that results
have the same bits every time. Nothing here waits for the device.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Order(NamedTuple):
    """A permutation of R rows: row r of the result is row source[r], which row i becomes row target[i]. int64 `[R]`."""

    source: Tensor
    target: Tensor

    def reversed(self) -> "Order":
        return Order(self.target, self.source)


class Rows(NamedTuple):
    """Rows of a routing map `[T, E]`, sorted by expert, then by token. All int64, `[R]` or `[T]`."""

    token: Tensor
    """Token of each row."""
    choice: Tensor
    """Index of each row's token and expert in the flattened map."""
    by_token: Tensor
    """Rows in the order of tokens, then of experts."""
    first: Tensor
    """Index in by_token of each token's first row, `[T]`."""


def sort(keys: Tensor) -> Order:
    """The stable order that sorts keys, integers `[R]` from 0 to 32767."""
    source = keys.to(torch.int16).argsort(stable=True)  # the time of a GPU's sort grows with the width of the keys
    numbers = torch.arange(len(keys), device=keys.device)
    return Order(source, torch.empty_like(source).scatter_(0, source, numbers))


def rows_of(routing_map: Tensor, number: int) -> Rows:
    """routing_map bool `[T, E]`: which tokens are sent to which experts; `number` of its elements are true."""
    experts = routing_map.shape[1]
    choice = torch.nonzero_static(routing_map.flatten(), size=number).squeeze(1)  # by token, then by expert
    order = sort(choice % experts)
    choice = choice.index_select(0, order.source)
    of_token = routing_map.sum(1)
    return Rows(choice.div(experts, rounding_mode="floor"), choice, order.target, of_token.cumsum(0) - of_token)


def gather(tokens: Tensor, rows: Rows) -> Tensor:
    """tokens `[T, H]` -> `[R, H]`."""
    result: Tensor = _Gather.apply(tokens, *rows)
    return result


def combine(values: Tensor, rows: Rows) -> Tensor:
    """The sum of the rows of each token, `[R, H]` -> `[T, H]`; it is rounded once. 0 for a token without rows."""
    result: Tensor = _Combine.apply(values, *rows)
    return result


def reorder(x: Tensor, order: Order) -> Tensor:
    """x `[R, ...]` with its rows in another order."""
    result: Tensor = _Reorder.apply(x, *order)
    return result


def _sums(values: Tensor, by_token: Tensor, first: Tensor) -> Tensor:
    if not len(values):
        return values.new_zeros(len(first), values.shape[1])
    # Detached, torch keeps nothing for a backward pass of its own.
    return F.embedding_bag(by_token, values.detach().contiguous(), first, mode="sum")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token: Tensor, _: Tensor, by_token: Tensor, first: Tensor) -> Tensor:
        ctx.save_for_backward(by_token, first)
        return tokens.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _sums(gradients[0], *ctx.saved_tensors), None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, token: Tensor, _: Tensor, by_token: Tensor, first: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return _sums(values, by_token, first)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None, None, None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(target)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None
