"""Weight gradients in float32: products that add to a float32 sum, and the choice of what accumulates them.

That every layout has the same gradients with them is a feature of the parity matrix (tests/test_parallel.py).
"""

from pathlib import Path

import pytest
import torch

from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.config import load_config
from megamm.config.accelerators import Installed, weight_gradients
from megamm.mcore import cpu
from megamm.ops.accumulate import BLOCK, add_product_
from megamm.ops.op_proofs import KernelSizes, accumulation_proof
from megamm.ops.proof import UNPROVEN, Proven, prove

NONE = Installed(None, None, False, False, None, None, None, None)
APEX = Installed(None, "0.1", True, True, None, None, None, None)
EXAMPLE = Path(__file__).parents[1] / "examples" / "cpu_tiny.yaml"
SWITCH = "model.megatron.gradient_accumulation_fusion"


def _factors(dtype, microbatches=12, tokens=40, outputs=33, inputs=48):
    torch.manual_seed(1)
    # A mean, so that the sum grows: what is added is then small beside it.
    return [
        ((torch.randn(tokens, outputs) + 1).to(dtype), (torch.randn(tokens, inputs) + 1).to(dtype))
        for _ in range(microbatches)
    ]


def test_a_sum_over_microbatches_of_bf16_is_that_of_float64(ops_device):
    factors = _factors(torch.bfloat16)
    exact = sum(dy.double().t() @ x.double() for dy, x in factors)
    total, apart = torch.zeros(33, 48, device=ops_device), torch.zeros(33, 48)
    for dy, x in factors:
        add_product_(total, dy.to(ops_device), x.to(ops_device))
        apart += dy.t() @ x
    # Each of n additions of products that are exact in float32 rounds by at most eps / 2 of the sum of magnitudes.
    count = sum(len(x) for _, x in factors)
    bound = (
        count * torch.finfo(torch.float32).eps / 2 * sum(dy.double().abs().t() @ x.double().abs() for dy, x in factors)
    )
    assert ((total.cpu() - exact).abs() <= bound).all()
    assert (apart - exact).abs().max() > 20 * (total.cpu() - exact).abs().max(), "rounding to bf16 first is worse"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_of_the_sums_dtype(dtype):
    ((dy, x),) = _factors(dtype, 1)
    total = torch.ones(33, 48, dtype=dtype)
    add_product_(total, dy, x)
    torch.testing.assert_close(total, 1 + dy.t() @ x)


def test_sizes_of_several_blocks_of_none_and_of_strided_factors():
    outputs = BLOCK + 3
    (dy, x), (more, _) = _factors(torch.bfloat16, 2, tokens=6, outputs=outputs, inputs=5)
    expected = torch.ones(outputs, 5) + dy.float().t() @ x.float()
    for given, inputs in ((dy, x), (torch.cat([more, dy], 1)[:, outputs:], x.t().contiguous().t())):
        total = torch.ones(outputs, 5)
        add_product_(total, given, inputs)
        add_product_(total, dy[:0], x[:0])  # an expert without tokens
        torch.testing.assert_close(total, expected)


@pytest.mark.parametrize(
    ("found", "is_gpu", "engine", "wanted", "expected"),
    [
        (APEX, True, "native", None, "apex"),
        (APEX, True, "native", False, "separate"),
        (NONE, True, "native", None, "torch"),
        (NONE, True, "native", True, "torch"),
        (NONE, True, "deepspeed", None, "separate"),
        (APEX, False, "native", None, "separate"),
        (APEX, False, "native", True, "torch"),
        (NONE, False, "deepspeed", None, "separate"),
    ],
)
def test_what_accumulates(found, is_gpu, engine, wanted, expected):
    assert weight_gradients(found, is_gpu=is_gpu, engine=engine, wanted=wanted) == expected


def _choose(*overrides, proven=UNPROVEN):
    cpu.install()
    from megamm.mcore import weight_gradients as ours

    return ours.choose(load_config(EXAMPLE, [*overrides]), choose("cpu"), proven)


def test_the_choice_has_its_reason():
    assert _choose() == ("separate", f"added in a separate pass, as on every CPU without {SWITCH}")
    assert _choose(f"{SWITCH}=true") == ("torch", "added to float32 by torch's products")
    assert _choose(f"{SWITCH}=false") == ("separate", f"added in a separate pass, {SWITCH} is false")
    assert _choose("engine=deepspeed") == ("separate", "added in a separate pass, by engine=deepspeed")


def _missing(total, rows, columns):
    raise NotImplementedError("no kernel\nfor this device")


def _wrong(total, rows, columns):
    add_product_(total, rows, columns.roll(1))


def _rounded(total, rows, columns):
    """Add what the product of bfloat16 factors is without a wider sum."""
    total += rows.t() @ columns


@pytest.mark.parametrize("fault", [_missing, _wrong, _rounded])
def test_a_product_that_is_missing_or_wrong_is_not_used(monkeypatch, fault):
    cpu.install()
    from megamm.mcore import weight_gradients as ours

    sizes = KernelSizes(tokens=64, hidden=32, width=48, heads=1, groups=1, head_dim=8, vocabulary=8)
    proof = accumulation_proof(torch.bfloat16, sizes, {"apex": add_product_, "torch": fault})
    outcomes = prove(proof, choose("cpu"))
    assert outcomes["apex"].agrees and not outcomes["torch"].agrees
    assert ("no kernel" in outcomes["torch"].problem) == (fault is _missing)
    proven = Proven({proof.name: outcomes})
    with pytest.raises(UserError, match=f"{SWITCH}: products disagree .*; remove it: ") as caught:
        _choose(f"{SWITCH}=true", proven=proven)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(ours.accelerators, "weight_gradients", lambda *_, **__: "torch")
    how, why = _choose(proven=proven)
    assert how == "separate" and why.startswith("added in a separate pass: products disagree with plain torch: torch")
    monkeypatch.setattr(ours.accelerators, "weight_gradients", lambda *_, **__: "apex")
    assert _choose(proven=proven)[0] == "apex"
