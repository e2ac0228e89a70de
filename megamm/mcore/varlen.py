"""Attention over documents by their lengths: the kernels take where each document begins, and need no mask.

The documents of all rows of a microbatch are one list of sequences. A kernel gets queries, keys and values of all
tokens in a row `[T, heads, channels]`, and for queries and for keys the index at which each sequence begins, int32
`[sequences + 1]`, on the device. It aligns the last query of a sequence with its last key; so a context rank, which has
only some queries of a document, passes the document's keys up to its last query.

The number of sequences and the longest one are shapes of a launch, which the host must know. The loader counts them
(PackedLengths), so that no value is read from the device.
Sources: Dao 2023 (FlashAttention-2, sequences of different lengths); Llama team 2024, section 3.3.2 (context ranks).
"""

import importlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from megamm.common.device import Device
from megamm.common.sample import PackedLengths
from megamm.config.accelerators import Installed
from megamm.mcore import varlen_reference
from megamm.model.attention_limits import Kernel

HEAD_UNIT = 8
"""Channels of a head are a multiple of this in the kernels."""


@dataclass(frozen=True)
class Sequences:
    """The sequences of one chunk of the rows. queries, keys: where each begins, and the end.

    most_queries, most_keys: no sequence has more. chunk: (start, stop) of its queries in each row; the keys are those
    of [0, stop).
    """

    queries: torch.Tensor
    keys: torch.Tensor
    most_queries: int
    most_keys: int
    chunk: tuple[int, int]


Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequences, float, int], torch.Tensor]
"""(query `[Tq, N, D]`, key `[Tk, G, D]`, value `[Tk, G, D]`, sequences, scale, window) -> `[Tq, N, D]`."""

_NOTED: "weakref.WeakKeyDictionary[torch.UntypedStorage, PackedLengths]" = weakref.WeakKeyDictionary()
"""Lengths by the memory of packed_seq_metadata: Megatron gives layers nothing else, and full recomputation passes
another tensor over the same memory."""


def note_lengths(packed_seq_metadata: torch.Tensor, lengths: PackedLengths | None) -> None:
    """Let attention know the lengths of these rows, as long as the tensor's memory exists."""
    if lengths is not None:
        _NOTED[packed_seq_metadata.untyped_storage()] = lengths


def lengths_of(packed_seq_metadata: torch.Tensor) -> PackedLengths:
    """Return the noted lengths, or count them in the values, for which the host waits."""
    noted = _NOTED.get(packed_seq_metadata.untyped_storage())
    return noted or PackedLengths.of(packed_seq_metadata[:, 0].cpu().numpy())


def sequences(segment_BS: torch.Tensor, lengths: PackedLengths, chunks: Sequence[tuple[int, int]]) -> list[Sequences]:
    """Return the sequences of each chunk: every document of every row, empty where it has no token there."""
    length = segment_BS.shape[1]
    is_start = torch.ones_like(segment_BS, dtype=torch.bool)
    is_start[:, 1:] = segment_BS[:, 1:] != segment_BS[:, :-1]
    number = is_start.flatten().cumsum(0)
    torch._assert_async(number[-1] <= lengths.number, "more documents than the loader has counted")
    # The first token of each number; behind the last document, the number of tokens.
    wanted = torch.arange(1, lengths.number + 2, device=segment_BS.device)
    start = torch.searchsorted(number, wanted)
    row, offset = start // length, start % length
    found = []
    for begin, stop in chunks:
        queries = row * (stop - begin) + offset.clamp(begin, stop) - begin
        keys = row * stop + offset.clamp(max=stop)
        most_queries, most_keys = min(lengths.longest, stop - begin), min(lengths.longest, stop)
        found.append(Sequences(queries.int(), keys.int(), most_queries, most_keys, (begin, stop)))
    return found


def attend(
    call: Call,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    by_chunk: Sequence[Sequences],
    scale: float,
    window: int,
) -> torch.Tensor:
    """Compute attention of the chunks' queries `[Q, B, N, D]` over the row's keys and values -> `[Q, B, N, E]`."""
    rows, channels = query.shape[1], value.shape[-1]
    size = -(-max(query.shape[-1], channels) // HEAD_UNIT) * HEAD_UNIT
    # Zeros add nothing to the scores, and the result's channels of padded values are cut off.
    query, key, value = (F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x for x in (query, key, value))
    sizes = [stop - begin for begin, stop in (one.chunk for one in by_chunk)]
    parts = [query] if len(sizes) == 1 else query.split(sizes)
    contexts = []
    for part, one in zip(parts, by_chunk, strict=True):
        stop = one.chunk[1]
        seen = (x if x.shape[0] == stop else x[:stop] for x in (key, value))
        # Row after row; without a copy if there is one row.
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (part, *seen))
        contexts.append(call(q, k, v, one, scale, window).unflatten(0, (rows, -1)).transpose(0, 1))
    context = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
    return context if size == channels else context[..., :channels]


def kernel_call(kernel: Kernel, device: Device, found: Installed) -> Call:
    """Return the call of "varlen" or "flash"; on a CPU, "varlen" is computed in plain torch."""
    if kernel == "flash":
        name = flash_module(device, found)
        return partial(_flash, importlib.import_module(name).flash_attn_varlen_func)
    assert kernel == "varlen"
    if not device.is_gpu:
        varlen_reference.register()
    return _torch


def flash_module(device: Device, found: Installed) -> str:
    """Return the module of flash-attn to use: version 3, which is for Hopper only, where it can run; else version 2."""
    is_hopper = (device.compute_capability or (0, 0))[0] == 9
    if found.flash_attention_3 and (is_hopper or not found.flash_attention):
        return "flash_attn_interface"
    return "flash_attn"


def _window(window: int) -> tuple[int, int]:
    """Return how many keys before and behind a query the kernels use, -1: all of the document."""
    return (window - 1 if window else -1, 0)


def _torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, of: Sequences, scale: float, window: int
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    context = varlen_attn(
        query,
        key,
        value,
        of.queries,
        of.keys,
        of.most_queries,
        of.most_keys,
        scale=scale,
        window_size=_window(window),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(context, torch.Tensor)
    return context


def _flash(
    flash_attn_varlen_func: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    of: Sequences,
    scale: float,
    window: int,
) -> torch.Tensor:
    """Call flash-attn with the arguments that its versions 2 and 3 have in common."""
    context = flash_attn_varlen_func(
        query,
        key,
        value,
        of.queries,
        of.keys,
        of.most_queries,
        of.most_keys,
        softmax_scale=scale,
        causal=True,
        window_size=_window(window),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    # The first releases of version 3 also return the log-sum-exp.
    result = context[0] if isinstance(context, tuple) else context
    assert isinstance(result, torch.Tensor)
    return result
