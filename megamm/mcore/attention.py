"""Core attention for packed rows: causal within each document of a row, none across documents, RoPE per document.

The tokens of a span (the tokens of one image, if the config says so) attend to each other in both directions.

Without Transformer Engine, Megatron's own core attention supports neither packed rows nor context parallelism. This
module replaces `core_attention` in the layer spec. Megatron passes `attention_mask` through unchanged; here it is
packed_seq_metadata, int64 `[B, 5, S]`: segment (common/sample.py), t, h, w and span of every token of the whole row,
even if a context rank holds only S/cp of its tokens. Mask and positions are derived from it.

Kernels (model/attention_kernel.py chooses one): "varlen" and "flash" take the lengths of documents (varlen.py); "flex",
torch's flex_attention, compiled, skips masked blocks within one call; "sdpa" is torch's scaled dot product attention,
over blocks of queries and only the keys back to the start of their documents. Only the last two have spans.
RoPE is relative, so in exact arithmetic positions could count through the row, but large angles would lose float32
digits that a document on its own keeps.
Sources: Beltagy et al. 2020 (windows); Gemma Team 2024 (caps); Vaswani et al. 2017 (attention); Ainslie et al. 2023
(grouped queries); Dong et al. 2024 (flex attention).
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megamm.common.device import Device
from megamm.config.accelerators import Installed
from megamm.mcore import varlen
from megamm.mcore.context import gather_row, heads_to_tokens, local_chunks, tokens_to_heads
from megamm.model.attention_limits import BY_LENGTHS, Kernel
from megamm.model.rope import Rope, RopeAngles, angles_of
from megamm.ops import Ops

T = TypeVar("T")
Chunks = Sequence[tuple[int, int]]
"""(start, stop) in the row of the given queries."""


@dataclass(frozen=True)
class ScoreForm:
    """Form of attention scores.

    scale: scores are q * k * scale (0: Megatron's scale). softcap: scores become softcap * tanh(score / softcap) (0:
    no cap). window: only keys less than `window` tokens back are used (0: the whole document). spans: whether rows can
    have spans; a window limits how far back a token of a span sees, not how far ahead.
    """

    scale: float = 0.0
    softcap: float = 0.0
    window: int = 0
    spans: bool = False


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Chunks, ScoreForm], torch.Tensor]
"""(query `[Q, B, N, D]`, key `[S, B, G, D]`, value `[S, B, G, E]`, packed_seq_metadata, chunks, form) ->
`[Q, B, N, E]`."""
BLOCK = 128
"""Queries, and keys, of a block. "sdpa" computes one block of queries per call; of "flex", it is torch's own size."""


def attend_by(kernel: Kernel, device: Device, found: Installed) -> Attend:
    """Return the function of a kernel, for tensors on this device; it imports flash-attn if this is the kernel."""
    if kernel in BY_LENGTHS:
        return partial(_attend_by_lengths, varlen.kernel_call(kernel, device, found))
    return _attend_flex if kernel == "flex" else _attend_sdpa


class PackedAttention(MegatronModule):
    """Attention of query `[S/cp, B, N, D]`, key `[S/cp, B, G, D]` and value `[S/cp, B, G, E]` -> `[S/cp, B, N * E]`.

    N and G are this tensor rank's heads and groups; E, the values' head size, is D except for latent attention (MLA).
    rope None: RoPE is already applied to queries and keys; with 1 axis a token's position is its index in its document,
    with 3 axes its (t, h, w). pg_collection.cp is the context group; `exchange` is how its ranks attend over the row.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        pg_collection: Any,
        ops: Ops,
        rope: Rope | None,
        exchange: Literal["allgather", "alltoall"],
        attend: Attend,
        form: ScoreForm,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.attention_dropout == 0.0, "PackedAttention has no dropout"
        self.layer_number, self.ops, self.rope = layer_number, ops, rope
        self.group, self.exchange = pg_collection.cp, exchange
        self.attend = attend
        self.form = replace(form, scale=form.scale or softmax_scale or 1.0 / math.sqrt(config.kv_channels))
        self.tensor_group = pg_collection.tp
        self.shared_channels = config.qk_pos_emb_head_dim if config.multi_latent_attention else 0

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        assert attention_bias is None and packed_seq_params is None
        packed_seq_metadata, size = attention_mask, self.group.size()
        if self.shared_channels and self.tensor_group.size() > 1:
            key = self._shared_by_all_heads(key)
        chunks = local_chunks(packed_seq_metadata.shape[2], self.group.rank(), size)
        if self.rope is not None:
            # Before the exchange, while this rank has the tokens whose positions it derives.
            angles = self._angles(self.rope, packed_seq_metadata, chunks, query.shape[-1])
            query, key = self.ops.rope(query, key, *angles)
        if size > 1 and self.exchange == "alltoall":
            query, key, value = tokens_to_heads((query, key, value), self.group)
            context = self.attend(
                query, key, value, packed_seq_metadata, [(0, packed_seq_metadata.shape[2])], self.form
            )
            return heads_to_tokens(context, self.group).flatten(2)
        if size > 1:
            # Keys and values in one message; queries stay, so a rank computes only its own tokens' results.
            both = gather_row(torch.cat((key, value), dim=-1), self.group)
            key, value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
        return self.attend(query, key, value, packed_seq_metadata, chunks, self.form).flatten(2)

    def _shared_by_all_heads(self, key: torch.Tensor) -> torch.Tensor:
        """Return the same keys with a correct gradient for their position channels.

        In latent attention all heads share these channels: their gradient is the sum over the heads of all tensor
        ranks, but Megatron sums only this rank's heads.
        """
        own, shared = key.split([key.shape[-1] - self.shared_channels, self.shared_channels], dim=-1)
        shared = _GradientSum.apply(shared[:, :, :1], self.tensor_group)
        return torch.cat((own, shared.expand(-1, -1, key.shape[2], -1)), dim=-1)

    def _angles(self, rope: Rope, packed_seq_metadata: torch.Tensor, chunks: Chunks, head_dim: int) -> RopeAngles:
        """Return the angles of this rank's tokens, with position `[B, axes, S/cp]`."""

        def make() -> RopeAngles:
            # With one axis positions restart in each document, which keeps angles small (see the module's docstring).
            position = (
                packed_seq_metadata[:, 1:4]
                if rope.axes == 3
                else document_positions(packed_seq_metadata[:, 0]).unsqueeze(1)
            )
            local = torch.cat([position[..., start:stop] for start, stop in chunks], dim=-1)
            return angles_of(local, head_dim, rope)

        return _cached(packed_seq_metadata, ("angles", *chunks, rope, head_dim), make)


@dataclass
class _MetadataCache:
    """Values that depend only on one packed_seq_metadata: masks and angles."""

    packed_seq_metadata: torch.Tensor
    version: int
    values: dict[Any, Any] = field(default_factory=dict)

    def is_of(self, other: torch.Tensor) -> bool:
        """Whether `other` is the same memory, unchanged: recomputation passes another tensor over the same memory."""
        own = self.packed_seq_metadata
        return (own.data_ptr(), own.shape, own.stride(), self.version) == (
            other.data_ptr(),
            other.shape,
            other.stride(),
            other._version,
        )


_CACHE: list[_MetadataCache] = []
"""The cache of the metadata that a layer used last, or empty.

It is global because Megatron gives layers nothing shared but `attention_mask`, which full recomputation saves and
passes on as a new tensor object: object identity would miss in every recomputed layer. Invariant: the entry holds its
tensor, so the memory cannot be freed and reused at the same address; an in-place change raises torch's version counter.
One entry only: a pipeline has several microbatches in flight, and each entry's masks take memory.
"""


def _cached(packed_seq_metadata: torch.Tensor, key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """Return make(), which the first layer computes and other layers reuse for the same metadata and key."""
    if packed_seq_metadata.is_inference():  # inference tensors have no version counter
        return make()
    if not (_CACHE and _CACHE[0].is_of(packed_seq_metadata)):
        _CACHE[:] = [_MetadataCache(packed_seq_metadata, packed_seq_metadata._version)]
    values = _CACHE[0].values
    if key not in values:
        values[key] = make()
    result: T = values[key]
    return result


class _GradientSum(torch.autograd.Function):
    """Identity whose gradient is summed over the group. (Megatron's own does not sum a strided gradient.)"""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def document_positions(segment_BS: torch.Tensor) -> torch.Tensor:
    """Return the index of every token in its document, `[B, S]` (a row's padding is a segment of its own)."""
    index = torch.arange(segment_BS.shape[1], device=segment_BS.device)
    starts = torch.zeros_like(segment_BS)
    starts[:, 1:] = torch.where(segment_BS[:, 1:] != segment_BS[:, :-1], index[1:], 0)
    return index - starts.cummax(dim=1).values


def last_keys(packed_seq_metadata: torch.Tensor, spans: bool) -> torch.Tensor:
    """Return the index of the last key that each token of the row sees, `[B, S]`: its own, or that of its span's end.

    As the tokens of a span are consecutive, a query sees the keys of one range, which grows with its index.
    """
    segment, span = packed_seq_metadata[:, 0], packed_seq_metadata[:, -1]
    index = torch.arange(segment.shape[1], device=segment.device)
    if not spans:
        return index.expand_as(segment)
    is_last = torch.ones_like(span, dtype=torch.bool)
    is_last[:, :-1] = span[:, :-1] != span[:, 1:]
    ends = torch.where(is_last, index, len(index)).flip(1).cummin(dim=1).values.flip(1)
    return torch.where(span >= 0, ends, index)


@dataclass(frozen=True)
class _Block:
    """Consecutive local queries, the key blocks they attend to, and the additive mask (0 or -inf) `[B, 1, q, k]`."""

    queries: int
    keys: slice
    mask: torch.Tensor


def _blocks(packed_seq_metadata: torch.Tensor, chunks: Chunks, dtype: torch.dtype, form: ScoreForm) -> list[_Block]:
    segment, length = packed_seq_metadata[:, 0], packed_seq_metadata.shape[2]
    ranges = [(at, min(at + BLOCK, stop)) for start, stop in chunks for at in range(start, stop, BLOCK)]
    index = torch.arange(length, device=packed_seq_metadata.device)
    last = last_keys(packed_seq_metadata, form.spans)
    # The only transfer from the device: for each block, the start of the first document in it, and its last key.
    first_of = (index - document_positions(segment)).amin(0)[[start for start, _ in ranges]]
    last_of = last.amax(0)[[stop - 1 for _, stop in ranges]]
    blocks = []
    for (start, stop), (first, final) in zip(ranges, torch.stack((first_of, last_of), 1).tolist(), strict=True):
        first = max(first, start - form.window + 1) if form.window else first
        # Counted in whole blocks, as keys and values are split in `_attend_sdpa`.
        keys = slice(first // BLOCK, final // BLOCK + 1)
        seen = slice(keys.start * BLOCK, min(keys.stop * BLOCK, length))
        allowed = segment[:, start:stop, None] == segment[:, None, seen]
        allowed &= last[:, start:stop, None] >= index[seen]
        if form.window:
            allowed &= index[start:stop, None] - index[seen] < form.window
        # Every layer uses a float mask directly; torch would convert a boolean mask in each layer.
        mask = torch.zeros(allowed.shape, dtype=dtype, device=packed_seq_metadata.device).masked_fill_(
            ~allowed, -torch.inf
        )
        blocks.append(_Block(stop - start, keys, mask.unsqueeze(1)))
    return blocks


def _attend_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed_seq_metadata: torch.Tensor,
    chunks: Chunks,
    form: ScoreForm,
) -> torch.Tensor:
    """Compute attention of the chunks' queries `[Q, B, N, D]` over the row's keys and values -> `[Q, B, N, E]`."""
    blocks = _cached(
        packed_seq_metadata,
        ("blocks", *chunks, query.dtype, form.window, form.spans),
        lambda: _blocks(packed_seq_metadata, chunks, query.dtype, form),
    )
    # Grouped keys are repeated: GPU kernels with a mask and without S x S scores do not support grouped queries.
    per_group = query.shape[2] // key.shape[2]
    if per_group > 1:
        key, value = (x.repeat_interleave(per_group, dim=2) for x in (key, value))
    queries = query.permute(1, 2, 0, 3).split([block.queries for block in blocks], dim=2)
    # Split and concatenated instead of sliced: the gradient of a slice is as long as the row.
    keys, values = (x.permute(1, 2, 0, 3).split(BLOCK, dim=2) for x in (key, value))
    parts = [
        _product(part, torch.cat(keys[block.keys], 2), torch.cat(values[block.keys], 2), block.mask, form)
        for part, block in zip(queries, blocks, strict=True)
    ]
    return torch.cat(parts, dim=2).permute(2, 0, 1, 3)


def _product(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, form: ScoreForm
) -> torch.Tensor:
    """Compute attention of `[B, N, q, D]` with an additive mask; with a cap it is not fused, as torch has no cap."""
    if not form.softcap:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=form.scale)
    scores = form.softcap * torch.tanh(query @ key.transpose(2, 3) * (form.scale / form.softcap)) + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


def _block_mask(packed_seq_metadata: torch.Tensor, chunks: Chunks, form: ScoreForm) -> BlockMask:
    """Return the mask of the chunks' queries, as torch's create_block_mask would, without a mask of S x S tokens.

    A query attends to the keys of one range: from the start of its document, or of its window, to itself or the end of
    its span. So a block of queries and keys is full if every query's range contains all keys, and not empty if any
    range has one of them.
    """
    segment, device = packed_seq_metadata[:, 0], packed_seq_metadata.device
    length = segment.shape[1]
    index = torch.cat([torch.arange(*chunk, device=device) for chunk in chunks])
    starts = (torch.arange(length, device=device) - document_positions(segment))[:, index]
    last, window = last_keys(packed_seq_metadata, form.spans)[:, index], form.window
    if window:
        starts = starts.clamp(min=index - window + 1)
    partial, full = _occupied_blocks(starts, last, length)

    def allowed(b: torch.Tensor, _: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        at = index[q]
        is_seen = (segment[b, at] == segment[b, k]) & ((last[b, q] if form.spans else at) >= k)
        return is_seen & (at - k < window) if window else is_seen

    return BlockMask.from_kv_blocks(
        *_ordered(partial), *_ordered(full), BLOCK, mask_mod=allowed, seq_lengths=(len(index), length)
    )


def _occupied_blocks(starts: torch.Tensor, ends: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which blocks have some, and which have all, of their keys seen by their queries: bool `[B, Q, K]` each.

    starts and ends `[B, q]`: the first and last key of each query; Q and K count blocks. A block that reaches
    beyond the last query or key does not have all.
    """
    rows, queries = starts.shape
    query_blocks, key_blocks = -(-queries // BLOCK), -(-length // BLOCK)
    # Each query adds 1 at the first block of its keys and -1 behind the last one: sums along a row count its queries.
    changes = torch.zeros(rows, query_blocks, key_blocks + 1, dtype=torch.int32, device=starts.device)
    row = torch.arange(rows, device=starts.device)[:, None].expand_as(starts)
    block = (torch.arange(queries, device=starts.device) // BLOCK).expand_as(starts)
    one = torch.ones_like(starts, dtype=torch.int32)
    changes.index_put_((row, block, starts // BLOCK), one, accumulate=True)
    changes.index_put_((row, block, ends // BLOCK + 1), -one, accumulate=True)
    some = changes.cumsum(-1)[..., :-1] > 0
    # Padded queries see nothing.
    missing = query_blocks * BLOCK - queries
    last_start = F.pad(starts, (0, missing), value=length).unflatten(1, (-1, BLOCK)).amax(-1)
    first_end = F.pad(ends, (0, missing), value=-1).unflatten(1, (-1, BLOCK)).amin(-1)
    first_key = torch.arange(key_blocks, device=starts.device) * BLOCK
    last_key = first_key + BLOCK - 1
    full = (last_start[..., None] <= first_key) & (first_end[..., None] >= last_key)
    return some & ~full, full


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of blocks `[B, 1, Q]` and their indices, in order and first, `[B, 1, Q, K]`, as BlockMask."""
    is_set = blocks.to(torch.int32).unsqueeze(1)
    order = is_set.argsort(dim=-1, descending=True, stable=True)
    return is_set.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _attend_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed_seq_metadata: torch.Tensor,
    chunks: Chunks,
    form: ScoreForm,
) -> torch.Tensor:
    """Compute the same as `_attend_sdpa`; on a CPU it is uncompiled and without gradients, for tests."""
    kind = ("block mask", *chunks, form.window, form.spans)
    mask = _cached(packed_seq_metadata, kind, lambda: _block_mask(packed_seq_metadata, chunks, form))
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    attend = flex_attention if query.device.type == "cpu" else _compiled_flex()
    cap = _capped(form.softcap) if form.softcap else None
    grouped = query.shape[1] != key.shape[1]
    context = attend(query, key, value, score_mod=cap, block_mask=mask, scale=form.scale, enable_gqa=grouped)
    return context.permute(2, 0, 1, 3)


def _attend_by_lengths(
    call: varlen.Call,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed_seq_metadata: torch.Tensor,
    chunks: Chunks,
    form: ScoreForm,
) -> torch.Tensor:
    """Compute the same as `_attend_sdpa` by a kernel that takes the lengths of documents."""
    assert not form.softcap and not form.spans, "attention_limits.check refuses a cap and spans"

    def make() -> list[varlen.Sequences]:
        return varlen.sequences(packed_seq_metadata[:, 0], varlen.lengths_of(packed_seq_metadata), chunks)

    sequences = _cached(packed_seq_metadata, ("sequences", *chunks), make)
    return varlen.attend(call, query, key, value, sequences, form.scale, form.window)


@functools.cache
def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    """Return the score function of a cap; it is the same object for all layers, so that it is compiled once."""

    def score(value: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(value / softcap)

    return score


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)
