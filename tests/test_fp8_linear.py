"""FP8 layers on one rank against their formulas, on several against one; models, their loss curve and resume."""

import fp8_worker
import pytest
import torch
from fp8_worker import BATCH, HIDDEN, LayersJob, ModelJob

from megamm.ops import fp8
from megamm.parity.worlds import WorldFailure

SIZES = {"train.precision": "fp8", "model.ffn_hidden_size": 96}


def _run(worlds, world, function, job):
    found = worlds.run(world, function, job, timeout=300)
    assert not isinstance(found, WorldFailure), found.lines()
    return found


def _expected(job):
    """Compute what the layers must return, by products of the dequantised factors."""
    of = fp8_worker.inputs(job)

    def product(a, b, kind):
        p, q = fp8.quantize(a, kind, job.scaling), fp8.quantize(b, fp8.ACTIVATION, job.scaling)
        return (p.dequantized().double() @ q.dequantized().double().t()).float()

    found = {name: torch.zeros_like(of[name]) for name in ("up", "bias", "down")} | {"y": [], "dx": []}
    for x, dy in zip(of["x"].flatten(1, 2), of["dy"].flatten(1, 2), strict=True):
        before = (product(x, of["up"], fp8.ACTIVATION) + of["bias"]).requires_grad_()
        h = torch.nn.functional.silu(before)
        found["y"].append(product(h.detach(), of["down"], fp8.ACTIVATION))
        (d_before,) = torch.autograd.grad(h, before, product(dy, of["down"].t(), fp8.GRADIENT))
        found["dx"].append(product(d_before, of["up"].t(), fp8.GRADIENT))
        found["down"] += product(dy.t(), h.detach().t(), fp8.GRADIENT)
        found["up"] += product(d_before.t(), x.t(), fp8.GRADIENT)
        found["bias"] += d_before.sum(0)
    shape = (2, job.tokens, BATCH, HIDDEN)
    return found | {name: torch.stack(found[name]).view(shape) for name in ("y", "dx")}


def _assert_close(found, expected, bound):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (torch.from_numpy(found[name]) - value).norm() / value.norm()
        assert error <= bound, f"{name}: {error}"


JOBS = [
    LayersJob(1, False, "tensorwise", True),
    LayersJob(2, False, "rowwise", True),
    LayersJob(2, True, "tensorwise", True),
    pytest.param(LayersJob(1, False, "rowwise", False, tokens=17), marks=pytest.mark.everything),
    pytest.param(LayersJob(2, False, "tensorwise", False), marks=pytest.mark.everything),
    pytest.param(LayersJob(2, True, "rowwise", False, tokens=18), marks=pytest.mark.everything),
]


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_layers_compute_their_three_products(worlds, job):
    """Ranks differ from the formulas by rounding, and by values that underflow with the scale of one of them only."""
    for found in _run(worlds, job.tensor, fp8_worker.compute_layers, job):
        _assert_close(found, _expected(job), 1e-5 if job.tensor == 1 else 1e-3)


def _model(worlds, world, settings, steps=2):
    job = ModelJob(world, tuple(sorted((SIZES | settings).items())), steps)
    (first, *others) = _run(worlds, world, fp8_worker.train, job)
    assert all(other == first for other in others), "every rank reports the job's numbers"
    return first


ALL = {"train.fp8.first_layers_bf16": 0, "train.fp8.last_layers_bf16": 0}
MOE = {"model.moe.num_experts": 4, "model.moe.ffn_hidden_size": 64}
SP = {"parallel.tensor": 2, "parallel.sequence": True}
MLA = {"model.num_query_groups": 4, "model.mla.kv_lora_rank": 48, "model.mla.q_lora_rank": 32}
MLA |= {"model.mla.qk_head_dim": 16, "model.mla.qk_rope_head_dim": 16, "model.mla.v_head_dim": 16}


@pytest.mark.everything
@pytest.mark.parametrize(
    ("world", "layout_of", "model"),
    [
        (2, SP, {"train.fp8.recipe": "rowwise"}),
        (2, {"parallel.pipeline": 2}, {"model.mtp.num_layers": 1} | ALL),
        (2, SP, MLA),
        (4, SP | {"parallel.expert": 2}, MOE),
        (2, SP | {"parallel.expert_tensor": 2}, MOE),
    ],
)
def test_layouts_train_as_one_rank(worlds, world, layout_of, model):
    losses, norms, count = _model(worlds, 1, model)
    ours, our_norms, _ = _model(worlds, world, model | layout_of)
    reference, exact_norms, none = _model(worlds, 1, model | {"train.precision": "bf16"})
    assert count > 0 and none == 0
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(losses), rtol=3e-3, atol=0)
    assert our_norms == pytest.approx(norms, rel=0.05)
    # And FP8 itself is near bf16, but not equal to it.
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(reference), rtol=0.02, atol=0)
    assert norms == pytest.approx(exact_norms, rel=0.1) and norms != exact_norms


@pytest.mark.parametrize("recipe", ["tensorwise", pytest.param("rowwise", marks=pytest.mark.everything)])
def test_grouped_experts_train_as_sequential_ones(worlds, recipe):
    """Both multiply in FP8: gradients are e4m3 in grouped products, and e5m2 in those of one expert."""
    model = MOE | ALL | {"train.fp8.recipe": recipe}
    grouped, norms, _ = _model(worlds, 2, model | {"parallel.expert": 2, "train.experts": "grouped"})
    sequential, other_norms, count = _model(worlds, 1, model | {"train.experts": "sequential"})
    plain, exact_norms, _ = _model(worlds, 1, MOE | {"train.precision": "bf16"})
    assert count > 4 * 3, "each expert's maps are in FP8"
    torch.testing.assert_close(torch.tensor(grouped), torch.tensor(sequential), rtol=3e-3, atol=0)
    assert norms == pytest.approx(other_norms, rel=0.05) and norms != other_norms
    assert norms == pytest.approx(exact_norms, rel=0.1) and grouped != plain


@pytest.mark.everything
def test_a_run_changes_its_precision_when_it_resumes(worlds, tmp_path):
    """A checkpoint has the same tensors in either precision, and all of their bits are read in the other."""
    settings = tuple(sorted((SIZES | ALL).items()))
    (changed,) = _run(worlds, 1, fp8_worker.resume, (tmp_path / "changed", ("bf16", "fp8", "bf16"), settings))
    (plain,) = _run(worlds, 1, fp8_worker.resume, (tmp_path / "plain", ("bf16", "bf16", "bf16"), settings))
    assert all(part.is_same for part in changed)
    assert [part.kinds for part in changed] == [part.kinds for part in plain]
    assert changed[0].losses == plain[0].losses
    for ours, theirs in zip(changed[1:], plain[1:], strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=3e-3) and ours.losses != theirs.losses


@pytest.fixture(scope="module")
def reference_curve(worlds):
    return _curve(worlds, {"train.precision": "bf16"})


def _curve(worlds, settings):
    """Return the loss after each step but the first 19, as the mean of 20 steps."""
    job = tuple(sorted((SIZES | ALL | settings).items()))
    (losses,) = _run(worlds, 1, fp8_worker.curve, job)
    return torch.tensor(losses).unfold(0, 20, 1).mean(1)


@pytest.mark.everything
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_loss_curve_in_fp8_is_near_that_of_bf16(worlds, reference_curve, recipe):
    """Learning 32 rows by heart, FP8 has at any step a loss that bf16 has up to 7 % earlier or later.

    No theory gives this bound: measured are 5.8 % (tensorwise) and 5.3 % (rowwise), on a CPU.
    """
    ours = _curve(worlds, {"train.fp8.recipe": recipe})
    assert reference_curve[-1] < 0.1 * reference_curve[0]
    for index in range(10, len(ours) - 15, 10):
        step = index + 20
        earlier, later = round(0.93 * step) - 20, round(1.07 * step) - 20
        assert reference_curve[later] <= ours[index] <= reference_curve[earlier], step
