"""What a step does besides its products, where a GPU would make it slow: waits of the host, passes, collectives."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from step_costs_worker import Operators, costs

from megamm.common.device import Device
from megamm.config import ParallelConfig
from megamm.mcore import process_groups
from megamm.model.loss import Targets, modality_sums, token_counts
from megamm.parity.worlds import WorldFailure, Worlds


@pytest.fixture(scope="module")
def step(worlds: Worlds) -> dict[str, Any]:
    found = worlds.run(2, costs, None, timeout=120)
    assert not isinstance(found, WorldFailure), found.lines()
    return found[0]


def test_each_parameter_is_gathered_once(step: dict[str, Any]) -> None:
    """Each of Megatron's optimizers, of dense parameters and of experts, would gather the parameters of both."""
    assert step["parts of the optimizer"] == 2
    assert step["gathers"] == step["buckets"]


def test_gradients_are_not_scaled_in_a_pass_of_their_own(step: dict[str, Any]) -> None:
    assert step["scaled buffers"] == []


def test_host_waits_once_for_the_norm(step: dict[str, Any]) -> None:
    assert step["parameters"] > 10
    assert step["waits for the norm"] == 1
    assert step["passes to clip"] == step["parts of the optimizer"]


def test_sums_of_the_loss_do_not_wait_for_a_number_of_tokens() -> None:
    modality = torch.tensor([[[-1, 0, 1, 1, -1, 0]]])
    loss = torch.tensor([[[torch.nan, 1.0, 2.0, 4.0, torch.inf, 8.0]]])
    targets = Targets(modality.clamp(min=0), torch.tensor([[[0.0, 0.5, 1.0, 1.0, 0.0, 0.25]]]), modality)
    with Operators() as seen:
        sums = modality_sums(loss, targets, 3)
        counts = token_counts([targets, targets], 3)
    assert sums.tolist() == [2.5, 6.0, 0.0]
    assert counts.tolist() == [[1.5, 4.0, 0.0]]
    assert not seen.of("nonzero", "masked_select", "local_scalar_dense", "index")


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_groups_have_their_device_and_one_limit(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A stub records what torch and Megatron are asked for: this machine has no GPU to connect."""
    from megamm.mcore import cpu

    cpu.install()
    gpu = Device(torch.device("meta"), "gloo") if kind == "cpu" else Device(torch.device("meta", 0), "nccl")
    calls: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: calls.update(given, backend=backend))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(Device, "is_gpu", kind == "gpu")
    monkeypatch.setenv("RANK", "0")
    process_groups.start(gpu)
    assert calls["timeout"] == process_groups.TIMEOUT
    assert calls.get("device_id") == (gpu.torch_device if kind == "gpu" else None)
    monkeypatch.setattr(dist, "get_backend", lambda: calls["backend"])
    monkeypatch.setattr("megatron.core.parallel_state.initialize_model_parallel", _Stopped.raised)
    with pytest.raises(_Stopped) as stopped:
        process_groups.build(ParallelConfig(), seed=1)
    assert stopped.value.given["distributed_timeout_minutes"] == process_groups.TIMEOUT.total_seconds() / 60
    assert stopped.value.given["create_gloo_process_groups"] is False


class _Stopped(Exception):
    """Ends `build` at the stub, with the arguments that it got."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.given = given

    @classmethod
    def raised(cls, **given: Any) -> None:
        raise cls(given)
