"""Vocabulary-parallel cross entropy against one rank's: the code of each of four ranks (parity/worlds.py).

Cases with two ranks run in two groups at once. Every rank holds its rows of one weight, adds its part of hidden's
gradient to the others' and compares with the float64 reference of the whole.
"""

from itertools import product
from typing import Any

import torch
import torch.distributed as dist

from megamm.ops import CSRC, TORCH, library

assert not library.load(), library.load()
CHUNKED, PLAIN = CSRC.linear_cross_entropy, TORCH.linear_cross_entropy
# (ranks, rows of weight on a rank, vocabulary): no padding, some, and so much that a rank has only padding.
SPLITS = [(2, 17, 34), (2, 31, 59), (4, 9, 33), (4, 2, 5)]
CASES = {
    f"{implementation}-tp{split[0]}-{split[2]}-{dtype}": (implementation, split, dtype)
    for implementation, split, dtype in product(("chunked", "plain"), SPLITS, ("float64", "float32", "bfloat16"))
}


def inputs(seed: int, tokens: int, width: int, rows: int, vocabulary: int) -> tuple[torch.Tensor, ...]:
    """Return hidden, weight, labels (some ignored) and token weights; float64 of values that bfloat16 can hold."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).bfloat16().double()
    weight = torch.randn(rows, width, generator=generator).bfloat16().double()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.2] = -100
    return hidden, weight, labels, torch.rand(tokens, generator=generator)


def run(function: Any, hidden: torch.Tensor, weight: torch.Tensor, *labels: Any, **options: Any) -> list[torch.Tensor]:
    """Return loss, token losses and both gradients."""
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    loss, token_loss = function(*leaves, *labels, **options)
    return [loss.detach(), token_loss, *torch.autograd.grad(loss, leaves)]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-30))


def errors(seed: int, case: tuple[Any, ...], group: dist.ProcessGroup) -> list[float]:
    implementation, (ranks, local, vocabulary), dtype = case
    hidden, weight, *labels = inputs(seed, 29, 11, ranks * local, vocabulary)
    given: dict[str, Any] = {"vocabulary_size": vocabulary}
    expected = run(PLAIN, hidden, weight, *labels, **given)
    own = slice(group.rank() * local, (group.rank() + 1) * local)
    function = PLAIN if implementation == "plain" else CHUNKED
    given |= {"group": group} if implementation == "plain" else {"group": group, "chunk_rows": 8}
    kind = getattr(torch, dtype)
    ours, again = (run(function, hidden.to(kind), weight[own].to(kind), *labels, **given) for _ in range(2))
    if any(not torch.equal(x, y) for x, y in zip(ours, again, strict=True)):
        return [float("inf")] * 4
    ours[2] = ours[2].double()
    dist.all_reduce(ours[2], group=group)
    expected[3] = expected[3][own]
    return [relative_error(x, y) for x, y in zip(ours, expected, strict=True)]


def errors_of_cases(_: None) -> dict[str, list[float]]:
    """Return each case's largest relative errors over all ranks: loss, token losses, gradients of hidden and weight.

    They are infinite where two runs differ in a bit.
    """
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    results = {}
    for seed, (name, case) in enumerate(CASES.items()):
        group = pairs[dist.get_rank() // 2] if case[1][0] == 2 else dist.group.WORLD
        worst = torch.tensor(errors(seed, case, group))
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        results[name] = worst.tolist()
    return results
