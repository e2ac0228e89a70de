"""Checks that attention received the correct rows: segments, positions, and the tokens of a context rank.

The expected values are computed from the batches independently of the code under test.
"""

from collections.abc import Sequence
from typing import Any

import torch

from megamm.common.sample import Batch
from megamm.config import RunConfig


def strange(seen: Any, batches: Sequence[Batch], config: RunConfig, context_rank: int) -> list[str]:
    """Return one line for each kind of input of attention that does not match this rank's batches."""
    axes, size = config.model.rope_axes, config.parallel.context
    maps = [torch.cat((b.segment[:, None], b.position), 1) for b in batches]
    positions = [expected_positions(b, axes)[..., local_tokens(b, context_rank, size)] for b in batches]
    kinds = {
        "segments or positions passed to attention": (seen.metadata, maps),
        "positions used for RoPE in attention": (seen.positions, positions),
    }
    return [
        f"{kind} differ from the row's: {_first(found, expected)}"
        for kind, (observed, expected) in kinds.items()
        if (found := next((o for o in observed if not any(torch.equal(o, e) for e in expected)), None)) is not None
    ]


def local_tokens(batch: Batch, rank: int, size: int) -> list[int]:
    """Return the row indices of a context rank's tokens: its early and its late chunk of 2 * size chunks."""
    length = batch.input_ids.shape[1]
    if size == 1:
        return list(range(length))
    return [i for i in range(length) if i * 2 * size // length in (rank, 2 * size - 1 - rank)]


def expected_positions(batch: Batch, axes: int) -> torch.Tensor:
    """Return `[B, axes, S]`: (t, h, w), or with one axis the index in the document."""
    if axes == 3:
        return batch.position
    index = torch.zeros_like(batch.segment)
    for row, segments in enumerate(batch.segment.tolist()):
        for i in range(1, len(segments)):
            index[row, i] = index[row, i - 1] + 1 if segments[i] == segments[i - 1] else 0
    return index[:, None]


def _first(found: torch.Tensor, expected: list[torch.Tensor]) -> str:
    """Return the first position where it differs from the closest batch."""
    same_shape = [e for e in expected if e.shape == found.shape]
    if not same_shape:
        return f"shape {tuple(found.shape)} instead of {tuple(expected[0].shape)}"
    nearest = min(same_shape, key=lambda e: int((e != found).sum()))
    row, channel, token = (found != nearest).nonzero()[0].tolist()
    return f"row {row}, token {token}: {found[row, channel, token]} instead of {nearest[row, channel, token]}"
