"""Similarity of two pictures: PSNR in dB and SSIM, for uint8 `[N, Y, X, 3]` and its reconstruction."""

import math

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
"""Luma weights of R'G'B' (ITU-R BT.601), used for SSIM: the paper defines it for grey images only."""
WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr_db(squared_error: float) -> float:
    """PSNR from the mean squared error of 8-bit values: 10 log10(255^2 / MSE), at most 148 dB (instead of inf)."""
    return 10 * math.log10(255**2 / max(squared_error, 1e-10))


def ssim(pictures: Tensor, others: Tensor) -> Tensor:
    """Mean SSIM of each pair of uint8 `[N, Y, X, 3]`, float64 `[N]`; Y and X at least 11.

    Source: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity", equation 13,
    with its constants: a Gaussian window of 11 x 11 (sigma 1.5), averaged over the positions where it fits.
    """
    x, y = _luma(pictures), _luma(others)
    mean_x, mean_y, xx, yy, xy = (_windowed(each) for each in (x, y, x * x, y * y, x * y))
    var_x, var_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    likeness /= (mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2)
    return likeness.mean((1, 2, 3))


def _luma(pictures: Tensor) -> Tensor:
    """Luma `[N, 1, Y, X]` in float64: small variances are differences of large numbers."""
    return (pictures.double() @ torch.tensor(LUMA, dtype=torch.float64, device=pictures.device)).unsqueeze(1)


def _windowed(values: Tensor) -> Tensor:
    """Gaussian means `[N, 1, Y - 10, X - 10]`; the window is the product of a column and a row."""
    at = torch.arange(WINDOW, dtype=torch.float64, device=values.device) - WINDOW // 2
    weights = torch.exp(-(at**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    columns = torch.nn.functional.conv2d(values, weights.view(1, 1, -1, 1))
    return torch.nn.functional.conv2d(columns, weights.view(1, 1, 1, -1))
