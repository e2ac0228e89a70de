"""Attention by the lengths of documents: torch's operator in plain torch, its contract, flash-attn, and the choice."""

import math
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from attention_reference import random_metadata, relative_error
from attention_worker import ALONE, CPU, HEADS, WINDOWS, build, errors, inputs
from step_costs_worker import Operators
from torch.nn.attention.varlen import varlen_attn

from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.common.sample import Batch, PackedLengths, Row
from megamm.config import RunConfig
from megamm.config.accelerators import Installed
from megamm.mcore import cpu
from megamm.model import attention_kernel, layout
from megamm.parity.case import Run

NOTHING = Installed(None, None, False, False, None, None, None, None)
GPU: Any = types.SimpleNamespace(is_gpu=True, compute_capability=(9, 0), torch_device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def megatron_adapted() -> None:
    """Adapt Megatron before its first import, as a run does, and register the CPU kernels."""
    if not choose("auto").is_gpu:
        cpu.install()
    from megamm.mcore import varlen_reference

    varlen_reference.register()


# --- the operator ---


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sizes: list[tuple[int, int]], scale: float, left: int
) -> torch.Tensor:
    """Compute sequences of these numbers of (queries, keys) one by one; the last query sees the last key."""
    results, at, begin = [], 0, 0
    for queries, keys in sizes:
        q, k, v = query[at : at + queries], key[begin : begin + keys], value[begin : begin + keys]
        k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (k, v))
        distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
        hidden = (distance < 0) | (distance > left) if left >= 0 else distance < 0
        scores = torch.einsum("qnd,knd->nqk", q, k) * scale
        results.append(torch.einsum("nqk,knd->qnd", scores.masked_fill(hidden, -math.inf).softmax(-1), v))
        at, begin = at + queries, begin + keys
    return torch.cat(results)


def _begins(sizes: list[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32)


SIZES = [(3, 3), (0, 0), (1, 1), (0, 7), (270, 300), (2, 9), (5, 5), (0, 0)]
"""Also sequences of nothing, of keys alone, and longer than a block of the reference."""


@pytest.mark.parametrize(
    ("heads", "groups", "left", "dtype"),
    [
        *((4, 4, left, torch.float64) for left in (-1, 0)),
        *((6, 2, left, torch.float64) for left in (-1, 4, 280)),
        *((6, 2, 4, dtype) for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_operator_is_plain_attention(heads: int, groups: int, left: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(left + heads)
    tokens, keys = (sum(size[i] for size in SIZES) for i in (0, 1))
    shapes = [(tokens, heads), (keys, groups), (keys, groups), (tokens, heads)]
    *qkv, weight = (torch.randn(*shape, 16, generator=generator).to(dtype) for shape in shapes)
    leaves = [x.requires_grad_() for x in qkv]
    begins = [_begins([size[i] for size in SIZES]) for i in (0, 1)]
    ours = varlen_attn(*leaves, *begins, 270, 300, scale=0.3, window_size=(left, 0), enable_gqa=heads != groups)
    assert isinstance(ours, torch.Tensor) and ours.dtype == dtype
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wanted = _attention(*exact, SIZES, 0.3, left)
    # bf16 rounds the result (2^-9 of it) and the result that the backward pass reads again.
    bound = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert relative_error(ours.detach(), wanted.detach()) <= bound
    gradients = torch.autograd.grad(ours, leaves, weight)
    for found, expected in zip(gradients, torch.autograd.grad(wanted, exact, weight.double()), strict=True):
        # A query that sees one key has the gradient 0.
        assert (found - expected).abs().max() <= bound * max(1, expected.abs().max())


def _refused(change: Callable[[dict[str, Any]], None]) -> bool:
    sizes = [3, 4]
    given: dict[str, Any] = dict(query=torch.randn(7, 4, 8), key=torch.randn(7, 2, 8), value=torch.randn(7, 2, 8))
    given |= dict(cu_seq_q=_begins(sizes), cu_seq_k=_begins(sizes), max_q=4, max_k=4)
    given |= dict(window_size=(-1, 0), enable_gqa=True)
    change(given)
    try:
        varlen_attn(**given)
    except AssertionError:
        return True
    return False


def test_operator_refuses_what_the_kernels_refuse_or_leave_undefined() -> None:
    assert not _refused(lambda given: None)
    assert _refused(lambda given: given.update(cu_seq_q=given["cu_seq_q"].long()))
    assert _refused(lambda given: given.update(cu_seq_q=given["cu_seq_q"][:2]))
    assert _refused(lambda given: given.update(cu_seq_k=_begins([3, 3])))
    assert _refused(lambda given: given.update(max_k=3))
    assert _refused(lambda given: given.update(window_size=(-1, -1)))
    assert _refused(lambda given: given.update(cu_seq_q=_begins([4, 3]), cu_seq_k=_begins([3, 4])))
    assert _refused(lambda given: given.update(value=torch.randn(7, 2, 16)))
    assert _refused(lambda given: given.update({k: torch.randn(7, 2, 12) for k in ("query", "key", "value")}))
    assert _refused(lambda given: given.update(query=torch.randn(7, 8, 4).transpose(1, 2)))


# --- where documents begin ---


def _lists(found: list[Any]) -> list[tuple[list[int], list[int], int, int]]:
    return [(one.queries.tolist(), one.keys.tolist(), one.most_queries, one.most_keys) for one in found]


def test_sequences_of_rows_and_of_chunks() -> None:
    from megamm.mcore.varlen import sequences

    segment = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 0]])
    lengths = PackedLengths.of(segment.numpy())
    assert lengths == PackedLengths(number=4, longest=6)
    whole = [0, 3, 5, 6, 12]
    assert _lists(sequences(segment, lengths, [(0, 6)])) == [(whole, whole, 6, 6)]
    # Of chunk [2, 4): one query of each of two documents, and their keys up to it; the third begins behind.
    early, late = _lists(sequences(segment, lengths, [(2, 4), (4, 6)]))
    assert early == ([0, 1, 2, 2, 4], [0, 3, 4, 4, 8], 2, 4)
    assert late == ([0, 0, 1, 2, 4], whole, 2, 6)


def test_more_documents_than_were_counted_are_an_error() -> None:
    from megamm.mcore.varlen import sequences

    with pytest.raises(RuntimeError, match="more documents"):
        sequences(torch.tensor([[0, 1, 2]]), PackedLengths(2, 3), [(0, 3)])


def _row(segment: np.ndarray) -> Row:
    zeros = np.zeros_like(segment)
    return Row(zeros, zeros, zeros.astype(np.float32), segment, np.stack([zeros] * 3), zeros, zeros - 1)


def test_a_batch_knows_the_lengths_of_its_documents() -> None:
    rows = [_row(random_metadata(seed, 60)[seed % 4, 0].numpy()) for seed in range(5)]
    batch = Batch.stack(rows)
    runs = [np.diff(np.flatnonzero(np.diff(row.segment, prepend=-2, append=-2))) for row in rows]
    assert batch.lengths == PackedLengths(sum(map(len, runs)), max(int(run.max()) for run in runs))
    assert batch.to(torch.device("cpu")).lengths == batch.lengths


def test_noted_lengths_are_found_without_a_wait_of_the_host() -> None:
    from megamm.mcore import varlen

    metadata = random_metadata(3, 48)
    lengths = PackedLengths.of(metadata[:, 0].numpy())
    varlen.note_lengths(metadata, lengths)
    with Operators() as seen:
        # Recomputation passes another tensor over the same memory.
        found = varlen.sequences(metadata[:, 0], varlen.lengths_of(metadata.detach()), [(0, 48)])
    assert not seen.of("local_scalar_dense", "nonzero", "masked_select", "index")
    assert _lists(found) == _lists(varlen.sequences(metadata[:, 0], varlen.lengths_of(metadata.clone()), [(0, 48)]))
    before = len(varlen._NOTED)
    del metadata, found, seen
    assert len(varlen._NOTED) == before - 1


# --- flash-attn ---


def _double(record: list[dict[str, Any]], also_returns: bool) -> Any:
    """Return a module with the function of flash-attn's versions 2 and 3: the arguments that both have."""

    def flash_attn_varlen_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> Any:
        record.append(dict(window_size=window_size))
        assert causal, "its window alone would let a query see what follows"
        window = (window_size[0], 0)
        out = varlen_attn(
            *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
            scale=softmax_scale,
            window_size=window,
            enable_gqa=True,
        )
        return (out, None) if also_returns else out

    return types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("form", [None, *WINDOWS], ids=str)
def test_flash_attn_gets_what_torch_gets(monkeypatch: pytest.MonkeyPatch, version: int, form: Any) -> None:
    from megamm.mcore import varlen

    calls: list[dict[str, Any]] = []
    name = {2: "flash_attn", 3: "flash_attn_interface"}[version]
    monkeypatch.setitem(sys.modules, name, _double(calls, also_returns=version == 3))
    found = Installed(None, None, False, False, "2.8.3", "3.0.0" if version == 3 else None, None, None)
    monkeypatch.setattr("attention_worker.installed", lambda: found)
    assert varlen.flash_module(GPU, found) == name
    length, heads = 61, HEADS[1]
    metadata, tensors = random_metadata(6, length), inputs(6, length, heads)
    module = build(ALONE, heads[3], heads[5], kernel="flash", form=form, device=GPU)
    error = errors(module, torch.arange(length), tensors, metadata, heads[5], form)
    assert max(error) <= 1e-5
    assert calls == [{"window_size": (form[2] - 1 if form else -1, 0)}]


def test_version_of_flash_attn() -> None:
    from megamm.mcore.varlen import flash_module

    both = Installed(None, None, False, False, "2.8.3", "3.0.0", None, None)
    ampere: Any = types.SimpleNamespace(is_gpu=True, compute_capability=(8, 0))
    assert flash_module(GPU, both) == "flash_attn_interface"
    assert flash_module(ampere, both) == "flash_attn"


# --- the choice ---


def _config(**settings: Any) -> RunConfig:
    return Run(1, 1, tuple({k.replace("__", "."): v for k, v in settings.items()}.items()), ()).config


MLA = {"model__num_query_groups": 4, "model__mla__kv_lora_rank": 16, "model__mla__qk_head_dim": 8}
MLA |= {"model__mla__qk_rope_head_dim": 8, "model__mla__v_head_dim": 12}
BF16 = {"train__precision": "bf16"}
CHOSEN: list[tuple[dict[str, Any], Any, str, str]] = [
    ({}, CPU, "sdpa", "CPU"),
    (BF16, GPU, "varlen", "on a GPU it needs no mask"),
    ({}, GPU, "flex", "float32"),
    (BF16 | {"model__attention_softcap": 1.5}, GPU, "flex", "cap of the scores"),
    (BF16 | {"model__head_dim": 264}, GPU, "flex", "at most 256"),
    (BF16 | MLA, GPU, "flex", "pad values from 12 to 16"),
    (BF16 | MLA | {"train__attention": "varlen"}, GPU, "varlen", "set by"),
    ({"train__attention": "varlen"}, CPU, "varlen", "in plain torch"),
    ({"train__attention": "sdpa"}, GPU, "sdpa", "set by"),
    ({"train__attention": "flex"}, GPU, "flex", "set by"),
]


@pytest.mark.parametrize(("settings", "device", "kernel", "reason"), CHOSEN)
def test_kernel_is_chosen_with_a_reason(settings: dict[str, Any], device: Any, kernel: str, reason: str) -> None:
    chosen, why = attention_kernel.choose(_config(**settings), device, NOTHING)
    assert chosen == kernel
    assert reason in why


REFUSED: list[tuple[dict[str, Any], Any, str]] = [
    ({"train__attention": "flex"}, CPU, "no backward on a CPU"),
    ({"train__attention": "flash"}, CPU, "no kernels for a CPU"),
    ({"train__attention": "flash"} | BF16, GPU, "not installed"),
    ({"train__attention": "varlen"}, GPU, "do not compute in float32"),
    ({"train__attention": "varlen", "model__attention_softcap": 1.5}, CPU, "model.attention_softcap = 1.5"),
    ({"train__attention": "flash", "model__head_dim": 264}, GPU, "at most 256 channels, not 264"),
]


@pytest.mark.parametrize(("settings", "device", "message"), REFUSED)
def test_wrong_choice_is_one_line(settings: dict[str, Any], device: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        attention_kernel.choose(_config(**settings), device, NOTHING)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_flash_attn_is_chosen_on_request_only() -> None:
    found = Installed(None, None, False, False, None, "3.0.0", None, None)
    assert attention_kernel.choose(_config(**BF16), GPU, found)[0] == "varlen"
    assert attention_kernel.choose(_config(**BF16, train__attention="flash"), GPU, found)[0] == "flash"


def test_a_cap_is_refused_before_a_run() -> None:
    with pytest.raises(UserError, match="attention_softcap"):
        layout.check(_config(train__attention="varlen", model__attention_softcap=1.5), 1)


def test_an_older_torch_has_no_varlen_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen_attn(query: Any, key: Any, value: Any, is_causal: bool = False) -> None: ...

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    assert attention_kernel.choose(_config(**BF16), GPU, NOTHING)[0] == "flex"
    with pytest.raises(UserError, match="has no varlen attention"):
        attention_kernel.choose(_config(train__attention="varlen"), CPU, NOTHING)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(not choose("auto").is_gpu, reason="needs a GPU")
@pytest.mark.parametrize("form", [None, *WINDOWS], ids=str)
@pytest.mark.parametrize("heads", [("grouped", 4, 2, 64, 64, 3), ("latent", 4, 4, 24, 16, 0)], ids=str)
def test_kernels_on_a_gpu(form: Any, heads: tuple[Any, ...]) -> None:
    device, length = choose("auto"), 389
    metadata = random_metadata(3, length)
    tensors = [x.bfloat16().float() for x in inputs(3, length, heads)]
    module = build(ALONE, heads[3], heads[5], kernel="varlen", form=form, device=device)

    def on_gpu(*qkv: torch.Tensor) -> torch.Tensor:
        *qkv, packed = (x.to(device.torch_device) for x in qkv)
        return module(*(x.bfloat16() for x in qkv), packed).float().cpu()

    found = errors(on_gpu, torch.arange(length), tensors, metadata, heads[5], form)
    # Eight bits of a bf16 number, in the result, in the weights and in the gradients.
    assert max(found) <= 4e-2
