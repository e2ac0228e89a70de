"""Quantised exports and GGUF files, read back by transformers and llama.cpp: the values are the intended ones.

The tolerance follows from the quantisation step: no weight is off by more than half a step, and the logits by no more
than twice the effect of noise of that size.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_export import make_export
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from megamm.cli import convert as cli
from megamm.common.errors import UserError
from megamm.convert.extras.quantize import quantize
from megamm.convert.io.export_folder import check_digests
from megamm.convert.verify.weights import verify

TARGETS = ("int8", "int4", "fp8")
LARGEST = {"int8": 127.5, "int4": 7.5, "fp8": 448}
"""In steps: to the middle of the two outermost values; for float8 the largest value."""
GROUP = 32
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 300, (4, 40)))


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("dense"), head_dim=16, ffn_hidden_size=96)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("moe"), moe={"num_experts": 5, "top_k": 2, "ffn_hidden_size": 32})


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits.float()


def read_back(folder: Path) -> torch.Tensor:
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())
    return logits(model)


def with_weights(export: Path, weights: dict[str, torch.Tensor], folder: Path) -> torch.Tensor:
    """Return logits of the export's model with other weights, through a folder, as loading stacks the experts."""
    folder.mkdir()
    (folder / "config.json").write_text((export / "config.json").read_text())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return read_back(folder)


def unpacked(stored: dict[str, torch.Tensor], name: str, to: str) -> tuple[np.ndarray, np.ndarray]:
    """Return q * s of one matrix and s, computed with numpy alone from the file."""
    prefix = name.removesuffix("weight")
    scale = stored[prefix + "weight_scale"].float().numpy()
    if to == "fp8":
        codes = stored[prefix + "weight"].view(torch.uint8).numpy().astype(np.int64)
        exponent, fraction = codes >> 3 & 15, codes & 7
        value = np.where(exponent, (8 + fraction) * 2.0 ** (exponent - 10), fraction * 2.0**-9)
        quantised = np.where(codes >> 7, -value, value)
    else:
        bits = int(to[3:])
        words = stored[prefix + "weight_packed"].numpy().view(np.uint32)
        digits = words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & (2**bits - 1)
        quantised = digits.reshape(len(words), -1).astype(np.int64) - 2 ** (bits - 1)
    wide = np.repeat(scale, quantised.shape[1] // scale.shape[1], 1)
    return (quantised * wide).astype(np.float32), wide


def half_step(weight: np.ndarray, scale: np.ndarray, to: str) -> np.ndarray:
    if to != "fp8":
        return scale / 2
    _, exponent = np.frexp(weight / scale)
    return scale * 2.0 ** (np.maximum(exponent - 1, -6) - 3) / 2


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_transformers_computes_with_the_nearest_values(request, tmp_path, to, kind):
    export = request.getfixturevalue("export" if kind == "dense" else "experts")
    quantize(export, tmp_path / "out", to)
    weights, stored = load_file(export / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    matrices = [n for n in weights if n.removesuffix("weight") + "weight_scale" in stored]
    per_layer = 7 if kind == "dense" else 4 + 3 * 5
    assert len(matrices) == 2 * per_layer and not any("embed" in n or "lm_head" in n for n in matrices)
    rng = np.random.default_rng(1)
    noisy, near = dict(weights), dict(weights)
    for name in matrices:
        exact = weights[name].numpy()
        values, scale = unpacked(stored, name, to)
        half = half_step(exact, scale, to)
        assert (np.abs(values - exact) <= half * (1 + 1e-4)).all(), name
        grouped = np.abs(exact).reshape(len(exact), exact.shape[1] // GROUP if to == "int4" else 1, -1)
        needed = np.repeat(grouped.max(-1), exact.shape[1] // grouped.shape[1], 1) / LARGEST[to]
        np.testing.assert_allclose(scale, needed, rtol=1e-6, err_msg=f"{name}: another step than is needed")
        near[name] = torch.from_numpy(values)
        noisy[name] = torch.from_numpy((exact + rng.uniform(-1, 1, exact.shape) * half).astype(np.float32))
    got = read_back(tmp_path / "out")
    same = with_weights(export, near, tmp_path / "near")
    assert (got - same).abs().max() <= 1e-5 * same.abs().max()
    if kind == "dense":  # noise makes tokens change experts
        original = with_weights(export, weights, tmp_path / "original")
        expected = (with_weights(export, noisy, tmp_path / "noisy") - original).square().mean().sqrt()
        assert 0 < (got - original).square().mean().sqrt() <= 2 * expected


@pytest.mark.parametrize("to", TARGETS)
def test_what_is_written_is_small_and_safe(export, tmp_path, to):
    quantize(export, tmp_path / "out", to)
    check_digests(tmp_path / "out")
    files = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md", ""}
    assert [path.name for path in files if not path.suffix] == ["SHA256SUMS"]
    sizes = []
    for folder in (export, tmp_path / "out"):
        tensors = load_file(folder / "model.safetensors")
        sizes.append(sum(t.nbytes for n, t in tensors.items() if "_proj." in n))
    # float32 to 8 or 4 bits, a scale of 32 bits a row of at least 32, or a group of 32, and 16 bytes of shape
    assert sizes[1] <= sizes[0] * ({"int4": 4}.get(to, 8) + 32 / 32) / 32 + 14 * 16
    kept = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(export / "model.safetensors").items():
        assert "_proj." in name or torch.equal(tensor, kept[name])


@pytest.mark.parametrize("to", TARGETS)
def test_the_tools_read_what_is_quantised(export, tmp_path, to):
    """inspect, diff and verify: float8 and packed words, a value that is not finite, a changed byte."""
    out = tmp_path / "out"
    quantize(export, out, to)
    report = verify(out)
    assert not report.problems and report.lines[0] == "SHA256SUMS matches"
    assert report.lines[1] == "names and shapes: check skipped: config.json declares quantised weights"
    assert report.lines[2].endswith("tensors, all values are finite")
    for arguments, code in ((["inspect", out], 0), (["diff", out, out], 0), (["diff", export, out], 1)):
        done = CliRunner().invoke(cli.app, list(map(str, arguments)))
        assert done.exit_code == code, done.output
    weights = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.up_proj." + ("weight" if to == "fp8" else "weight_scale")
    weights[name].view({1: torch.uint8, 4: torch.float32}[weights[name].element_size()])[3, 0] = (
        0x7F if to == "fp8" else torch.nan
    )
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    report = verify(out, refuse_nan=True)
    assert report.problems == [
        "model.safetensors does not match SHA256SUMS",
        f"1 tensors contain NaN or Inf, the first is {name} (1 values)",
    ]


@pytest.mark.parametrize("to", TARGETS)
def test_half_precision_stays(tmp_path, to):
    """Scales are as coarse as bfloat16."""
    export = make_export(tmp_path, train=2, heldout=1)
    model = AutoModelForCausalLM.from_pretrained(export).to(torch.bfloat16)
    model.save_pretrained(export)
    quantize(export, tmp_path / "out", to)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert kept.dtype == torch.bfloat16 and logits(kept).isfinite().all()


def test_refusals(export, tmp_path, monkeypatch):
    narrow = make_export(tmp_path / "narrow", train=2, heldout=1, ffn_hidden_size=40)
    with pytest.raises(
        UserError, match=r"down_proj.weight has 40 inputs, which is not a multiple of 32.*--to int8 or fp8"
    ):
        quantize(narrow, tmp_path / "out", "int4")
    quantize(narrow, tmp_path / "int8", "int8")
    with pytest.raises(UserError, match="already quantised"):
        quantize(tmp_path / "int8", tmp_path / "out", "fp8")
    with pytest.raises(UserError, match="exists"):
        quantize(narrow, tmp_path / "int8", "fp8")
    weights = load_file(narrow / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, narrow / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight contains NaN or Inf"):
        quantize(narrow, tmp_path / "out", "int8")
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(UserError, match=r"compressed-tensors is missing.*megamm\[quantize\]"):
        quantize(export, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_an_opened_export_may_be_quantised(export, tmp_path):
    """Open it as `megamm eval` and `megamm generate` do."""
    from tiny_export import open_tiny

    quantize(export, tmp_path / "out", "int8")
    opened = open_tiny(tmp_path / "out")
    assert opened.model.config.quantization_config and "image" in opened.modalities
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
    )
