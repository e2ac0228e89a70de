"""Shards, codecs, runs and an export of version 0.1 (tests/data/v0_1) under today's code: same tokens, same losses."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from older_index import lines_of
from PIL import Image
from tiny_run import ROOT, megamm

DATA = Path(__file__).parent / "data" / "v0_1"
FIGURES = json.loads((DATA / "figures.json").read_text())
"""What version 0.1 printed, float32: {run: [{"step", "loss/...", "grad_norm"}]}, "logits", "eval"."""
MODALITIES = ("text", "image", "audio", "video", "points")
SOURCE = "shards/things"
ROUNDING = 1e-6
"""Relative tolerance: on the processor that made the figures they are equal to the last bit, but another processor, or
another layout, adds up in another order."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Return a copy of the data; an export has a copy of its codecs, which the repository holds once."""
    folder = tmp_path / "old"
    shutil.copytree(DATA, folder)
    shutil.copytree(folder / "tokenizers", folder / "export" / "codecs")
    return folder


def _run(folder: Path, *arguments: object) -> str:
    done = megamm(*arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def _train(folder: Path, run: str, *overrides: str, ranks: int = 1) -> list[dict[str, Any]]:
    """Train or resume the run; return its metrics."""
    _run(folder, "train", "run.yaml", f"output={run}", *overrides, "--nproc", ranks)
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


def _assert_equal(lines: list[dict[str, Any]], name: str) -> None:
    """Compare losses and gradient norms of all steps; a loss is None where a step has no token of the modality."""
    wanted = FIGURES[name]
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    assert set(wanted[0]) == {"step", "grad_norm", *(f"loss/{modality}" for modality in MODALITIES)}
    for line, earlier in zip(lines, wanted, strict=True):
        there = {key: value for key, value in earlier.items() if value is not None}
        assert len(there) > 4 and {key for key in earlier if line[key] is None} == earlier.keys() - there.keys()
        assert {key: line[key] for key in there} == pytest.approx(there, rel=ROUNDING, abs=0)


TENSOR = ("parallel.tensor=2", "parallel.sequence=true")
ZERO = ("engine=deepspeed", "deepspeed.zero=2")
ENGINES = [
    pytest.param((), 1, id="native"),
    pytest.param(ZERO, 2, id="deepspeed", marks=pytest.mark.everything),
]


@pytest.mark.parametrize(("overrides", "ranks"), ENGINES)
def test_shards_with_token_caches_give_the_same_rows(old: Path, overrides: tuple[str, ...], ranks: int) -> None:
    """A new run has the losses of version 0.1, with its tokens as they are."""
    caches = sorted(p.name for p in (old / SOURCE / "train").iterdir() if ".tokens-" in p.name)
    assert len(caches) == len(MODALITIES)
    _assert_equal(_train(old, "runs/fresh", "train.stop_after=2", *overrides, ranks=ranks), "one_rank")
    assert sorted(p.name for p in (old / SOURCE / "train").iterdir() if ".tokens-" in p.name) == caches


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        pytest.param(TENSOR, 2, id="tensor=2, as saved"),
        pytest.param((), 1, id="one rank"),
        pytest.param(("parallel.pipeline=2",), 2, id="pipeline=2", marks=pytest.mark.everything),
        pytest.param((), 2, id="data parallel", marks=pytest.mark.everything),
        pytest.param(ZERO, 2, id="deepspeed", marks=pytest.mark.everything),
    ],
)
def test_a_native_run_resumes(old: Path, overrides: tuple[str, ...], ranks: int) -> None:
    """Steps 3 to 6, after a checkpoint with the optimizer's state, are those of the run that was not stopped."""
    _assert_equal(_train(old, "runs/native", *overrides, ranks=ranks), "native")


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        pytest.param(ZERO, 2, id="zero=2, as saved", marks=pytest.mark.everything),
        pytest.param(("engine=deepspeed", "deepspeed.zero=3"), 2, id="zero=3", marks=pytest.mark.everything),
        pytest.param((), 1, id="native", marks=pytest.mark.everything),
    ],
)
def test_a_deepspeed_run_resumes(old: Path, overrides: tuple[str, ...], ranks: int) -> None:
    _assert_equal(_train(old, "runs/deepspeed", *overrides, ranks=ranks), "deepspeed")


@pytest.mark.parametrize(("overrides", "ranks"), ENGINES)
def test_an_export_is_imported(old: Path, overrides: tuple[str, ...], ranks: int) -> None:
    """A run from the imported weights has the same losses."""
    _run(old, "convert", "import", "export", "runs/imported", "--nproc", 1)
    _assert_equal(_train(old, "runs/imported", "train.stop_after=2", *overrides, ranks=ranks), "imported")


@pytest.mark.everything
def test_a_checkpoint_is_exported(old: Path) -> None:
    """Today's export of the checkpoint has the same weights, and the same logits in transformers."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    _run(old, "convert", "export", "runs/native", "again", "--nproc", 1)
    earlier, now = (load_file(old / folder / "model.safetensors") for folder in ("export", "again"))
    assert earlier.keys() == now.keys() and all(torch.equal(earlier[name], now[name]) for name in earlier)
    model = AutoModelForCausalLM.from_pretrained(old / "export", dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([list(range(0, 36, 3))])).logits[0, -1]
    torch.testing.assert_close(logits, torch.tensor(FIGURES["logits"]), rtol=1e-4, atol=1e-6)


def test_codecs_make_the_same_tokens(old: Path) -> None:
    caches = {p.relative_to(old) for p in old.glob(f"{SOURCE}/*/*.tokens-*/*.tar")}
    assert {path.parent.name.partition(".")[0] for path in caches} == set(MODALITIES)
    for folder in {path.parent for path in caches}:
        shutil.rmtree(old / folder)
    codecs = [word for p in sorted((old / "tokenizers").iterdir()) for word in ("--codec", f"{p.name}={p}")]
    _run(old, "data", "tokenize", SOURCE, *codecs, "--device", "cpu")
    assert {p.relative_to(old) for p in old.glob(f"{SOURCE}/*/*.tokens-*/*.tar")} == caches
    for path in caches:
        assert (old / path).read_bytes() == (DATA / path).read_bytes(), path
    for folder in {path.parent for path in caches}:  # the index has another form, but the same content
        entries = [json.loads(line) for file in sorted((DATA / folder).glob("*.jsonl")) for line in file.open()]
        assert [entry for tar in lines_of(old / folder) for entry in tar] == entries and entries[0]["tokens"] >= 1


@pytest.mark.everything
def test_an_export_generates_the_same_media(old: Path) -> None:
    """The likeliest tokens after a prompt, decoded by the codecs."""
    for file in ("image.png", "audio.flac", "points.npz"):
        options = ("--prompt", "a red box", "--to", file.partition(".")[0], "--temperature", 0, "--device", "cpu")
        _run(old, "generate", "export", *options, "--out", file)
        earlier, now = _values(old / "generated" / file), _values(old / file)
        assert earlier.shape == now.shape and earlier.std() > 0
        step = {"png": 1.0, "flac": 1.0 / (1 << 15), "npz": 1e-5}[file.rpartition(".")[2]]
        assert np.abs(earlier - now).max() <= step, f"{file}: more than a rounding step"


def _values(file: Path) -> np.ndarray:
    import soundfile

    if file.suffix == ".png":
        return np.asarray(Image.open(file), dtype=np.float64)
    if file.suffix == ".flac":
        return soundfile.read(file, dtype="float64")[0]
    return np.load(file, allow_pickle=False)["points"].astype(np.float64)


@pytest.mark.everything
def test_an_export_has_the_same_heldout_losses(old: Path) -> None:
    _run(old, "eval", "export", SOURCE, "--json", "eval.json", "--device", "cpu")
    now, earlier = json.loads((old / "eval.json").read_text()), FIGURES["eval"]
    assert now["tokens"] == earlier["tokens"] and set(now["tokens"]) == set(MODALITIES)
    assert now["loss"] == pytest.approx(earlier["loss"], rel=ROUNDING)


FREE = ("tokenizers.", "loss_weights.")
"""Mappings whose keys are names that the user chooses."""


def _keys(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield every key, also of sections and lists of sections, as docs/config.md names it."""
    for key, value in section.items():
        yield prefix + key
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from _keys(inner, f"{prefix}{key}.")


def _documented_keys() -> set[str]:
    found, prefix = set(), ""
    for line in (ROOT / "docs" / "config.md").read_text().splitlines():
        if line.startswith("## "):
            prefix = "" if line == "## Top level" else line.removeprefix("## ") + "."
        elif line.startswith("| `"):
            found.add(prefix + line.split("`")[1])
    return found


def test_every_key_of_a_config_is_read(old: Path) -> None:
    """A checkpoint records its config with every key of its version. For a renamed one, a line names both keys."""
    state = json.loads((old / "runs/native/checkpoints/step_00000002/state.json").read_text())
    assert state["versions"]["megamm"] == "0.1.0" and state["config"]["start_from"] is None
    start = {"checkpoint": "runs/native", "vocabulary": {}, "rules": [], "model_changes": []}
    config = state["config"] | {"start_from": start}
    earlier = {key for key in _keys(config) if not key.startswith(FREE)}
    assert len(earlier) == 148
    (old / "every_key.yaml").write_text(yaml.safe_dump(config))
    printed = _run(old, "train", "every_key.yaml", "output=runs/started", "--dry-run", "--world-size", 2)
    now = _documented_keys()
    assert len(now) > 140
    for key in earlier - now:
        lines = [line for line in printed.splitlines() if key in line]
        assert any(new in line for line in lines for new in now - earlier), f"no line names the new key of {key}"
