"""Context parallelism: splits a row's tokens over ranks, with two ways to attend over the whole row.

The split is a zigzag: a row has 2n equal chunks for n ranks, and rank r holds chunks r and 2n - 1 - r, so that every
rank has the same work under a causal mask. For attention, the ranks either gather every token's keys and values
(`gather_row`), or exchange tokens for heads, so that a rank has the whole row for some heads (`tokens_to_heads`), and
back (`heads_to_tokens`). All functions are differentiable; gradients are exact.
Sources: the zigzag order is Megatron-core's; Llama team 2024, section 3.3.2 (gathered keys and values);
Jacobs et al. 2023 (DeepSpeed-Ulysses, exchange of heads).
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region


def local_chunks(length: int, rank: int, size: int) -> list[tuple[int, int]]:
    """Return (start, stop) in the row of the chunks that context rank `rank` holds, in its order.

    The length must be a multiple of 2 * size if size > 1 (layout.check ensures it).
    """
    if size == 1:
        return [(0, length)]
    assert length % (2 * size) == 0, f"a row of {length} tokens over {size} context ranks"
    chunk = length // (2 * size)
    return [(i * chunk, (i + 1) * chunk) for i in (rank, 2 * size - 1 - rank)]


def local_index(length: int, rank: int, size: int, device: torch.device) -> torch.Tensor:
    """Return the index in the row of each token of context rank `rank`, int64 `[S / size]`, ascending."""
    return torch.cat([torch.arange(*chunk, device=device) for chunk in local_chunks(length, rank, size)])


def gather_row(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gather every rank's tokens in row order: `[S/cp, ...]` -> `[S, ...]`; the gradient is summed over the ranks."""
    gathered = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
    return ranks_to_row(gathered, group.size())


def tokens_to_heads(heads: Sequence[torch.Tensor], group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Exchange each tensor `[S/cp, B, N, D]` for this rank's share of the heads over the whole row: `[S, B, N'/cp, D]`.

    There is one exchange for all tensors. If there are fewer heads than ranks, heads are repeated: N' is the least
    common multiple of N and cp.
    """
    size = group.size()
    repeated = [x.repeat_interleave(size // math.gcd(size, x.shape[2]), dim=2) for x in heads]
    by_rank = [x.unflatten(2, (size, -1)) for x in repeated]  # [S/cp, B, cp, N'/cp, D]
    # The exchange splits the first axis: for each rank its heads of all tensors, of this rank's tokens.
    sent = torch.cat([x.flatten(3) for x in by_rank], dim=-1).movedim(2, 0).flatten(0, 1)
    received = ranks_to_row(all_to_all(group, sent), size)
    shares = [x.shape[3:] for x in by_rank]
    parts = received.split([share.numel() for share in shares], dim=-1)
    return [part.unflatten(-1, share) for part, share in zip(parts, shares, strict=True)]


def heads_to_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Exchange this rank's heads of the row for its tokens of all heads: `[S, B, N/cp, D]` -> `[S/cp, B, N, D]`."""
    size = group.size()
    received = all_to_all(group, row_to_ranks(x, size))
    return torch.cat(received.chunk(size), dim=2)


def ranks_to_row(x: torch.Tensor, size: int) -> torch.Tensor:
    """Reorder the ranks' concatenated tokens into row order: `[S, ...]` -> `[S, ...]`."""
    if size == 1:
        return x
    # Each rank has an early and a late chunk. In the row, the late chunks are in reverse order of the ranks.
    early, late = x.unflatten(0, (size, 2, -1)).unbind(1)
    return torch.cat((early, late.flip(0))).flatten(0, 1)


def row_to_ranks(x: torch.Tensor, size: int) -> torch.Tensor:
    """Reorder row order into the ranks' order, the inverse of `ranks_to_row`: `[S, ...]` -> `[S, ...]`."""
    if size == 1:
        return x
    early, late = x.unflatten(0, (2, size, -1)).unbind(0)
    return torch.stack((early, late.flip(0)), dim=1).flatten(0, 2)
