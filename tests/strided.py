"""The same numbers in other layouts: what an operator may be given besides contiguous tensors."""

import torch

LAYOUTS = {
    "halves": lambda x: torch.cat([x, x], -1)[..., x.shape[-1] :],
    "unaligned": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}
"""Name -> a view of the shape of x `[A, B, N]` with its numbers ("expanded": those of x[0], A times)."""
