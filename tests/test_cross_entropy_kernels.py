"""Cross entropy's kernels against float64: a row's statistics, and its gradient in place.

They are called through torch.ops, so that the sources for a GPU run here too (conftest.py: kernels).
"""

from typing import Any

import pytest
import torch
from op_checks import assert_same_bits_for_any_threads

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Compare relative to the largest value."""
    largest = float(theirs.abs().amax()) if theirs.numel() else 0.0
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * largest)


def in_float64(logits: torch.Tensor, target: torch.Tensor, factor: torch.Tensor) -> list[torch.Tensor]:
    """Return statistics and gradient of rows that may have further columns on other ranks."""
    x = logits.double()
    maximum, log_sum = x.amax(1), x.logsumexp(1)
    picked = x.gather(1, target.clamp(min=0)[:, None])[:, 0].where(target >= 0, 0.0)
    hot = torch.zeros_like(x).scatter_(1, target.clamp(min=0)[:, None], (target >= 0).double()[:, None])
    statistics = torch.stack([maximum, (log_sum - maximum).exp(), picked], 1)
    return [statistics, factor.double()[:, None] * (x.softmax(1) - hot)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "columns", "stride", "offset"),
    [(5, 4200, 4224, 0), (3, 4097, 4097, 0), (70, 33, 48, 0), (4, 9000, 9000, 3), (2, 1, 1, 0), (0, 8, 8, 0)],
    ids=str,
)
def test_kernels(kernels: Any, rows: int, columns: int, stride: int, offset: int, dtype: torch.dtype) -> None:
    """Rows of whole vectors or not, at aligned addresses or not, longer and shorter than a block of either kind."""
    generator = torch.Generator().manual_seed(columns)
    values = (torch.randn(rows * stride + offset, generator=generator) * 3).to(dtype)
    math = torch.float64 if dtype == torch.float64 else torch.float32
    target = torch.randint(-1, columns, (rows,), generator=generator)
    factor = torch.randn(rows, generator=generator, dtype=math)
    factor[:1] = 0.0
    buffer = values.to(kernels.device)
    logits = buffer[offset:].view(rows, stride)[:, :columns]
    statistics, gradient = in_float64(logits.cpu(), target, factor)
    ours = torch.full((rows, 3), torch.nan, dtype=math, device=kernels.device)
    kernels.ops.cross_entropy_statistics(logits, target.to(kernels.device), ours)
    kernels.ops.cross_entropy_gradient_(logits, target.to(kernels.device), ours, factor.to(kernels.device))
    close(ours.cpu(), statistics, TOLERANCE[math] * columns**0.5)
    close(logits.cpu(), gradient, TOLERANCE[dtype])
    outside = torch.ones(rows * stride + offset, dtype=torch.bool)
    outside[offset:].view(rows, stride)[:, :columns] = False
    assert torch.equal(buffer.cpu()[outside], values[outside])


def test_kernels_on_what_is_not_finite(kernels: Any) -> None:
    """Rows with one finite value, all -inf, inf, a NaN at any position, and a NaN in an ignored row."""
    logits = torch.randn(7, 5000)
    logits[0, :4999] = logits[1] = -torch.inf
    logits[2, 4000] = torch.inf
    logits[3, 0] = logits[4, 2500] = logits[5, 4999] = logits[6, 7] = torch.nan
    target, factor = torch.zeros(7, dtype=torch.int64), torch.ones(7)
    factor[6] = 0.0
    _, gradient = in_float64(logits, target, factor)
    gradient[6] = 0.0
    ours, written = torch.empty(7, 3, device=kernels.device), logits.clone().to(kernels.device)
    target, factor = target.to(kernels.device), factor.to(kernels.device)
    kernels.ops.cross_entropy_statistics(written, target, ours)
    kernels.ops.cross_entropy_gradient_(written, target, ours, factor)
    assert ours[:2, :2].tolist() == [[logits[0, 4999].item(), 1.0], [-torch.inf, 0.0]]
    assert ours[2:, 1].isnan().all()
    torch.testing.assert_close(written.cpu().double(), gradient, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_bitwise_the_same_for_any_number_of_threads(kernels: Any, dtype: torch.dtype) -> None:
    logits = torch.randn(40, 999).to(dtype)
    target, factor = torch.randint(-1, 999, (40,)), torch.rand(40)

    def run():
        moved = [x.to(kernels.device) for x in (logits.clone(), target, torch.empty(40, 3), factor)]
        kernels.ops.cross_entropy_statistics(*moved[:3])
        kernels.ops.cross_entropy_gradient_(*moved)
        return [moved[0], moved[2]]

    assert_same_bits_for_any_threads(run)
