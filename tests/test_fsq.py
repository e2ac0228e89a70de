"""FSQ against an independent enumeration of its grid."""

import itertools

import pytest
import torch

from megamm.tokenizers.fsq import FSQ

LEVELS = [(8, 5, 5, 5), (3,), (2, 2), (4, 3, 7)]


def grid(levels):
    """Return every code in index order, first channel fastest: integers -(L//2) .. (L-1)//2 over L//2."""
    axes = [[(n - size // 2) / (size // 2) for n in range(size)] for size in levels]
    return torch.tensor([code[::-1] for code in itertools.product(*reversed(axes))])


@pytest.mark.parametrize("levels", LEVELS)
def test_indices_enumerate_the_grid_and_come_back(levels):
    quantiser, expected = FSQ(levels), grid(levels)
    indices = torch.arange(len(expected))
    assert quantiser.codebook_size == len(expected) == len(expected.unique(dim=0))
    assert torch.allclose(quantiser.to_codes(indices), expected)
    assert torch.equal(quantiser.to_indices(expected), indices)


@pytest.mark.parametrize("levels", LEVELS)
def test_any_latent_becomes_a_code_of_the_grid_and_every_code_is_reached(levels):
    latent = torch.randn(200_000, len(levels), generator=torch.Generator().manual_seed(0)) * 3
    codes = FSQ(levels)(latent)
    nearest = torch.cdist(codes, grid(levels)).min(dim=1)
    assert nearest.values.max() < 1e-3
    assert torch.equal(FSQ(levels).to_indices(codes), nearest.indices)
    assert len(nearest.indices.unique()) == len(grid(levels))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_rounding_follows_the_scalar_formula_of_the_paper(size):
    import math

    latent = torch.linspace(-4, 4, 997)[:, None]
    codes = FSQ((size,))(latent)[:, 0] * (size // 2)
    half, offset = (size - 1) * 1.001 / 2, 0.5 if size % 2 == 0 else 0.0
    for x, code in zip(latent[:, 0].tolist(), codes.tolist(), strict=True):
        bounded = half * math.tanh(x + math.atanh(offset / half)) - offset
        assert abs(code - bounded) <= 0.5 + 1e-5 and -(size // 2) <= round(code) <= (size - 1) // 2


def test_the_gradient_is_that_of_the_bound_alone():
    quantiser = FSQ((8, 5, 5, 5))
    latent = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(32, 4, generator=torch.Generator().manual_seed(2))
    through, straight = latent.clone().requires_grad_(), latent.clone().requires_grad_()
    quantiser(through).backward(upstream)
    (quantiser.bound(straight) / torch.tensor([4, 2, 2, 2])).backward(upstream)
    assert torch.allclose(through.grad, straight.grad, atol=1e-6) and through.grad.abs().min() > 0


def test_refuses_a_channel_without_choice():
    with pytest.raises(ValueError, match="two levels"):
        FSQ((8, 1))
