"""Chunked cross entropy of a linear layer and its plain form, against torch's on full logits in float64.

test_cross_entropy_kernels.py tests its kernels separately.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_worker import CASES, CHUNKED, PLAIN, errors_of_cases, inputs, relative_error, run

from megamm.ops.cross_entropy import MOST_CHUNKS
from megamm.parity.worlds import WorldFailure, Worlds

# For loss, token losses, gradient of hidden, gradient of weight. In bfloat16 logits and gradients have 8 bits.
TOLERANCE = {
    "float64": [1e-12] * 4,
    "float32": [1e-6, 1e-6, 2e-6, 2e-6],
    "bfloat16": [3e-3, 5e-3, 1e-2, 1e-2],
    "float16": [4e-4, 6e-4, 1.5e-3, 1.5e-3],
}
OPTIONS = [{}, {"ignore_index": 3}, {"short": 3}]
# tokens, width, rows of weight, rows of a chunk
SIZES = [(1, 1, 4, 8), (37, 19, 53, 8), (64, 32, 128, 64), (131, 7, 1001, 50)]


def _on(device: torch.device, function: Any, **fixed: Any) -> Any:
    """Return the function with its tensors moved to the device, and results and gradients moved back."""

    def call(*tensors: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        moved = [None if tensor is None else tensor.to(device) for tensor in tensors]
        return tuple(x.cpu() for x in function(*moved, **fixed, **options))

    return call


@pytest.fixture
def chunked(ops_device: torch.device) -> Any:
    return _on(ops_device, CHUNKED, chunk_rows=8)


@pytest.fixture(params=["csrc", "torch"])
def function(request: Any, ops_device: torch.device) -> Any:
    return _on(ops_device, CHUNKED if request.param == "csrc" else PLAIN)


def _full_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weight: torch.Tensor | None = None,
    vocabulary_size: int | None = None,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call torch's own functions in the dtype of hidden."""
    logits = F.linear(hidden, weight)[:, :vocabulary_size]
    token_loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    return (token_loss if token_weight is None else token_loss * token_weight).sum(), token_loss.detach()


def _check(ours: list[torch.Tensor], theirs: list[torch.Tensor], dtype: str) -> None:
    for x, y, tolerance in zip(ours, theirs, TOLERANCE[dtype], strict=True):
        assert relative_error(x, y) <= tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_torch_on_full_logits(
    ops_device: torch.device, size: tuple[int, ...], options: dict[str, Any], dtype: str
) -> None:
    tokens, width, rows, chunk = size
    options = dict(options)
    vocabulary = rows - options.pop("short", 0)
    hidden, weight, labels, token_weight = inputs(sum(size), tokens, width, rows, vocabulary)
    labels[labels == -100] = options.get("ignore_index", -100)
    labels[-1] = 0
    kind = getattr(torch, dtype)
    for given in (token_weight, None):
        theirs = run(_full_logits, hidden, weight, labels, given, vocabulary_size=vocabulary, **options)
        for function in (_on(ops_device, CHUNKED, chunk_rows=chunk), _on(ops_device, PLAIN)):
            ours = run(function, hidden.to(kind), weight.to(kind), labels, given, vocabulary_size=vocabulary, **options)
            assert [x.dtype for x in ours] == [torch.promote_types(kind, torch.float32)] * 2 + [kind] * 2
            _check(ours, theirs, dtype)


def test_mean_of_transformers(chunked: Any) -> None:
    """Its causal loss shifts labels itself: the last token of a row predicts nothing."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    hidden, weight, labels, _ = inputs(0, 24, 16, 40, 40)
    shifted = torch.cat([labels[1:], labels.new_tensor([-100])])
    mean = torch.full((24,), 1 / float((shifted != -100).sum()))
    theirs = ForCausalLMLoss(F.linear(hidden, weight)[None], labels[None], vocab_size=40)
    ours, _ = chunked(hidden.float(), weight.float(), shifted, mean)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_those_of_differences(chunked: Any, options: dict[str, Any]) -> None:
    options = dict(options)
    vocabulary = 9 - options.pop("short", 0)
    hidden, weight, labels, token_weight = inputs(1, 11, 5, 9, vocabulary)
    labels[labels == -100] = options.get("ignore_index", -100)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return chunked(hidden, weight, labels, token_weight, vocabulary_size=vocabulary, **options)[0]

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


def test_backward_scales_and_may_run_twice(chunked: Any) -> None:
    hidden, weight, *labels = inputs(2, 20, 6, 30, 30)
    hidden.requires_grad_()
    loss, _ = chunked(hidden, weight.requires_grad_(), *labels)
    once = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    tripled = torch.autograd.grad(3 * loss, [hidden, weight])
    for x, y in zip(once, tripled, strict=True):
        torch.testing.assert_close(3 * x, y)


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_only_gradients_that_are_asked_for(chunked: Any, needed: tuple[bool, bool]) -> None:
    *floats, labels, _ = inputs(3, 20, 6, 30, 30)
    for tensor, wanted in zip(floats, needed, strict=True):
        tensor.requires_grad_(wanted)
    loss, token_loss = chunked(*floats, labels)
    assert loss.requires_grad == any(needed)
    assert not token_loss.requires_grad
    if any(needed):
        loss.backward()
        assert [tensor.grad is not None for tensor in floats] == list(needed)
    with torch.no_grad():
        assert torch.equal(chunked(*floats, labels)[0], loss)


def test_strided_arguments(chunked: Any) -> None:
    hidden, weight, labels, token_weight = inputs(4, 33, 8, 50, 50)
    expected = run(chunked, hidden, weight, labels, token_weight)
    columns = torch.stack([hidden, hidden], 2)[:, :, 1]
    transposed = weight.t().contiguous().t()
    every_second = torch.stack([labels, labels], 1)[:, 0]
    _check(run(chunked, columns, transposed, every_second, token_weight), expected, "float64")


def test_no_tokens(function: Any) -> None:
    loss, token_loss, of_hidden, of_weight = run(
        function, torch.empty(0, 3), torch.randn(5, 3), torch.empty(0, dtype=torch.int64)
    )
    assert loss == 0
    assert token_loss.shape == (0,)
    assert of_hidden.shape == (0, 3)
    assert torch.equal(of_weight, torch.zeros(5, 3))


def test_large_logits(function: Any) -> None:
    """Logits of +-1e5, whose exponentials would overflow without subtracting the maximum."""
    hidden, weight, *labels = inputs(5, 40, 12, 60, 60)
    hidden = hidden * 2.0**15
    theirs = run(_full_logits, hidden, weight, *labels)
    assert theirs[1].max() > 1e5
    _check(run(function, hidden.float(), weight.float(), *labels), theirs, "float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_goes_on(value: float, function: Any) -> None:
    """Non-finite values reach the loss and gradients of their own token, and no other."""
    hidden, weight, labels, _ = inputs(6, 9, 4, 12, 12)
    labels = labels.clamp(min=0)
    hidden[4, 0] = value
    loss, token_loss, of_hidden, of_weight = run(function, hidden.float(), weight.float(), labels)
    theirs = run(_full_logits, hidden.float(), weight.float(), labels)
    assert not loss.isfinite()
    finite = torch.arange(9) != 4
    assert torch.equal(token_loss.isfinite(), finite)
    assert torch.equal(of_hidden.isfinite().all(1), finite)
    torch.testing.assert_close(of_hidden[finite], theirs[2][finite])
    assert not of_weight.isfinite().any()


def test_a_logit_of_minus_infinity_is_impossible_and_no_more(function: Any) -> None:
    hidden, weight = torch.ones(3, 1), torch.tensor([[0.5], [-torch.inf], [0.25]])
    labels = torch.tensor([0, 2, 0])
    loss, token_loss, _, of_weight = run(function, hidden, weight, labels)
    alone = run(function, hidden, weight[[0, 2]], torch.tensor([0, 1, 0]))
    torch.testing.assert_close([loss, token_loss, of_weight[[0, 2]]], [*alone[:2], alone[3]])
    assert run(function, hidden, weight, torch.tensor([0, 1, 0]))[1].tolist()[1] == torch.inf


def test_an_ignored_token_adds_nothing_whatever_its_logits(function: Any) -> None:
    hidden, weight, labels, token_weight = inputs(7, 9, 4, 12, 12)
    labels = labels.clamp(min=0)
    labels[2] = -100
    hidden[2] = 1e300  # logits overflow, hidden itself does not
    token_weight[2] = torch.nan
    weight = weight * 1e10
    loss, token_loss, of_hidden, of_weight = run(function, hidden, weight, labels, token_weight)
    rest = torch.arange(9) != 2
    alone = run(function, hidden[rest], weight, labels[rest], token_weight[rest])
    torch.testing.assert_close([loss, token_loss[rest], of_hidden[rest], of_weight], alone)
    assert token_loss[2] == 0
    assert not of_hidden[2].any()


@pytest.mark.parametrize("label", [-1, 10, 11, 12, 1 << 40])
def test_a_label_that_is_none_makes_nan(label: int, function: Any) -> None:
    """A label of a padding row (10, 11) gives NaN, also with weight 0."""
    hidden, weight, labels, token_weight = inputs(8, 9, 4, 12, 10)
    labels[5], token_weight[5] = label, 0.0
    loss, token_loss, of_hidden, of_weight = run(function, hidden, weight, labels, token_weight, vocabulary_size=10)
    assert loss.isnan()
    assert torch.equal(token_loss.isnan(), torch.arange(9) == 5)
    assert of_hidden[5].isnan().all()
    assert of_weight[:10].isnan().all()
    assert not of_weight[10:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_are_bitwise_equal(ops_device: torch.device, dtype: torch.dtype) -> None:
    hidden, weight, *labels = inputs(9, 700, 48, 513, 513)
    function = _on(ops_device, CHUNKED)
    first, second = (run(function, hidden.to(dtype), weight.to(dtype), *labels) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_registration_and_compiling(ops_device: torch.device) -> None:
    hidden, weight, labels, token_weight = (x.to(ops_device) for x in inputs(10, 21, 6, 30, 28))
    arguments = (hidden.float().requires_grad_(), weight.float().requires_grad_(), labels, token_weight)
    for flags in ((True, True), (True, False), (False, False)):
        torch.library.opcheck(torch.ops.megamm.linear_cross_entropy.default, (*arguments, 28, -100, "", 8, *flags))
    eager = run(CHUNKED, *arguments, vocabulary_size=28)
    compiled = torch.compile(CHUNKED, fullgraph=True, backend="aot_eager")
    for x, y in zip(run(compiled, *arguments, vocabulary_size=28), eager, strict=True):
        assert torch.equal(x, y)
    logits, statistics = torch.randn(21, 30, device=ops_device), torch.rand(21, 3, device=ops_device)
    torch.library.opcheck(torch.ops.megamm.cross_entropy_statistics.default, (logits, labels, statistics))
    torch.library.opcheck(torch.ops.megamm.cross_entropy_gradient_.default, (logits, labels, statistics, token_weight))


@pytest.mark.parametrize("function", [CHUNKED, PLAIN])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.ones(4, 2)}, r"hidden \[4, 2\] and weight \[5, 3\] are not"),
        ({"weight": torch.ones(5, 3).double()}, "weight is float64, hidden is float32"),
        ({"weight": torch.ones(5, 3, device="meta")}, "weight is on meta, hidden is on cpu"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels \[3\] does not match hidden \[4, 3\]"),
        ({"labels": torch.zeros(4, dtype=torch.int32)}, "labels is torch.int32"),
        ({"labels": torch.zeros(4, dtype=torch.int64, device="meta")}, "labels is on meta, hidden is on cpu"),
        ({"token_weight": torch.ones(4).double()}, "token_weight is torch.float64"),
        ({"token_weight": torch.ones(4).requires_grad_()}, "token_weight is a constant"),
        ({"vocabulary_size": 6}, r"vocabulary_size 6 is not in 1\.\.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_do_not_fit(changed: dict[str, Any], message: str, function: Any) -> None:
    given: dict[str, Any] = {
        "hidden": torch.ones(4, 3),
        "weight": torch.ones(5, 3),
        "labels": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        function(**given | changed)


# --- over tensor-parallel ranks ---


@pytest.fixture(scope="module")
def parallel_errors(worlds: Worlds) -> dict[str, list[float]]:
    """Return the errors of all cases, computed in one world of four ranks."""
    found = worlds.run(4, errors_of_cases, None, timeout=300)
    assert not isinstance(found, WorldFailure), found
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize("name", CASES)
def test_a_split_vocabulary_changes_nothing(parallel_errors: dict[str, list[float]], name: str) -> None:
    for error, tolerance in zip(parallel_errors[name], TOLERANCE[CASES[name][2]], strict=True):
        assert error <= tolerance


# --- memory ---


def _peak_bytes(call: Callable[[], Any]) -> int:
    """Return the peak memory that torch's allocator has handed out within a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate((e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())), initial=0))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.everything)])
def test_extra_memory_is_a_twentieth_of_the_logits(dtype: torch.dtype) -> None:
    """Memory beyond arguments and gradients, over forward and backward; for the plain form this includes all logits."""
    hidden, weight, labels, token_weight = inputs(11, 8192, 8, 6001, 6001)
    leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    # The weight's gradient is summed in float32; backward also makes the scaled gradients.
    gradients = sum(
        x.numel() * (x.element_size() + y) for x, y in zip(leaves, (leaves[0].element_size(), 4), strict=True)
    )
    logits = 8192 * 6001 * leaves[0].element_size()

    def step(function: Any) -> None:
        torch.autograd.grad(function(*leaves, labels, token_weight)[0], leaves)

    # Without bfloat16 instructions a CPU's matrix product takes memory itself, up to this amount.
    chunk = torch.empty(-(-8192 // MOST_CHUNKS), 6001, dtype=dtype)
    product = _peak_bytes(lambda: torch.mm(leaves[0].detach()[: len(chunk)], leaves[1].detach().t(), out=chunk))
    assert _peak_bytes(lambda: step(CHUNKED)) - gradients - product <= 0.05 * logits
    assert _peak_bytes(lambda: step(PLAIN)) - gradients >= 1.9 * logits
