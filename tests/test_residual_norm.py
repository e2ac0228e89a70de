"""The norm that adds attention's output to the residual: numbers, gradients and tensors as by two operations."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megamm.common.device import choose
from megamm.config import ParallelConfig, config_from_dict
from megamm.mcore import process_groups
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 8,
}
MOE = {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24}, "zero_centered_norm": True}
CASES = {
    "dense": ({}, {}),
    "experts": (MOE, {}),
    "norms of outputs, second prediction": ({"sandwich_norm": True, "mtp": {"num_layers": 1}}, {}),
    "full recompute": ({}, {"recompute": "full"}),
}
"""Changes of the model and of training."""


class Operators(TorchDispatchMode):
    """Counts calls of the norms' operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "megamm":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def engine():
    """Return a function that builds an engine on a CPU, always with the same weights."""
    device = choose("cpu")
    process_groups.start(device)
    from megamm.engine.native import NativeEngine

    groups = process_groups.build(ParallelConfig(), seed=5)

    def build(model, train):
        config = config_from_dict(
            {
                "output": "unused",
                "ops": "csrc",
                "model": MODEL | model,
                "data": {"seq_length": 40, "sources": [{"path": "unused"}]},
                "tokenizers": {"text": "unused"},
                "optimizer": {"lr": 1e-3},
                "train": {"steps": 1, "global_batch_size": 4, "micro_batch_size": 2} | train,
            },
            "test",
        )
        built = NativeEngine(config, VOCABULARY, groups, device)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in built.chunks[0].module.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return built

    yield build
    process_groups.destroy()


def one_step(engine):
    """Return the loss, all gradients by name, and the calls of operators in a step."""
    from megamm.mcore import step

    batches = rank_batches(global_batch(1, 1, [(True, True)] * 4, 40), 2, 0, 1)
    with Operators() as operators:
        result = step.run(engine.chunks, batches, torch.tensor([1.0, 0.5], dtype=torch.float64), 0.1, engine.groups)
    gradients = {name: p.main_grad.clone() for name, p in engine.chunks[0].module.named_parameters()}
    return result, gradients, operators.calls


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_a_sum_and_a_norm(engine, monkeypatch, name):
    from megamm.mcore import layers

    joined = engine(*CASES[name])
    _, gradients, calls = one_step(joined)
    with monkeypatch.context() as patched:
        patched.setattr(layers, "join_residuals", lambda *_: False)
        apart = engine(*CASES[name])
    _, expected, calls_apart = one_step(apart)
    assert list(gradients) == list(expected)
    for parameter, gradient in expected.items():
        assert gradient.any(), parameter
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-5, atol=1e-8)
    assert not calls_apart["add_rms_norm"]
    run = (3 if "second prediction" in name else 2) * (2 if name == "full recompute" else 1)
    assert calls["add_rms_norm"] == 2 * run  # two microbatches
    assert calls["rms_norm"] == calls_apart["rms_norm"] - calls["add_rms_norm"]
    assert calls["rms_norm_backward"] == calls_apart["rms_norm_backward"]


def test_a_recomputed_norm_is_a_plain_one(engine):
    """The norm's result may be freed and computed again in the backward pass, from the sum alone."""
    norm = engine({}, {}).chunks[0].module.decoder.layers[0].pre_mlp_layernorm
    generator = torch.Generator().manual_seed(1)
    x, residual, factor = (torch.randn(6, 2, 32, generator=generator) for _ in range(3))

    def gradients(is_recomputed):
        norm.weight.grad, inputs = None, (x.clone().requires_grad_(), residual.clone().requires_grad_())
        total = norm(inputs[0], residual=inputs[1])
        with Operators() as operators:
            y = checkpoint(norm, total, use_reentrant=True) if is_recomputed else norm(total)
            assert not operators.calls  # the norm is there already
            ((y * factor).sum() + (total * factor).sum()).backward()
        assert operators.calls["rms_norm"] == is_recomputed
        return [*(each.grad for each in inputs), norm.weight.grad]

    for ours, plain in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, plain)
    assert norm.held is None


def test_dropout_keeps_the_sum_of_megatron(engine, caplog):
    caplog.set_level("INFO")
    _, _, calls = one_step(engine({"megatron": {"hidden_dropout": 0.1}}, {}))
    assert not calls["add_rms_norm"]
    assert "residual: added apart from the norm; joining them needs no bias, no dropout" in caplog.text


def test_a_pass_without_gradients_keeps_nothing(engine):
    """Megatron's layer records the sum's gradient even here, which would keep each layer's sum."""
    model = engine({}, {}).chunks[0].module
    batch = rank_batches(global_batch(1, 1, [(True, True)] * 4, 40), 2, 0, 1)[0]
    seen = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda *call: seen.append(call[2][0]))
        assert layer.pre_mlp_layernorm.held is None
    with torch.no_grad():
        model(batch.input_ids, None, batch.packed_seq_metadata)
    assert len(seen) == 2 and not any(each.requires_grad for each in seen)
    assert all(layer.pre_mlp_layernorm.held is None for layer in model.decoder.layers)
