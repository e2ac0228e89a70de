"""Shared by tests of operators: other layouts of the same numbers, and runs that must be bit-identical."""

from collections.abc import Callable, Sequence

import torch

LAYOUTS = {
    "halves": lambda x: torch.cat([x, x], -1)[..., x.shape[-1] :],
    "unaligned": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}
"""Name -> a view with the shape of x `[A, B, N]` and its numbers ("expanded": those of x[0], A times)."""


def assert_same_bits_for_any_threads(run: Callable[[], Sequence[torch.Tensor]]) -> None:
    """Check that run() gives identical tensors again, and with two and three threads."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
