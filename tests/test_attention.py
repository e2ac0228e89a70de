"""Packed attention against a plain float64 version, on one rank and over context ranks; kernels and positions."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_reference import attention, random_metadata, relative_error, with_spans
from attention_worker import ALONE, BASE, CASES, FORMS, HEADS, SELDOM, WINDOWS, build, errors, errors_of_cases, inputs
from torch.utils._python_dispatch import TorchDispatchMode

from megamm import ops
from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.common.sample import Batch, Document, Part
from megamm.config import RopeScalingConfig
from megamm.data.pipeline.packing import PackingSpec, pack
from megamm.mcore import cpu
from megamm.modalities.protocol import sequential_positions
from megamm.model import rope
from megamm.model.vocabulary import Vocabulary
from megamm.parity.worlds import WorldFailure, Worlds

OUTPUT, GRADIENT = 1e-6, 1e-5
KERNELS = [pytest.param(heads, "sdpa", id=heads[0]) for heads in HEADS]
KERNELS += [pytest.param(h, "varlen", id=f"{h[0]}-varlen") for h in HEADS if h[0] in ("grouped", "latent")]


@pytest.fixture(autouse=True)
def megatron_adapted() -> None:
    """Adapt Megatron before its first import, as a run does."""
    if not choose("auto").is_gpu:
        cpu.install()


def _metadata(segments: list[int], rows: int = 1) -> torch.Tensor:
    """Return `[B, 4, S]` of text documents of these lengths."""
    segment = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments))
    position = torch.cat([torch.arange(n) for n in segments])
    return torch.stack([segment, position, position, position]).expand(rows, -1, -1).clone()


# --- over context ranks ---


@pytest.fixture(scope="module")
def context_errors(worlds: Worlds, request: pytest.FixtureRequest) -> dict[str, list[float]]:
    """Return the errors of all cases that were selected, computed in one world of four ranks."""
    tests = (item for item in request.session.items if isinstance(item, pytest.Function))
    selected = [
        test.callspec.params["name"] for test in tests if test.originalname == "test_context_ranks_attend_exactly"
    ]
    found = worlds.run(4, errors_of_cases, selected, timeout=300)
    assert not isinstance(found, WorldFailure), found
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.everything if name in SELDOM else ()) for name in CASES]
)
def test_context_ranks_attend_exactly(context_errors: dict[str, list[float]], name: str) -> None:
    output, *gradients = context_errors[name]
    assert output <= OUTPUT
    assert max(gradients) <= GRADIENT


def test_zigzag_split() -> None:
    from megamm.mcore.context import local_index

    split = [local_index(12, rank, 3, torch.device("cpu")).tolist() for rank in range(3)]
    assert split == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert local_index(5, 0, 1, torch.device("cpu")).tolist() == [0, 1, 2, 3, 4]


# --- one rank ---


@pytest.mark.parametrize(("heads", "kernel"), KERNELS)
@pytest.mark.parametrize(("length", "only_short"), [(33, False), (301, False), (301, True)])
def test_one_rank_attends_exactly(length: int, only_short: bool, heads: tuple[Any, ...], kernel: str) -> None:
    packed_seq_metadata, tensors = random_metadata(1, length, only_short), inputs(1, length, heads)
    module = build(ALONE, heads[3], heads[5], kernel=kernel)
    found = errors(module, torch.arange(length), tensors, packed_seq_metadata, heads[5])
    assert found[0] <= OUTPUT
    assert max(found[1:]) <= GRADIENT


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("only_short", [False, True])
def test_windows_and_caps_are_exact(form: tuple[float, float, int], only_short: bool) -> None:
    length, heads = 301, HEADS[1]
    packed_seq_metadata, tensors = random_metadata(4, length, only_short), inputs(4, length, heads)
    module = build(ALONE, heads[3], heads[5], form=form)
    found = errors(module, torch.arange(length), tensors, packed_seq_metadata, heads[5], form)
    assert found[0] <= OUTPUT
    assert max(found[1:]) <= GRADIENT
    flex = build(ALONE, heads[3], heads[5], kernel="flex", form=form)(*tensors[:3], packed_seq_metadata)
    wanted = attention(*(x.double() for x in tensors[:3]), packed_seq_metadata, heads[5], BASE, form)
    assert relative_error(flex.detach(), wanted.detach()) <= OUTPUT


@pytest.mark.parametrize("form", [None, WINDOWS[1], FORMS[1]], ids=str)
@pytest.mark.parametrize("heads", [heads for heads in HEADS if heads[0] in ("grouped", "latent")])
def test_spans_are_exact(heads: tuple[Any, ...], form: tuple[float, float, int] | None) -> None:
    length = 301
    packed_seq_metadata, tensors = with_spans(random_metadata(4, length), 9), inputs(4, length, heads)
    module = build(ALONE, heads[3], heads[5], form=form, spans=True)
    found = errors(module, torch.arange(length), tensors, packed_seq_metadata, heads[5], form)
    assert found[0] <= OUTPUT
    assert max(found[1:]) <= GRADIENT
    flex = build(ALONE, heads[3], heads[5], kernel="flex", form=form, spans=True)(*tensors[:3], packed_seq_metadata)
    base = BASE if heads[5] else None
    wanted = attention(*(x.double() for x in tensors[:3]), packed_seq_metadata, heads[5] or 1, base, form)
    assert relative_error(flex.detach(), wanted.detach()) <= OUTPUT
    causal = attention(*(x.double() for x in tensors[:3]), packed_seq_metadata[:, :4], heads[5] or 1, base, form)
    assert relative_error(causal, wanted.detach()) > 0.01


@pytest.mark.parametrize("form", WINDOWS, ids=str)
@pytest.mark.parametrize("only_short", [False, True])
def test_windows_of_documents_by_lengths_are_exact(form: tuple[float, float, int], only_short: bool) -> None:
    length, heads = 301, HEADS[1]
    packed_seq_metadata, tensors = random_metadata(5, length, only_short), inputs(5, length, heads)
    module = build(ALONE, heads[3], heads[5], kernel="varlen", form=form)
    found = errors(module, torch.arange(length), tensors, packed_seq_metadata, heads[5], form)
    assert found[0] <= OUTPUT
    assert max(found[1:]) <= GRADIENT


@pytest.mark.parametrize("heads", [heads for heads in HEADS if heads[0] in ("grouped", "latent")])
def test_flex_forward_on_a_cpu(heads: tuple[Any, ...]) -> None:
    """TensorShard mask and call are those of a GPU; they are compiled and have a backward pass only there."""
    length = 301
    packed_seq_metadata, (*qkv, _) = random_metadata(2, length), inputs(2, length, heads)
    expected = attention(*(x.double() for x in qkv), packed_seq_metadata, heads[5] or 1, BASE if heads[5] else None)
    assert (
        relative_error(build(ALONE, heads[3], heads[5], kernel="flex")(*qkv, packed_seq_metadata), expected) <= OUTPUT
    )


@pytest.mark.gpu
@pytest.mark.skipif(not choose("auto").is_gpu, reason="needs a GPU")
@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
@pytest.mark.parametrize("form", [None, *FORMS], ids=str)
def test_kernels_on_a_gpu(kernel: str, form: tuple[float, float, int] | None) -> None:
    device, length, heads = choose("auto").torch_device, 389, ("grouped", 4, 2, 32, 32, 3)
    packed_seq_metadata, tensors = random_metadata(3, length), inputs(3, length, heads)
    module = build(ALONE, heads[3], heads[5], kernel=kernel, form=form, device=device)

    def on_gpu(*arguments: torch.Tensor) -> torch.Tensor:
        return module(*(x.to(device) for x in arguments)).cpu()

    found = errors(on_gpu, torch.arange(length), tensors, packed_seq_metadata, heads[5], form)
    assert max(found) <= GRADIENT


def test_every_layer_sees_its_own_metadata() -> None:
    """State that layers share for packed_seq_metadata is not used for another tensor, or after it was changed."""
    heads, length = HEADS[0], 32
    module, (*qkv, _) = build(ALONE, heads[3], 1), inputs(4, length, heads)

    def check(packed_seq_metadata: torch.Tensor) -> None:
        expected = attention(*(x.double() for x in qkv), packed_seq_metadata, 1, BASE)
        assert relative_error(module(*qkv, packed_seq_metadata), expected) <= OUTPUT

    packed_seq_metadata = random_metadata(5, length)
    check(packed_seq_metadata)
    check(packed_seq_metadata.detach())
    packed_seq_metadata[:, 0] = random_metadata(6, length)[:, 0]
    check(packed_seq_metadata)
    check(packed_seq_metadata.flip(2).flip(0))
    with torch.inference_mode():
        inner = random_metadata(7, length)
        check(inner)
        inner[:, 0] = 0
        check(inner)


def _work(module: torch.nn.Module, packed_seq_metadata: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> float:
    """Return the share of the S x S scores that a forward pass computes."""
    length, scores, plain = packed_seq_metadata.shape[2], 0, F.scaled_dot_product_attention

    def counted(query: torch.Tensor, key: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        nonlocal scores
        scores += query.shape[2] * key.shape[2]
        return plain(query, key, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", counted)
        query = torch.randn(length, 1, 1, 4)
        module(query, query, query, packed_seq_metadata)
    return scores / length**2


def test_masked_work_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(ALONE, 4, 1)
    assert _work(module, _metadata([2048]), monkeypatch) == pytest.approx(0.5, abs=0.04)
    assert _work(module, _metadata([32] * 64), monkeypatch) == pytest.approx(1 / 16)
    # A span of 256 tokens in the middle of the row: only its own blocks see two blocks more ahead.
    spans = torch.cat((_metadata([2048]), torch.full((1, 1, 2048), -1)), 1)
    spans[:, 4, 1024:1280] = 0
    more = _work(build(ALONE, 4, 1, spans=True), spans, monkeypatch) - _work(module, _metadata([2048]), monkeypatch)
    assert more == pytest.approx(1 / 16**2)


# --- positions ---


def test_positions_of_a_row() -> None:
    from megamm.mcore.attention import document_positions

    segment = torch.tensor([[0, 0, 0, 1, -1, -1]])
    assert document_positions(segment).tolist() == [[0, 1, 2, 0, 0, 1]]


@pytest.mark.parametrize("head_dim", [6, 20, 64, 128])
def test_three_axes_are_those_of_qwen3_vl(head_dim: int) -> None:
    from transformers import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding, apply_rotary_pos_emb

    section = list(rope.sections(head_dim))
    parameters = {"rope_type": "default", "rope_theta": BASE, "mrope_section": section, "mrope_interleaved": True}
    theirs = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(head_dim=head_dim, rope_parameters=parameters))
    query, position = torch.randn(33, 4, 2, head_dim), random_metadata(8, 33)[:, 1:]
    cosines, sines = theirs(query, position.transpose(0, 1))
    expected, _ = apply_rotary_pos_emb(*[query.permute(1, 2, 0, 3)] * 2, cosines, sines)
    for ours in ops.choose("auto", query.device)[0], ops.TORCH:
        rotated, _ = ours.rope(query, query, *rope.angles_of(position, head_dim, rope.Rope(BASE, 3)))
        torch.testing.assert_close(rotated.permute(1, 2, 0, 3), expected, rtol=0, atol=1e-5)
    if head_dim == 128:
        assert section == [24, 20, 20], "Qwen3-VL's own"


def test_text_of_three_axes_is_text_of_one() -> None:
    vocabulary = Vocabulary.of({"text": (50, "")})
    texts = [np.arange(n, dtype=np.int64) for n in (9, 4, 13)]
    documents = [Document(str(i), (Part("text", ids),)) for i, ids in enumerate(texts)]
    row = pack(documents, vocabulary, 40, {"text": PackingSpec(sequential_positions, has_fixed_length=False)})
    packed_seq_metadata, used = Batch.stack([row]).packed_seq_metadata, int((row.segment >= 0).sum())
    qkv = [x[:, :1] for x in inputs(9, 40, HEADS[0])[:3]]
    one, three = (build(ALONE, 8, axes)(*qkv, packed_seq_metadata) for axes in (1, 3))
    assert used == 32
    assert torch.equal(one[:used], three[:used])


@pytest.mark.parametrize("head_dim", [6, 64, 128])
@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_stretched_angles_are_those_of_transformers(head_dim: int, kind: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    own = {"factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 5.0, "original_length": 300}
    parameters = {"rope_type": kind, "rope_theta": BASE, "factor": 8.0}
    if kind == "llama3":
        parameters |= {"low_freq_factor": 1.5, "high_freq_factor": 5.0, "original_max_position_embeddings": 300}
    theirs = LlamaRotaryEmbedding(LlamaConfig(head_dim=head_dim, rope_parameters=parameters)).inv_freq
    scaling = RopeScalingConfig(kind=kind, **own)
    ours = rope.inverse_frequencies(head_dim, rope.Rope(BASE, scaling=scaling), torch.device("cpu"))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    plain = rope.inverse_frequencies(head_dim, rope.Rope(BASE), torch.device("cpu"))
    assert (ours < plain).any() and (kind == "linear" or (ours == plain).any())


def test_too_small_a_head_for_three_axes() -> None:
    with pytest.raises(UserError, match="head_dim = 4"):
        rope.sections(4)


# --- the block mask of flex attention ---


def test_flex_has_no_backward_on_a_cpu() -> None:
    leaf = torch.randn(8, 1, 1, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="backward"):
        build(ALONE, 4, 1, kernel="flex")(leaf, leaf, leaf, _metadata([8]))


def _packed(generator: torch.Generator, length: int, rows: int) -> torch.Tensor:
    """Return metadata of rows of random documents, from one token to all, and padding at the end of some."""
    segments = []
    for row in range(rows):
        longest = [8, 40, length][row % 3]
        sizes = torch.randint(1, longest + 1, (length,), generator=generator)
        segment = torch.repeat_interleave(torch.arange(length), sizes)[:length]
        segments.append(torch.where(torch.arange(length) < length - 19 * (row % 2), segment, -1))
    return torch.stack(segments)[:, None].expand(-1, 4, -1).clone()


@pytest.mark.parametrize("spans", [False, True])
@pytest.mark.parametrize("window", [0, 100, 129])
@pytest.mark.parametrize(("length", "ranks"), [(1, 1), (127, 1), (128, 1), (1000, 1), (1024, 2), (1032, 3), (1288, 7)])
def test_block_mask_is_that_of_torch(length: int, ranks: int, window: int, spans: bool) -> None:
    """Also where a block has queries of two chunks, and where the row is not a multiple of a block."""
    from torch.nn.attention.flex_attention import create_block_mask

    from megamm.mcore.attention import ScoreForm, _block_mask
    from megamm.mcore.context import local_chunks

    metadata = with_spans(_packed(torch.Generator().manual_seed(length + window), length, rows=3), length)
    for rank in {0, ranks - 1}:
        mask = _block_mask(metadata, local_chunks(length, rank, ranks), ScoreForm(window=window, spans=spans))
        wanted = create_block_mask(mask.mask_mod, 3, None, length // ranks, length, device="cpu")
        assert mask.seq_lengths == wanted.seq_lengths
        assert mask.BLOCK_SIZE == wanted.BLOCK_SIZE
        for name in ("kv", "q", "full_kv", "full_q"):
            numbers, indices = (getattr(mask, f"{name}_{what}") for what in ("num_blocks", "indices"))
            wanted_numbers, wanted_indices = (getattr(wanted, f"{name}_{what}") for what in ("num_blocks", "indices"))
            assert numbers.dtype == wanted_numbers.dtype == torch.int32
            assert torch.equal(numbers, wanted_numbers), name
            assert indices.dtype == wanted_indices.dtype
            assert torch.equal(indices, wanted_indices), name


class _Largest(TorchDispatchMode):
    """Records the size of the largest tensor that an operator returns, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *(x.untyped_storage().nbytes() for x in tensors)])
        return result


@pytest.mark.parametrize("spans", [False, True])
@pytest.mark.parametrize("window", [0, 4096])
def test_block_mask_of_a_long_row_needs_little_memory(window: int, spans: bool) -> None:
    """A row of 131,072 tokens: one bool for each of S x S pairs would be 16 GiB."""
    from megamm.mcore.attention import ScoreForm, _block_mask

    metadata = _metadata([100_000, 31_000, 72])
    metadata = torch.cat((metadata, (torch.arange(131_072) // 700)[None, None]), 1) if spans else metadata
    with _Largest() as seen:
        mask = _block_mask(metadata, [(0, 131_072)], ScoreForm(window=window, spans=spans))
    assert seen.largest <= 10 << 20
    blocks = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    by_document = [n * (n + 1) // 2 for n in (100_000 // 128, 31_000 // 128)]
    assert window or spans or 0 < blocks - sum(by_document) < 3 * 1024
