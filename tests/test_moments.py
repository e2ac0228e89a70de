"""Moments in bfloat16 or in host memory: against torch's AdamW, between checkpoints, and the loss of a tiny run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moments_worker import MomentsJob, train

from megamm.common.device import choose
from megamm.parity.worlds import WorldFailure, Worlds

GROUP: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = ((7, 3), (40,), (1,), (0,), (5, 5))
MOST_RELATIVE = 2.0**-8
"""Of rounding to bfloat16: half a unit in the last place."""
MOST_LOSS = 0.01
"""Relative difference of the losses of a run with bfloat16 moments."""


@pytest.fixture
def adams(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function: torch's AdamW and ours over equal parameters, after steps with equal gradients."""
    from megamm.mcore import cpu

    cpu.install()
    from megamm.mcore import adam

    def run(
        dtype: torch.dtype, is_offloaded: bool, steps: int = 5, batch: int = adam.BATCH
    ) -> tuple[torch.optim.AdamW, torch.optim.AdamW]:
        monkeypatch.setattr(adam, "BATCH", batch)
        torch.manual_seed(1)
        ours = [torch.randn(shape, requires_grad=True) for shape in SHAPES]
        theirs = [p.detach().clone().requires_grad_() for p in ours]
        groups = [GROUP | {"params": ours[:2]}, GROUP | {"params": ours[2:], "weight_decay": 0.0}]
        other = [GROUP | {"params": theirs[:2]}, GROUP | {"params": theirs[2:], "weight_decay": 0.0}]
        stored = adam.StoredMomentsAdamW(groups, dtype, is_offloaded, choose("cpu"))
        plain = torch.optim.AdamW(other, fused=True)
        for parameter in ours:
            stored.state[parameter]["step"] = torch.tensor(0.0)
        for _ in range(steps):
            for a, b in zip(ours, theirs, strict=True):
                a.grad = torch.randn(a.shape)
                b.grad = a.grad.clone()
            ours[3].grad = theirs[3].grad = None
            stored.step()
            plain.step()
        return stored, plain

    return run


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def test_in_host_memory_the_numbers_are_those_of_torch(adams: Any) -> None:
    stored, plain = adams(torch.float32, is_offloaded=True)
    for ours, theirs in zip(_parameters(stored), _parameters(plain), strict=True):
        assert torch.equal(ours, theirs)
        if theirs in plain.state:
            for kind, value in plain.state[theirs].items():
                assert torch.equal(stored.state[ours][kind], value), kind


def test_a_parameter_may_be_cut_and_small_ones_updated_together(adams: Any) -> None:
    stored, plain = adams(torch.float32, is_offloaded=True, batch=16)
    for ours, theirs in zip(_parameters(stored), _parameters(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # the ends of slices are computed otherwise
        assert theirs not in plain.state or stored.state[ours]["step"] == plain.state[theirs]["step"] == 5


def test_in_bfloat16_a_step_uses_the_moments_before_they_are_rounded(adams: Any) -> None:
    stored, plain = adams(torch.bfloat16, is_offloaded=False, steps=1)
    for ours, theirs in zip(_parameters(stored), _parameters(plain), strict=True):
        assert torch.equal(ours, theirs)
        if theirs in plain.state:
            for kind in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(stored.state[ours][kind], plain.state[theirs][kind].bfloat16())


def test_in_bfloat16_moments_follow_within_the_rounding_of_few_steps(adams: Any) -> None:
    stored, plain = adams(torch.bfloat16, is_offloaded=False, steps=20)
    for ours, theirs in zip(_parameters(stored), _parameters(plain), strict=True):
        if theirs in plain.state:
            # Each step rounds once, and keeps 0.95 of what was there: the errors sum to at most 20 of one rounding.
            found, wanted = stored.state[ours]["exp_avg_sq"].float(), plain.state[theirs]["exp_avg_sq"]
            assert ((found - wanted).abs() <= 20 * MOST_RELATIVE * wanted).all()


def _run(worlds: Worlds, job: MomentsJob) -> list[dict[str, Any]]:
    found = worlds.run(2, train, job, timeout=120)
    assert not isinstance(found, WorldFailure), found.lines()
    return found


def test_a_run_resumes_with_either_form(worlds: Worlds, tmp_path: Path) -> None:
    """float32 -> bfloat16 -> float32 in host memory; what was stored is rounded once, or the same."""
    _run(worlds, MomentsJob({}, last=3, save=tmp_path / "a"))
    plain = _run(worlds, MomentsJob({}, first=4, last=4, load=tmp_path / "a"))
    bf16 = _run(worlds, MomentsJob({"moments": "bf16"}, first=4, last=4, load=tmp_path / "a", save=tmp_path / "b"))
    host = _run(worlds, MomentsJob({"offload_moments": True}, first=5, last=5, load=tmp_path / "b"))
    for rank in range(2):
        loaded, wanted = bf16[rank]["before"], plain[rank]["before"]
        assert loaded["dtypes"] == {"torch.bfloat16"} and loaded["steps"] == {3.0}
        assert np.array_equal(loaded["main"], wanted["main"]) and np.abs(wanted["exp_avg"]).max() > 0
        for kind in ("exp_avg", "exp_avg_sq"):
            assert np.array_equal(loaded[kind], torch.from_numpy(wanted[kind]).bfloat16().float().numpy())
        again = host[rank]["before"]
        assert again["dtypes"] == {"torch.float32"} and again["steps"] == {4.0}
        for kind in ("main", "exp_avg", "exp_avg_sq"):
            assert np.array_equal(again[kind], bf16[rank]["after"][kind])
        assert bf16[rank]["losses"] == plain[rank]["losses"]


@pytest.mark.everything
def test_losses_stay_within_their_bound(worlds: Worlds) -> None:
    plain = np.array(_run(worlds, MomentsJob({}, last=30))[0]["losses"])
    bf16 = np.array(_run(worlds, MomentsJob({"moments": "bf16"}, last=30))[0]["losses"])
    host = np.array(_run(worlds, MomentsJob({"offload_moments": True}, last=30))[0]["losses"])
    assert np.array_equal(host, plain)
    assert plain[-1].mean() < 0.75 * plain[0].mean()
    difference = np.abs(bf16 / plain - 1).max()
    assert 0 < difference < MOST_LOSS
