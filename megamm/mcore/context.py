"""Context parallel: a row's tokens split over ranks.

The split is a zigzag: of n ranks' 2n equal chunks of a row, rank r holds chunks r and 2n - 1 - r, so that
under a causal mask every rank has the same work.
Source: Brandon et al. 2023 ("Striped Attention", section 3, on the balance); the zigzag order is Megatron-core's.
"""

import torch


def local_index(length: int, rank: int, size: int, device: torch.device) -> torch.Tensor:
    """Index in the row of each token of context rank `rank`, int64 `[S / size]`, ascending.

    The length must be a multiple of 2 * size where size > 1 (layout.check sees to it).
    """
    index = torch.arange(length, device=device)
    if size == 1:
        return index
    assert length % (2 * size) == 0, f"a row of {length} tokens over {size} context ranks"
    chunks = index.view(2 * size, -1)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


def whole_index(length: int, size: int, device: torch.device) -> torch.Tensor:
    """Where each token of the row stands in the ranks' tokens laid end to end, int64 `[S]`.

    `torch.cat(parts_of_ranks)[whole_index(...)]` is the row in its order.
    """
    return torch.cat([local_index(length, rank, size, device) for rank in range(size)]).argsort()
