"""Adds the product of two matrices to a sum with a wider dtype, as gradients of weights are accumulated.

A product of bfloat16 factors that is rounded to bfloat16 before it is added loses what the sum could hold, and takes a
pass over memory of its own.
"""

import torch
from torch import Tensor

BLOCK = 1024
"""Rows of the sum that a CPU computes at once, to need little extra memory."""


def add_product_(total_NK: Tensor, rows_MN: Tensor, columns_MK: Tensor) -> None:
    """Add `rows^T columns` to the total, with sums in the total's dtype.

    On a GPU this is one product with beta = 1. A CPU has no product with factors of a narrower dtype than its result:
    it widens the factors first.
    """
    if total_NK.dtype == rows_MN.dtype:
        total_NK.addmm_(rows_MN.t(), columns_MK)
    elif total_NK.device.type == "cpu":
        wide = columns_MK.to(total_NK.dtype)
        for part, rows in zip(total_NK.split(BLOCK), rows_MN.split(BLOCK, 1), strict=True):
            part.addmm_(rows.t().to(total_NK.dtype), wide)
    else:
        torch.addmm(total_NK, rows_MN.t(), columns_MK, out_dtype=total_NK.dtype, out=total_NK)
