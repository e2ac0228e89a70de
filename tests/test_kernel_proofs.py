"""Kernels prove themselves: the error model, the cache, the choice, agreement of ranks, and `megamm doctor --kernels`.

Wrong kernels are made by changing right ones; test_weight_gradients.py has those of weight gradients.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from kernel_worker import KernelJob, agree
from tiny_run import make_data, megamm, write_config
from typer.testing import CliRunner

from megamm import ops
from megamm.cli import app
from megamm.common.device import Device, choose
from megamm.common.errors import UserError
from megamm.config import ModalityConfig, config_from_dict
from megamm.config.accelerators import Installed
from megamm.mcore import cpu
from megamm.model import attention_kernel
from megamm.ops import library, proof_cache
from megamm.ops.op_proofs import KernelSizes, fp8_proofs, grouped_fp8_proofs, grouped_proof, op_proofs
from megamm.ops.proof import Draw, Inputs, Outcome, Proof, Proven, prove
from megamm.ops.proof_cache import ProofCache, prove_here, prove_missing, summarise
from megamm.parity.worlds import WorldFailure, Worlds

CPU = choose("cpu")
SIZES = KernelSizes(tokens=24, hidden=48, width=32, heads=4, groups=2, head_dim=16, vocabulary=40)
GOOD, FAST = Outcome(0.1, 0.2, 2.0), Outcome(0.15, 0.2, 1.0)
BAD = Outcome(0.3, 0.2, 0.5, "result 0 is off by 3.0e-01, and 2.0e-01 is the bound")


@pytest.fixture(autouse=True)
def _csrc() -> None:
    assert library.load() == "", library.load()


def _norm(**changes: Any) -> Proof:
    return replace(op_proofs(["rms_norm"], torch.bfloat16, SIZES)[0], **changes)


# --- the error model ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_of_this_installation_agree(dtype: torch.dtype) -> None:
    """Plain torch uses at most half of each bound, by its definition; the kernels were written apart from it."""
    proofs = op_proofs(list(ops.OPS), dtype, replace(SIZES, zero_centered=True))
    proofs += [grouped_proof(dtype, SIZES, 4)]
    for recipe in ("tensorwise", "rowwise"):
        proofs += fp8_proofs(recipe, SIZES) + grouped_fp8_proofs(recipe, SIZES, 3)
    for proof in proofs:
        for name, outcome in prove(proof, CPU).items():
            assert outcome.agrees, f"{proof.title}: {name}: {outcome}"
            assert outcome.seconds > 0 and outcome.error <= outcome.bound < 0.05


def _scaled(y: torch.Tensor) -> torch.Tensor:
    return y * 1.02


def _one_wrong(y: torch.Tensor) -> torch.Tensor:
    return y + torch.zeros_like(y).index_put_((torch.tensor(3), torch.tensor(5)), torch.tensor(0.5, dtype=y.dtype))


def _not_finite(y: torch.Tensor) -> torch.Tensor:
    return y * torch.ones_like(y).index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan, dtype=y.dtype))


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0].roll(1, 0)


def _raises(y: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


FAULTS: list[tuple[Any, str]] = [
    (_scaled, "result 0 is off by"),
    (_one_wrong, "result 0 is off by"),
    (_not_finite, "result 0 is not finite"),
    (_WrongGradient.apply, "result 1 is off by"),
    (lambda y: y.float(), "result 0 is torch.float32"),
    (lambda y: y[:-1], "fails: ValueError: result 0 is [23, 48] and not [24, 48]"),
    (_raises, "fails: RuntimeError: no kernel image is available"),
]


@pytest.mark.parametrize(("fault", "problem"), FAULTS)
def test_a_wrong_kernel_is_named(fault: Any, problem: str) -> None:
    right = _norm().plain
    outcomes = prove(_norm(candidates={"wrong": lambda *x, **named: fault(right(*x, **named)), "right": right}), CPU)
    assert outcomes["right"].agrees
    assert outcomes["wrong"].problem.startswith(problem) and "\n" not in outcomes["wrong"].problem


def test_no_memory_is_no_outcome() -> None:
    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 5 GiB")

    with pytest.raises(UserError, match=r"too little free memory .*; end other programs") as caught:
        prove(_norm(candidates={"csrc": full}), CPU)
    assert caught.value.is_transient


def test_gpu_kernels_on_a_cpu_agree() -> None:
    """The sources of the GPU kernels, forward: the emulated library has no gradients registered."""
    kernels: Any = emulated.load()
    norm = _norm(candidates={"csrc": lambda x, w, zero_centered: kernels.rms_norm(x, w, 1e-6, zero_centered)[0]})
    (gate,) = op_proofs(["swiglu"], torch.bfloat16, SIZES)
    gate = replace(gate, candidates={"csrc": lambda x, row_weight: kernels.swiglu(x, row_weight, None)})
    for proof in (norm, gate):

        def without_gradients(d: Draw, draw: Any = proof.draw) -> Inputs:
            inputs = draw(d)
            return Inputs(tuple(x.detach() for x in inputs.tensors), inputs.constants)

        assert prove(replace(proof, draw=without_gradients), CPU)["csrc"].agrees


def test_a_proof_does_not_change_the_runs_random_numbers() -> None:
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    with torch.inference_mode():  # as when a codec decodes
        prove(_norm(), CPU)
    assert torch.equal(torch.randn(2), expected)


# --- the choice ---


def test_the_first_that_agrees_or_on_a_gpu_the_fastest() -> None:
    outcomes = {"norm": {"csrc": GOOD, "torch": FAST}}
    assert Proven(outcomes).choose("norm", ["csrc", "torch"])[0] == "csrc"
    chosen, why = Proven(outcomes, by_time=True).choose("norm", ["csrc", "torch"])
    assert chosen == "torch"
    assert why == "agrees with plain torch: 75% of the error bound, 1e+03 ms; csrc: 50% of the error bound, 2e+03 ms"
    nearly = {"norm": {"csrc": GOOD, "torch": replace(FAST, seconds=1.9)}}
    assert Proven(nearly, by_time=True).choose("norm", ["csrc", "torch"])[0] == "csrc"


def test_a_resumed_run_keeps_its_choice(tmp_path: Path, caplog: Any) -> None:
    """Times of another comparison change nothing; a kernel that no longer agrees is named and replaced."""
    caplog.set_level(logging.WARNING)
    cpu.install()
    from megamm.mcore import kernel_proofs

    names, run = ["csrc", "torch"], tmp_path / "run"
    first = Proven({"norm": {"csrc": GOOD, "torch": FAST}, "rope": {"csrc": BAD, "torch": BAD}}, by_time=True)
    assert kernel_proofs.as_chosen_before(first, run).choose("norm", names)[0] == "torch"
    assert json.loads((run / kernel_proofs.CHOICES).read_text()) == {"norm": "torch"}
    assert [file.name for file in run.iterdir()] == [kernel_proofs.CHOICES]

    slower = Outcome(0.1, 0.2, 9.0)
    again = Proven({"norm": {"csrc": FAST, "torch": slower}, "rope": {"csrc": FAST, "torch": GOOD}}, by_time=True)
    assert again.choose("norm", names)[0] == "csrc"
    again = kernel_proofs.as_chosen_before(again, run)
    assert (again.choose("norm", names)[0], again.choose("rope", names)[0]) == ("torch", "csrc")
    assert not caplog.records

    wrong = Proven({"norm": {"csrc": GOOD, "torch": BAD}}, by_time=True)
    assert kernel_proofs.as_chosen_before(wrong, run).choose("norm", names)[0] == "csrc"
    assert "norm: no longer torch but csrc" in caplog.text
    (run / kernel_proofs.CHOICES).write_text("{")
    caplog.clear()
    assert kernel_proofs.as_chosen_before(first, run).choose("norm", names)[0] == "torch"
    assert "kernels.json cannot be read, kernels are chosen again" in caplog.text


def test_what_disagrees_is_not_chosen_though_it_is_fastest() -> None:
    proven = Proven({"norm": {"csrc": BAD, "torch": GOOD}}, by_time=True)
    chosen, why = proven.choose("norm", ["csrc", "torch"])
    assert chosen == "torch" and f"csrc: {BAD.problem}" in why
    with pytest.raises(UserError, match=r"norm: no kernel agrees with plain torch: csrc: result 0 .*--again") as caught:
        Proven({"norm": {"csrc": BAD}}).choose("norm", ["csrc"])
    assert "\n" not in str(caught.value)


def test_operators_are_chosen_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    op = ops.OPS["rms_norm"]
    monkeypatch.setitem(ops.OPS, "rms_norm", op._replace(csrc=lambda *x, **named: op.csrc(*x, **named) * 1.02))
    proofs = op_proofs(["rms_norm", "rope"], torch.bfloat16, SIZES)
    proven = summarise(proofs, {proof.title: prove(proof, CPU) for proof in proofs}, by_time=False)
    chosen, reason = ops.choose("auto", CPU.torch_device, proven)
    assert chosen.rms_norm is op.torch and chosen.rope is ops.OPS["rope"].csrc and chosen.name == "csrc"
    assert reason == "built for cpu; but rms_norm by torch"
    with pytest.raises(UserError, match=r"ops: csrc, but its rms_norm disagrees .*; use ops: auto"):
        ops.choose("csrc", CPU.torch_device, proven)
    assert ops.choose("torch", CPU.torch_device, proven)[0] is ops.TORCH


class _Gpu:
    is_gpu, name = True, "a GPU"


def _config(**train: Any) -> Any:
    model: dict[str, Any] = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 4}
    model |= {"num_query_groups": 2, "head_dim": 16, "moe": {"num_experts": 2, "ffn_hidden_size": 32}}
    base = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "precision": "bf16"}
    data = {"seq_length": 64, "sources": [{"path": "unused"}]}
    return config_from_dict(
        {"output": "unused", "device": "cpu", "model": model, "data": data, "tokenizers": {"text": "unused"}}
        | {"optimizer": {"lr": 1e-3}, "train": base | train},
        "test",
    )


def test_attention_takes_the_fastest_kernel_that_agrees() -> None:
    found = Installed(None, None, False, False, "2.8.3", None, None, None)
    gpu: Any = _Gpu()
    assert attention_kernel.candidates(_config(), gpu, found) == ["varlen", "flex", "flash", "sdpa"]
    times = {"varlen": GOOD, "flex": replace(GOOD, seconds=3), "flash": FAST, "sdpa": replace(GOOD, seconds=9)}
    for outcomes, expected in (
        (times, "flash"),
        (times | {"flash": BAD}, "varlen"),
        (times | {"flash": BAD, "varlen": BAD}, "flex"),
        (times | {"flash": BAD, "varlen": BAD, "flex": BAD}, "sdpa"),
    ):
        kernel, why = attention_kernel.choose(_config(), gpu, found, Proven({"attention": outcomes}, by_time=True))
        assert kernel == expected, why
        assert ("flash: result 0 is off" in why) == (expected != "flash")
    proven = Proven({"attention": times | {"varlen": BAD}}, by_time=True)
    with pytest.raises(UserError, match=r"train.attention=varlen disagrees with plain torch on a GPU: .*; set train"):
        attention_kernel.choose(_config(attention="varlen"), gpu, found, proven)


@pytest.mark.parametrize("channels", [16, 64])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_short_windows_agree(size: int, channels: int) -> None:
    """With one token, the gradients of queries and keys would be zero up to rounding."""
    cpu.install()
    from megamm.mcore import kernel_proofs

    config = _config(precision="fp32")
    window = config.model.window.model_copy(update={"size": size})
    heads = {"head_dim": channels, "num_attention_heads": 4, "num_query_groups": 2}
    model = config.model.model_copy(update={"window": window, **heads})
    short = config.model_copy(update={"model": model})
    (proof,) = kernel_proofs.attention_proofs(short, CPU, ["sdpa", "varlen"])
    assert {kernel: outcome.problem for kernel, outcome in prove(proof, CPU).items()} == {"sdpa": "", "varlen": ""}


def test_attention_forms_and_experts_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that ignores the window, or the documents, disagrees; experts then run one after another."""
    cpu.install()
    from megamm.mcore import experts, kernel_proofs
    from megamm.mcore.attention import attend_by
    from megamm.mcore.transformer_config import transformer_config

    config = _config()
    windowed = config.model_copy(
        update={
            "model": config.model.model_copy(
                update={"window": config.model.window.model_copy(update={"size": 16, "full_layers": [0]})}
            )
        }
    )
    full, window = kernel_proofs.attention_proofs(windowed, CPU, ["sdpa", "varlen"])
    assert all(outcome.agrees for proof in (full, window) for outcome in prove(proof, CPU).values())
    with_spans = windowed.model_copy(update={"modalities": {"image": ModalityConfig(attention="span")}})
    spans = kernel_proofs.attention_proofs(with_spans, CPU, ["sdpa"])
    assert all(prove(proof, CPU)["sdpa"].agrees and proof.form.endswith(", spans") for proof in spans)

    def broken(kernel: Any, device: Any, found: Any) -> Any:
        right = attend_by(kernel, device, found)

        def attend(query: Any, key: Any, value: Any, metadata: Any, chunks: Any, form: Any) -> Any:
            if kernel == "sdpa":
                return right(query, key, value, metadata, chunks, replace(form, window=0))
            return right(query, key, value, torch.zeros_like(metadata), chunks, form)

        return attend

    monkeypatch.setattr(kernel_proofs, "attend_by", broken)
    full, window = kernel_proofs.attention_proofs(windowed, CPU, ["sdpa", "varlen"])
    assert [outcome.agrees for proof in (full, window) for outcome in prove(proof, CPU).values()] == [
        *(True, False),
        *(False, False),
    ]
    bad = Proven({"grouped_linear": {"grouped": BAD, "sequential": GOOD}})
    megatron = transformer_config(config, 64, CPU)
    assert experts.choose(config, megatron, CPU, bad)[0] == "grouped"
    with pytest.raises(UserError, match=r"train.experts=grouped: the grouped product disagrees"):
        experts.choose(_config(experts="grouped"), megatron, CPU, bad)


def test_experts_in_fp8_are_grouped_where_their_product_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise they run one after another, in FP8 too: no layer changes its precision without being asked."""
    cpu.install()
    from megamm.mcore import experts, kernel_proofs
    from megamm.mcore.transformer_config import transformer_config

    config, wanted = _config(precision="fp8"), _config(precision="fp8", experts="grouped")
    megatron = transformer_config(config, 64, CPU)
    names = {proof.name for proof in kernel_proofs.run_proofs(config, 64, CPU)}
    assert {"fp8", "grouped_linear", "grouped_fp8"} <= names
    assert experts.choose(config, megatron, CPU)[0] == experts.choose(wanted, megatron, CPU)[0] == "grouped"
    bad = Proven({"grouped_fp8": {"grouped": BAD}})
    form, why = experts.choose(config, megatron, CPU, bad)
    assert form == "sequential" and why.startswith("grouped products in FP8 disagree with plain torch: result 0")
    with pytest.raises(UserError, match=r"train.experts=grouped: the grouped product disagrees"):
        experts.choose(wanted, megatron, CPU, bad)
    # Ada has products in FP8, and no grouped ones.
    monkeypatch.setattr(Device, "compute_capability", property(lambda _: (8, 9)))
    form, why = experts.choose(config, megatron, CPU)
    assert form == "sequential" and why.endswith("need compute capability 9.0 or 10.0, not 8.9")
    assert "grouped_fp8" not in {proof.name for proof in kernel_proofs.run_proofs(config, 64, CPU)}
    with pytest.raises(UserError, match=r"train.experts=grouped with train.precision=fp8: torch's grouped products"):
        experts.choose(wanted, megatron, CPU)


# --- the cache ---


def test_outcomes_are_kept_and_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = prove_here([_norm()], CPU)
    monkeypatch.setattr(proof_cache, "prove", lambda *_: pytest.fail("a known kernel is compared again"))
    assert prove_here([_norm()], CPU) == first
    cache = ProofCache(CPU)
    other = replace(_norm(), candidates={"other": _norm().plain})
    cache.add({other.title: {"other": GOOD}})
    assert prove_here([_norm()], CPU) == first, "candidates are added to those that are known"
    stored = json.loads(cache.file.read_text())
    assert stored["identity"]["device"] == CPU.name and stored["identity"]["torch"] == torch.__version__
    assert [file.name for file in cache.folder.iterdir()] == [cache.file.name], "no temporary file stays"
    assert not caplog.records

    for damage in ("{", "[]", '{"outcomes": {"a": {"b": {"wrong": 1}}}}'):
        cache.file.write_text(damage)
        assert cache.read() == {}
        assert "cannot be read and is replaced" in caplog.records[-1].message
    monkeypatch.setattr(proof_cache.torch, "__version__", "9.9")
    assert ProofCache(CPU).file != cache.file


def test_without_a_folder_kernels_are_compared_at_each_start(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "file").touch()
    cache = ProofCache(CPU, tmp_path / "file" / "folder")
    found = prove_missing([_norm()], {}, cache)
    assert found[_norm().title]["csrc"].agrees
    assert "outcomes are not kept, as" in caplog.records[-1].message


# --- ranks and commands ---


def test_ranks_choose_the_same_kernels(worlds: Worlds, tmp_path: Path) -> None:
    """The second of two nodes has a wrong RMSNorm: neither uses it. At the next start nothing is compared."""
    found: Any = worlds.run(2, agree, KernelJob(tmp_path / "bad", bad_rank=1), timeout=120)
    assert not isinstance(found, WorldFailure), found.lines()
    assert [one["by torch"] for one in found] == [{True}, {True}]
    assert all("rms_norm" in one["proven"] for one in found)
    refused: Any = worlds.run(2, agree, KernelJob(tmp_path / "bad", "csrc", bad_rank=1), timeout=120)
    assert [one["proven"] for one in refused] == [[], []]
    for one in refused:
        assert one["error"].startswith("ops: csrc, but its rms_norm disagrees with plain torch on this device: result")
        assert "(rank 1 on node1, " in one["error"]


def test_doctor_prints_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.install()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = write_config(tmp_path, tmp_path / "run")
    shown = CliRunner().invoke(app, ["doctor", "--kernels", "--config", str(config), "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout.splitlines()[-1])
    kernels = {(row["kernel"], row["candidate"]): row for row in found["kernels"]}
    assert {("rope", "csrc"), ("rope", "torch"), ("attention", "sdpa"), ("adam", "fused")} <= kernels.keys()
    assert all(row["agrees"] and 0 <= row["error"] <= row["bound"] for row in found["kernels"])
    assert kernels["rope", "csrc"]["chosen"] and not kernels["rope", "torch"]["chosen"]

    cache = ProofCache(CPU)
    title = next(title for title in cache.read() if title.startswith("rope, "))
    cache.add({title: {"csrc": BAD}})
    wrong = CliRunner().invoke(app, ["doctor", "--kernels", "--config", str(config)])
    assert wrong.exit_code == 1
    assert f"kernel disagrees with plain torch: rope: csrc {BAD.problem}" in wrong.stderr
    (row,) = [line.split() for line in wrong.stdout.splitlines() if line.split()[:2] == ["rope", "csrc"]]
    assert row[2] == "no"
    again = CliRunner().invoke(app, ["doctor", "--kernels", "--again", "--config", str(config)])
    assert again.exit_code == 0, again.output


@pytest.mark.everything
def test_a_run_ends_with_one_line_if_its_kernel_disagrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, from a cache in which an operator has disagreed; with auto the same run trains without it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_data(tmp_path)
    config = write_config(tmp_path, tmp_path / "run", train={"steps": 1}, optimizer={"warmup_steps": 0})
    assert (done := megamm("train", config)).returncode == 0, done.stderr
    cache = ProofCache(CPU)
    title = next(title for title in cache.read() if title.startswith("rms_norm, "))
    cache.add({title: {"csrc": BAD}})
    refused = megamm("train", config, f"output={tmp_path / 'refused'}", "ops=csrc")
    assert refused.returncode == 2, refused.stderr
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: ops: csrc, but its rms_norm disagrees with plain torch on this device: result 0")
    auto = megamm("train", config, f"output={tmp_path / 'auto'}")
    assert auto.returncode == 0, auto.stderr
    assert "ops: csrc, built for cpu; but rms_norm by torch" in auto.stderr
