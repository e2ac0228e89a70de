"""A second, plain implementation of packed attention: float64, one document after the other.

Rotations are products with complex numbers e^(i angle); angles are computed in float32, as in transformers.
The random packed rows for the tests are here, too. Shape letters as in megamm/common/sample.py.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch

ROWS = 4


def random_metadata(seed: int, length: int, only_short: bool = False) -> torch.Tensor:
    """Return `[4, 4, S]`: rows of odd documents with padding, one whole-row document, only padding, one long and short.

    only_short: four rows of the first kind, so that no row makes a batch look further back than it needs.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def short() -> torch.Tensor:
        row = torch.full((length,), -1)
        at, document = 0, 0
        while at < length - 25:
            size = min(2 * draw(1, 12) + 1, length - 9 - at)
            row[at : at + size] = document
            at, document = at + size, document + 1
        return row

    mixed = torch.ones(length, dtype=torch.int64)
    mixed[: draw(5, 20)] = 0
    mixed[-draw(5, 20) :] = 2
    rows = [short() for _ in range(ROWS)] if only_short else [short(), mixed * 0, mixed * 0 - 1, mixed]
    axes = torch.randint(0, 30, (ROWS, 3, length), generator=generator)
    return torch.cat((torch.stack(rows)[:, None], axes), dim=1)


def with_spans(metadata: torch.Tensor, seed: int) -> torch.Tensor:
    """Return `[B, 5, S]`: the metadata with spans of one token to a whole document, some side by side."""
    generator, span = torch.Generator().manual_seed(seed), torch.full_like(metadata[:, :1], -1)
    for row in range(len(metadata)):
        for start, stop in documents(metadata[row, 0].tolist()):
            cuts = torch.randint(start, stop + 1, (5,), generator=generator).sort().values.tolist()
            for number, (first, last) in enumerate(pairwise(cuts)):
                if number != 1:
                    span[row, 0, first:last] = 5 * start + number
    return torch.cat((metadata, span), dim=1)


def documents(segment: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each document of a row."""
    start = 0
    for at in range(1, len(segment) + 1):
        if at == len(segment) or segment[at] != segment[start]:
            yield start, at
            start = at


def turned(x_TND: torch.Tensor, position_3T: torch.Tensor, axes: int, base: float) -> torch.Tensor:
    """Rotate the heads of one document at these positions; pairs (i, i + D/2) are complex numbers."""
    pairs = x_TND.shape[2] // 2
    spatial = max(1, int(pairs * 20 / 64))
    axis = [0 if axes == 1 or i >= 3 * spatial else (0, 1, 2)[i % 3] for i in range(pairs)]
    frequency = torch.tensor([1.0 / base ** (2 * i / (2 * pairs)) for i in range(pairs)])
    angle = torch.stack([position_3T[axis[i]].float() * frequency[i] for i in range(pairs)], dim=1).double()
    turn = torch.polar(torch.ones_like(angle), angle).unsqueeze(1)
    number = torch.complex(x_TND[..., :pairs], x_TND[..., pairs:]) * turn
    return torch.cat((number.real, number.imag), dim=2)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed_seq_metadata: torch.Tensor,
    axes: int = 1,
    base: float | None = None,
    form: tuple[float, float, int] | None = None,
) -> torch.Tensor:
    """Map float64 query `[S, B, N, D]`, key `[S, B, G, D]`, value `[S, B, G, E]` of whole rows to `[S, B, N * E]`.

    form: scale of the scores, their cap and the window, in tokens; None: 1 / sqrt(D), no cap and no window. The tokens
    of a span, in the fifth channel of the metadata if there is one, attend to each other.
    """
    length, rows, heads, head_dim = query.shape
    scale, cap, window = form or (1 / math.sqrt(head_dim), math.inf, length)
    out = query.new_zeros(length, rows, heads, value.shape[3])
    for b in range(rows):
        for start, stop in documents(packed_seq_metadata[b, 0].tolist()):
            q, k, v = (x[start:stop, b].repeat_interleave(heads // x.shape[2], dim=1) for x in (query, key, value))
            if base is not None:
                index = torch.arange(stop - start).expand(3, -1)
                position = index if axes == 1 else packed_seq_metadata[b, 1:4, start:stop]
                q, k = turned(q, position, axes, base), turned(k, position, axes, base)
            ones = torch.ones(stop - start, stop - start).bool()
            ahead = ones.triu(1)
            if packed_seq_metadata.shape[1] == 5:
                span = packed_seq_metadata[b, 4, start:stop]
                ahead &= (span[:, None] != span[None]) | (span[None] < 0)
            scores = torch.einsum("qnd,knd->nqk", q, k) * scale
            scores = scores if cap == math.inf else cap * torch.tanh(scores / cap)
            weights = scores.masked_fill(ahead | ones.tril(-window), -torch.inf).softmax(-1)
            out[start:stop, b] = torch.einsum("nqk,knd->qnd", weights, v)
    return out.flatten(2)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference over the largest value; infinite where ours is not finite."""
    error = (ours.double() - theirs).abs().max() / theirs.abs().max()
    return float(error) if bool(ours.isfinite().all()) else math.inf
