"""Experts in grouped products: the product and the order of rows in float64, then a model against sequential experts.

Layouts with several ranks are in test_parallel.py, whose reference has sequential experts, and checkpoints between both
forms in test_mcore_checkpoint.py.
"""

import logging
from types import SimpleNamespace

import pytest
import torch

from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.mcore import process_groups
from megamm.ops import routing
from megamm.ops.grouped_linear import grouped_linear, grouped_linear_torch, why_not
from megamm.parity.case import Case
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches
from megamm.parity.worlds import WorldFailure

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
"""Largest error relative to the largest value: the rounding of the dtype."""
SIZES = [(3, 0, 5, 0, 1), (0, 0, 4), (7,), (0, 0), (1, 1, 1, 1)]
"""Rows of each group: some have none, the last or the first too, or all."""


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    if expected.numel():
        error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"{error:.1e}"


@pytest.mark.parametrize("product", [grouped_linear, grouped_linear_torch])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_product_and_gradients_are_those_of_each_group(product, dtype):
    for sizes in SIZES:
        torch.manual_seed(len(sizes))
        x, dy = torch.randn(sum(sizes), 16).to(dtype), torch.randn(sum(sizes), 24).to(dtype)
        weight = torch.randn(len(sizes), 24, 16).to(dtype)
        inputs = [x.requires_grad_(), weight.requires_grad_()]
        y = product(x, weight, torch.tensor(sizes))
        gradients = torch.autograd.grad(y, inputs, dy)
        parts = zip(x.double().split(sizes), weight.double(), dy.double().split(sizes), strict=True)
        wanted = [(a @ matrix.t(), d @ matrix, d.t() @ a) for a, matrix, d in parts]
        y64, dx64, dweight64 = (list(each) for each in zip(*wanted, strict=True))
        close(y, torch.cat(y64), TOLERANCES[dtype])
        close(gradients[0], torch.cat(dx64), TOLERANCES[dtype])
        close(gradients[1], torch.stack(dweight64), TOLERANCES[dtype])
        assert not gradients[1][torch.tensor(sizes) == 0].any()


def test_a_gradient_that_a_kernel_leaves_unwritten_is_zero(monkeypatch):
    """Kernels of some GPUs do not write the gradient of a matrix without rows."""
    real = torch._grouped_mm

    def leaves_garbage(a, b, offsets):
        result = real(a, b, offsets)
        if result.dim() == 3:
            result[1] = float("nan")
        return result

    monkeypatch.setattr(torch, "_grouped_mm", leaves_garbage)
    weight = torch.randn(3, 8, 8, requires_grad=True)
    grouped_linear(torch.randn(5, 8), weight, torch.tensor([2, 0, 3])).sum().backward()
    assert not weight.grad[1].any()
    assert weight.grad[[0, 2]].isfinite().all()


def test_what_the_kernel_cannot_multiply_has_a_reason():
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert why_not(torch.bfloat16, (768, 2048), other) == why_not(torch.float32, (40, 48), cpu) == ""
    assert why_not(torch.float32, (40, 48), other) == "torch has no grouped product of float32 on this device"
    assert why_not(torch.bfloat16, (768, 20), cpu) == "20 elements of bfloat16 are not a multiple of 16 bytes"
    with pytest.raises(ValueError, match=r"x \[3, 8\], weight \[2, 4, 9\] and sizes \[2\] must be"):
        grouped_linear(torch.zeros(3, 8), torch.zeros(2, 4, 9), torch.tensor([1, 2]))


def routing_maps():
    """Yield maps with two experts for each token, with any number, and without any."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(13, 6, generator=generator).topk(2).indices
    yield torch.zeros(13, 6, dtype=torch.bool).scatter_(1, chosen, True)
    yield torch.rand(9, 5, generator=generator) < 0.3
    yield torch.zeros(4, 3, dtype=torch.bool)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rows_are_gathered_by_expert_and_added_by_token(dtype):
    for routing_map in routing_maps():
        rows = routing.rows_of(routing_map, int(routing_map.sum()))
        expert, token = routing_map.t().nonzero().unbind(1)  # sorted by expert, then by token
        assert torch.equal(rows.token, token)
        assert torch.equal(rows.choice, token * routing_map.shape[1] + expert)

        tokens = torch.randn(len(routing_map), 33).to(dtype).requires_grad_()
        values = torch.randn(len(token), 33).to(dtype).requires_grad_()
        gathered, combined = routing.gather(tokens, rows), routing.combine(values, rows)
        assert torch.equal(gathered, tokens[token])
        summed = torch.zeros(tokens.shape, dtype=torch.float64).index_add(0, token, values.double())
        close(combined, summed, TOLERANCES[dtype])
        # Each is the other's gradient.
        (dtokens,) = torch.autograd.grad(gathered, tokens, values)
        assert torch.equal(dtokens, combined)
        (dvalues,) = torch.autograd.grad(combined, values, tokens)
        assert torch.equal(dvalues, gathered)


def test_an_order_is_stable_and_reversible():
    keys = torch.tensor([2, 0, 2, 1, 0, 0])
    order = routing.sort(keys)
    assert order.source.tolist() == [1, 4, 5, 3, 0, 2]
    x = torch.randn(6, 3, requires_grad=True)
    y = routing.reorder(x, order)
    assert torch.equal(y, x[order.source])
    assert torch.equal(routing.reorder(y, order.reversed()), x)
    (dx,) = torch.autograd.grad(y, x, y)
    assert torch.equal(dx, x)


MOE = {"model.moe.num_experts": 6, "model.moe.ffn_hidden_size": 40, "model.num_layers": 2}
MODELS = {
    "with a shared expert and biases": MOE
    | {"model.moe.shared_ffn_hidden_size": 24, "model.moe.score": "sigmoid", "model.moe.bias_update_rate": 0.01},
    "experts without tokens": MOE | {"model.moe.num_experts": 64, "model.moe.top_k": 1, "model.moe.score": "sigmoid"},
    "rows of odd width": MOE | {"model.moe.ffn_hidden_size": 7, "model.moe.aux_loss_coeff": 0.02},
    "tanh-GELU, all tokens everywhere": MOE | {"model.activation": "gelu_tanh", "model.moe.dispatcher": "allgather"},
}


def step(settings):
    """Return initial weights, loss and gradients of a step of one rank, by the names and boxes of checkpoints."""
    case = Case.of(1, {"data.seq_length": 21, "train.global_batch_size": 2} | settings)
    process_groups.start(choose("cpu"))
    from megamm.engine.native import NativeEngine
    from megamm.mcore import shard_specs

    groups = process_groups.build(case.config.parallel, seed=3)
    engine = NativeEngine(case.config, VOCABULARY, groups, choose("cpu"))
    specs = shard_specs.of(engine.chunks[0].module, groups)
    start = {(spec.key, spec.offset): spec.block(spec.tensor).data.clone() for spec in specs}
    rows = global_batch(1, 1, [(True, True)] * 2, case.config.data.seq_length)
    result = engine.compute_gradients(rank_batches(rows, 2, 0, 1), torch.ones(2, dtype=torch.float64))
    parameters = [spec for spec in specs if isinstance(spec.tensor, torch.nn.Parameter)]
    gradients = {(spec.key, spec.offset): spec.block(spec.tensor.main_grad).data.clone() for spec in parameters}
    process_groups.destroy()
    return start, result.loss.mean, gradients


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_a_step_equals_sequential_experts(settings):
    start, loss, gradients = step(settings | {"train.experts": "grouped"})
    their_start, their_loss, theirs = step(settings | {"train.experts": "sequential"})
    assert start.keys() == their_start.keys()
    assert all(torch.equal(start[key], their_start[key]) for key in start)
    torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == theirs.keys()
    assert any(".experts.linear_fc1" in name for name, _ in gradients)
    for key, gradient in gradients.items():
        scale = theirs[key].norm().clamp(min=1e-3 * max(g.norm() for (name, _), g in theirs.items() if name == key[0]))
        assert (gradient - theirs[key]).norm() <= 1e-6 * scale.clamp(min=1e-30), key


def test_the_choice_is_logged_and_what_it_does_not_support_is_one_line(caplog):
    caplog.set_level(logging.INFO)
    step(MODELS["rows of odd width"])
    assert "experts: grouped, one product after another: 14 elements of float32 are not a multiple" in caplog.text
    needs_other = MOE | {"model.megatron": {"moe_expert_capacity_factor": 1.0}}
    with pytest.raises(UserError, match=r"grouped does not support model\.megatron\.moe_expert_capacity_factor"):
        step(needs_other | {"train.experts": "grouped"})
    process_groups.destroy()
    step(needs_other)
    assert "experts: sequential, model.megatron.moe_expert_capacity_factor needs it" in caplog.text


def exchanged(dispatcher):
    """On one of two ranks with two experts each: send every token to the first rank's; expert e multiplies by e + 1.

    Return rows of this rank, the largest errors of results and of gradients, and the shapes that experts got.
    """
    config = Case.of(2, {"parallel.expert": 2, "model.moe.num_experts": 4}).config
    groups = process_groups.build(config.parallel, seed=1).collection
    from megamm.mcore.experts import DISPATCHERS

    rank = groups.ep.rank()
    exchange = DISPATCHERS[dispatcher](2, [2 * rank, 2 * rank + 1], SimpleNamespace(moe_router_topk=1), groups)
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randn(5, 1, 8, generator=generator, requires_grad=True)
    expert = torch.randint(2, (5,), generator=generator)
    routing_map = torch.nn.functional.one_hot(expert, 4).bool()
    probs = torch.rand(5, 4, generator=generator).mul(routing_map).requires_grad_()

    rows, weights = exchange.token_dispatch(*exchange.dispatch_preprocess(tokens, routing_map, probs))
    rows, sizes, weights = exchange.dispatch_postprocess(rows, weights)
    factors = torch.arange(2 * rank + 1.0, 2 * rank + 3).repeat_interleave(sizes)
    result = exchange.combine_preprocess(rows * (weights * factors)[:, None])
    result = exchange.combine_postprocess(exchange.token_combine(result))
    factor = (probs * routing_map).sum(1) * (expert + 1)
    wanted = tokens * factor[:, None, None]
    gradients, theirs = (torch.autograd.grad(x.square().sum(), (tokens, probs)) for x in (result, wanted))
    errors = [(result - wanted).abs().max(), *((a - b).abs().max() for a, b in zip(gradients, theirs, strict=True))]
    return len(rows), sizes.tolist(), max(errors).item()


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_a_rank_may_get_no_token(worlds, dispatcher):
    found = worlds.run(2, exchanged, dispatcher, timeout=120)
    assert not isinstance(found, WorldFailure), found.lines()
    (rows, sizes, error), (none, zeros, other_error) = found
    assert (rows, sum(sizes), none, zeros) == (10, 10, 0, [0, 0])
    assert max(error, other_error) < 1e-5
