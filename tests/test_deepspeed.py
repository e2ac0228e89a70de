"""The DeepSpeed engine against the native one: same weights and rows, float32, two real gloo processes.

Losses, grad norms and learning rates of 20 steps under ZeRO-1, 2 and 3; every tensor of their checkpoints; runs that
change their engine at a checkpoint; mixture of experts, tied embeddings and multi-token prediction; bf16; offload.
"""

import json
import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed_worker
import pytest
import torch
from deepspeed_worker import STEPS
from tiny_run import make_data, megamm, write_config
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.parity.worlds import WorldFailure, Worlds

HALF = 8
# More experts than some microbatches have tokens for; balanced by loss and by bias; one that all tokens use.
MOE = {"num_experts": 12, "top_k": 1, "ffn_hidden_size": 10, "shared_ffn_hidden_size": 12, "score": "sigmoid"}
RICH = {
    "model": {
        "num_layers": 1,
        "moe": MOE | {"aux_loss_coeff": 0.05, "bias_update_rate": 0.02},
        "tie_embeddings": True,
        "mtp": {"num_layers": 1, "loss_weight": 0.3},
    },
    "train": {"recompute": "full"},
}
BF16 = {"train": {"precision": "bf16"}}
RESUMED_STAGES = {"dense": (1, 3), "rich": (3,), "bf16": (1, 2, 3)}
RESUMED = [f"{kind}-native-zero{z}" for kind, stages in RESUMED_STAGES.items() for z in stages]
RESUMED += ["dense-native-offload2", "dense-native-offload3"]
SELDOM = {"rich-native-zero3", "dense-native-offload3", "dense-native-zero1", "weights-zero3"}
SELDOM |= {"dense-zero2", "rich-zero1", "rich-zero2", "bf16-native-zero1", "bf16-native-zero3"}
"""The cases of `make test-all`; a similar case of another stage or model always runs."""


def _marked(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.everything if name in SELDOM else ()) for name in names]


LEARNING = _marked([f"{kind}-zero{stage}" for kind in ("dense", "rich") for stage in (1, 2, 3)])
BF16_RESUMED = _marked([f"bf16-native-zero{stage}" for stage in (1, 2, 3)])
DIVERGING = [*_marked([f"dense-zero{stage}" for stage in (1, 2, 3)]), *BF16_RESUMED]


def _zero(stage: int, offload: bool = False) -> dict[str, Any]:
    return {"engine": "deepspeed", "deepspeed": {"zero": stage, "offload_optimizer": offload}}


def _cases() -> list[dict[str, Any]]:
    native = {"engine": "native"}
    found = []
    for kind, more in (("dense", {}), ("rich", RICH), ("bf16", BF16)):
        last, half = (STEPS, HALF) if kind == "dense" else (3, 1)
        start = {"load": f"{kind}-start", "steps": [0, last], "save_at": half}
        resume = {"steps": [half, half + 2], "save_at": half, "diverge": kind == "bf16"}
        group = [native | {"name": f"{kind}-start", "steps": [0, 0], "save_at": 0}]
        if kind != "bf16":
            # Before any native step: Megatron's scale of the auxiliary loss is global and would stay set.
            zero = start | {"seed": 2, "diverge": kind == "dense"}
            group += [_zero(z) | zero | {"name": f"{kind}-zero{z}"} for z in (1, 2, 3)]
            group += [native | resume | {"name": f"{kind}-zero3-native", "load": f"{kind}-zero3"}]
        group += [native | start | {"name": f"{kind}-native"}]
        resume = resume | {"load": f"{kind}-native"}
        group += [_zero(z) | resume | {"name": f"{kind}-native-zero{z}"} for z in RESUMED_STAGES[kind]]
        found += [more | case for case in group]
    resume = {"load": "dense-native", "steps": [HALF, HALF + 2]}
    weights_only = resume | {"with_optimizer": False}
    return [
        *found,
        _zero(2, offload=True) | resume | {"name": "dense-native-offload2", "save_at": HALF},
        _zero(3, offload=True) | resume | {"name": "dense-native-offload3", "save_at": HALF},
        native | resume | {"name": "dense-zero1-native", "load": "dense-zero1"},
        native | weights_only | {"name": "weights-native"},
        _zero(1) | weights_only | {"name": "weights-zero1"},
        _zero(3) | weights_only | {"name": "weights-zero3"},
    ]


class Results:
    """The output of the cases: one world of two ranks runs all of them, a second one those of SELDOM."""

    def __init__(self, worlds: Worlds, out: Path) -> None:
        self.worlds, self.out, self._has_seldom = worlds, out, False
        _run(worlds, [case for case in _cases() if case["name"] not in SELDOM], out)

    def run(self, name: str) -> Path:
        """Return the output folder of a case; its figures are in a file next to it."""
        if name in SELDOM and not self._has_seldom:
            _run(self.worlds, [case for case in _cases() if case["name"] in SELDOM], self.out)
            self._has_seldom = True
        return self.out / name


@pytest.fixture(scope="module")
def results(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(worlds, tmp_path_factory.mktemp("deepspeed"))


def _run(worlds: Worlds, cases: list[dict[str, Any]], out: Path) -> None:
    # A separate home: an operator compiled at first use is cached there.
    home = out / "home"
    done = worlds.run(2, deepspeed_worker.run, deepspeed_worker.Job(cases, out, home), timeout=600)
    assert not isinstance(done, WorldFailure), done.lines()
    said = [line for rank in range(2) for line in (out / f"stdout_{rank}").read_text().splitlines()]
    said = [line for line in said if "OVERFLOW! Skipping step" not in line]
    assert not said, "DeepSpeed must log only skipped steps"
    kept = {path.parent.name for path in home.rglob("*") if path.is_file()}
    assert kept <= {"megamm"}, "and compile nothing: the outcomes of kernels are all that is kept"


def _read(results: Results, name: str) -> dict[str, torch.Tensor]:
    read = json.loads(results.run(name).with_suffix(".json").read_text())
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in read.items()}


@cache
def _tensors(run: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a checkpoint with torch's own reader."""
    folder = next((run / "checkpoints").glob("step_*")) / "tensors"
    return {k: v for k, v in _load_state_dict_from_keys(checkpoint_id=folder).items() if isinstance(v, torch.Tensor)}


def _assert_same_steps(ours: dict[str, torch.Tensor], native: dict[str, torch.Tensor], rtol: float = 1e-6) -> None:
    """Compare the steps that both ran, starting at our first one."""
    first = int((native["lr"] == ours["lr"][0]).nonzero()[0])
    for key in ("loss", "count", "grad_norm", "lr"):
        theirs = native[key][first : first + len(ours[key])]
        tolerance = {"loss": rtol, "grad_norm": 10 * rtol}.get(key, 0.0)
        torch.testing.assert_close(
            ours[key], theirs, rtol=tolerance, atol=0, equal_nan=True, msg=lambda m, k=key: k + m
        )


@pytest.mark.parametrize("name", LEARNING)
def test_losses_equal_native(results, name):
    kind = name.split("-")[0]
    ours, native = _read(results, name), _read(results, f"{kind}-native")
    assert len(ours["loss"]) == (STEPS if kind == "dense" else 3)
    assert (ours["grad_norm"] > 0.4).all(), "clipping must be active"
    _assert_same_steps(ours, native)
    torch.testing.assert_close(ours["evaluated"], native["evaluated"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LEARNING)
def test_checkpoint_equals_native(results, name):
    """Names, shapes and types are equal; weights, main copies and moments agree after the same steps."""
    ours, native = _tensors(results.run(name)), _tensors(results.run(f"{name.split('-')[0]}-native"))
    assert ours.keys() == native.keys()
    assert len([key for key in ours if key.startswith("optimizer.state.exp_avg_sq.")]) >= 11
    for key, theirs in native.items():
        assert (ours[key].shape, ours[key].dtype) == (theirs.shape, theirs.dtype), key
        error = ((ours[key] - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()
        assert error <= 1e-5, f"{key}: relative error {error:.1e}"


@pytest.mark.parametrize("name", _marked(RESUMED))
def test_what_is_loaded_is_what_was_saved(results, name):
    """A native checkpoint is read into ZeRO's shards and written again bit for bit."""
    native, again = _tensors(results.run(f"{name.split('-')[0]}-native")), _tensors(results.run(name))
    assert native.keys() == again.keys()
    for key, tensor in native.items():
        assert again[key].dtype == tensor.dtype and torch.equal(again[key], tensor), key


@pytest.mark.parametrize(
    "name",
    [
        *_marked([n for n in RESUMED if "bf16" not in n]),
        "dense-zero1-native",
        "dense-zero3-native",
        "rich-zero3-native",
    ],
)
def test_engine_can_change_at_a_checkpoint(results, name):
    """A run resumed by the other engine has the steps of the uninterrupted native run."""
    _assert_same_steps(_read(results, name), _read(results, f"{name.split('-')[0]}-native"))


@pytest.mark.parametrize("name", _marked(["weights-zero1", "weights-zero3"]))
def test_weights_without_optimizer_state(results, name):
    _assert_same_steps(_read(results, name), _read(results, "weights-native"))


@pytest.mark.parametrize("name", BF16_RESUMED)
def test_bf16_is_close_to_native(results, name):
    """Weights are rounded to 8 bits; gradients are added and reduced in float32."""
    _assert_same_steps(_read(results, name), _read(results, "bf16-native"), rtol=1e-3)


@pytest.mark.parametrize("name", DIVERGING)
def test_divergence_is_reported(results, name):
    """A norm that is not finite is reported, whatever DeepSpeed makes of such a gradient."""
    assert not math.isfinite(_read(results, name)["diverged"])


def test_a_run_begins_with_zero3_and_ends_natively(tmp_path):
    make_data(tmp_path)
    train = {"steps": 4, "eval_every": 4}
    config = write_config(tmp_path, tmp_path / "run", train=train)
    begun = megamm("train", config, "engine=deepspeed", "deepspeed.zero=3", "train.stop_after=2", "--nproc", "2")
    assert begun.returncode == 0, begun.stderr
    assert "engine: DeepSpeed" in begun.stderr and "ZeRO-3" in begun.stderr
    ended = megamm("train", config)
    assert ended.returncode == 0, ended.stderr
    assert "step_00000002 at step 2" in ended.stdout and "step 4/4" in ended.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    heldout = {line["step"]: line["heldout/text"] for line in lines if "heldout/text" in line}
    assert heldout.keys() == {2, 4} and heldout[4] < heldout[2]


def test_without_the_package_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    from megamm.mcore import process_groups

    process_groups.start(choose("cpu"))
    from megamm.engine.deepspeed.engine import import_deepspeed

    with pytest.raises(UserError, match="deepspeed is not installed"):
        import_deepspeed(choose("cpu"))
