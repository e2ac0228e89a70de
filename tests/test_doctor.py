"""`megamm doctor` and the choice of optional packages: installed packages, the ones used, and problems."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import warm
from tiny_run import ROOT, environment, make_data, megamm, write_config
from typer.testing import CliRunner

from megamm.cli import app
from megamm.common.device import WEIGHT_GRADIENT_EXTENSION, choose, gpus
from megamm.common.errors import UserError
from megamm.config import RunConfig, accelerators, load_config
from megamm.config.accelerators import describe, installed, weight_gradients
from megamm.doctor import installation
from megamm.model import layout
from megamm.ops import library

NOTHING = accelerators.Installed(None, None, False, False, None, None, None, None)
APEX = replace(NOTHING, apex="0.1", apex_kernels=True, apex_weight_gradients=True)
BOTH = replace(APEX, transformer_engine="2.9")
FUSION = "gradient_accumulation_fusion"


def _rows(report: str) -> dict[str, str]:
    """Return subject -> finding of a report as it is printed into a file."""
    width = report.index(importlib.metadata.version("megamm"), report.index("\nmegamm")) - report.index("\nmegamm") - 1
    return {line[:width].strip(): line[width:] for line in report.splitlines()}


def test_report_of_this_environment():
    """Versions match the packages' metadata; missing packages are reported as not installed."""
    shown = CliRunner().invoke(app, ["doctor"])
    rows = _rows(shown.output)
    assert shown.exit_code == (1 if installation.examine().faults else 0), shown.output
    assert not list(installation._package_faults())
    for package in ("torch", "megatron-core", "megamm"):
        # torch reports more than the metadata of a GPU build: 2.13.0+cu130.
        assert rows[package].split(",")[0].split("+")[0] == importlib.metadata.version(package).split("+")[0]
    assert rows["DeepSpeed"].split(",")[0] == importlib.metadata.version("deepspeed") == installed().deepspeed
    modules = {"Transformer Engine": "transformer_engine", "flash-attn": "flash_attn", "apex": "apex", "DALI": "nvidia"}
    absent = [name for name, module in modules.items() if importlib.util.find_spec(module) is None]
    assert {name for name in modules if rows[name].startswith("not installed")} >= set(absent)


def test_looking_imports_nothing():
    probe = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from megamm.config import accelerators; "
    probe += "assert accelerators.installed().deepspeed; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"deepspeed", "megatron", "transformer_engine", "apex", "flash_attn"} & set(done.stdout.split())


def test_missing_and_unsupported_packages_are_wrong(tmp_path):
    """The environment lacks psutil and deepspeed and has an old Megatron-core."""
    packages = Path(importlib.util.find_spec("torch").origin).parents[1]
    megatron = next(packages.glob("megatron_core-*.dist-info"))
    for entry in packages.iterdir():
        if not entry.name.startswith(("psutil", "deepspeed", megatron.name)):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / megatron.name).mkdir()
    metadata = (megatron / "METADATA").read_text()
    version = importlib.metadata.version("megatron-core")
    (tmp_path / megatron.name / "METADATA").write_text(
        metadata.replace(f"\nVersion: {version}\n", "\nVersion: 0.12.1\n")
    )
    done = subprocess.run(
        [sys.executable, "-S", "-m", "megamm", "doctor"],
        env=environment() | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    wrong = [line for line in done.stdout.splitlines() if line.startswith("problem ")]
    assert len(wrong) == 2, done.stdout
    assert "megatron-core 0.12.1 is not supported" in wrong[0] and "pip install" in wrong[0]
    assert "psutil is not installed: " in wrong[1] and "hangs" in wrong[1] and "pip install" in wrong[1]
    assert _rows(done.stdout)["DeepSpeed"] == "not installed, needed only by engine=deepspeed"


def test_ops_that_do_not_load_are_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "FILE", tmp_path / "broken.so")
    library.FILE.write_bytes(b"not a library")
    library.load.cache_clear()
    try:
        report = installation.examine()
    finally:
        library.load.cache_clear()
    assert any("broken.so cannot be loaded" in f.what and "rebuild" in f.remedy for f in report.faults)
    assert report.findings["fused ops"].startswith("cpu: torch (broken.so cannot be loaded")


@pytest.mark.parametrize(
    ("found", "is_gpu", "engine", "te", "apex"),
    [
        (NOTHING, True, "native", "not installed; ", "not installed; Adam is torch's fused AdamW, weight"),
        (APEX, True, "native", "Adam is apex's", "clipping and accumulating weight gradients; Adam is apex's"),
        (
            BOTH,
            True,
            "native",
            "2.9, used for Adam, gradient norm",
            "0.1, used for accumulating weight gradients; Adam is Tr",
        ),
        (BOTH, True, "deepspeed", "2.9, used for the routers", "0.1, not used; Adam is torch's fused AdamW, weight"),
        (BOTH, False, "native", "2.9, not used on a CPU; ", "0.1, not used on a CPU; Adam is torch's fused AdamW"),
    ],
)
def test_what_is_used_and_what_instead(found, is_gpu, engine, te, apex):
    gradients = weight_gradients(found, is_gpu=is_gpu, engine=engine)
    lines = describe(found, is_gpu=is_gpu, engine=engine, gradients=gradients)
    assert te in lines["Transformer Engine"] and apex in lines["apex"]
    instead = {"torch": "by torch's products", "separate": "in a separate pass"}.get(gradients)
    assert ("weight gradients are accumulated" in lines["apex"]) == (instead is not None)
    assert instead is None or f"weight gradients are accumulated {instead}" in lines["apex"]


def test_flash_attn_is_used_only_on_request():
    found = replace(NOTHING, flash_attention="2.8.3", flash_attention_3="3.0.0")
    lines = describe(found, is_gpu=True, engine="native", gradients="separate")
    assert lines["flash-attn"] == "3.0.0 and 2.8.3, needed only by train.attention=flash"


def test_stored_moments_replace_the_adam_of_packages():
    lines = describe(BOTH, is_gpu=True, engine="native", gradients="apex", stores_moments=True)
    assert lines["Transformer Engine"].startswith("2.9, used for gradient norm and clipping and")
    assert "0.1, used for accumulating weight gradients; Adam is torch's" in lines["apex"]


@pytest.mark.parametrize(
    ("dali", "is_gpu", "expected"),
    [
        (None, True, "not installed; `megamm data tokenize` decodes videos with PyAV; "),
        ("2.4.0", True, "2.4.0, used by `megamm data tokenize`"),
        ("2.4.0", False, "2.4.0, not used on a CPU"),
    ],
)
def test_what_decodes_videos(dali, is_gpu, expected):
    lines = describe(replace(NOTHING, dali=dali), is_gpu=is_gpu, engine="native", gradients="separate")
    assert lines["DALI"].startswith(expected)


def test_apex_of_another_project_is_not_apex(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("apex").origin.startswith(str(tmp_path))
    assert installed().apex is None


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    make_data(folder)
    return folder


def test_broken_gpu_packages_leave_a_cpu_run_alone(data):
    """Transformer Engine without its libraries raises at import; on a CPU Megatron-core must not import it."""
    broken = data / "broken"
    for name in ("transformer_engine", "apex", "apex/optimizers", "amp_C", "flash_attn", WEIGHT_GRADIENT_EXTENSION):
        (broken / name).mkdir(parents=True)
        (broken / name / "__init__.py").write_text("raise RuntimeError('its libraries are missing')\n")
    config = write_config(data, data / "run", train={"steps": 1}, optimizer={"warmup_steps": 0})
    command = [sys.executable, "-m", "megamm", "train", str(config)]
    env = environment() | {"PYTHONPATH": f"{ROOT}:{broken}"}
    done = warm.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Transformer Engine: of unknown version, not used on a CPU; " in done.stderr
    assert "apex: of unknown version, not used on a CPU; Adam is torch's fused AdamW" in done.stderr
    first = [line for line in done.stderr.splitlines() if line.startswith("INFO ")][:6]
    assert [line.split(":")[0].split()[-1] for line in first] == [
        "megamm.common.device",
        *["megamm.config.accelerators"] * 5,
    ]
    assert json.loads((data / "run" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1


def _config(folder: Path, *overrides: str) -> RunConfig:
    return load_config(write_config(folder, folder / "unused"), list(overrides))


def test_deepspeed_refuses_weight_gradient_fusion(tmp_path):
    config = _config(tmp_path, "engine=deepspeed", f"model.megatron.{FUSION}=true")
    with pytest.raises(UserError, match=f"model.megatron.{FUSION} .*engine=deepspeed.*; remove it"):
        layout.check(config, 1)
    layout.check(_config(tmp_path, "engine=deepspeed", f"model.megatron.{FUSION}=false"), 1)
    refused = megamm("train", tmp_path / "unused.yaml", "engine=deepspeed", f"model.megatron.{FUSION}=true")
    assert refused.returncode == 2 and refused.stderr.startswith(f"error: model.megatron.{FUSION} ")
    assert len(refused.stderr.splitlines()) == 1


def test_weight_gradient_fusion_is_off_on_a_cpu_by_default(tmp_path):
    from megamm.mcore import cpu

    cpu.install()
    from megamm.mcore.transformer_config import transformer_config

    place = choose("cpu")
    assert not transformer_config(_config(tmp_path), 300, place).gradient_accumulation_fusion
    wanted = _config(tmp_path, f"model.megatron.{FUSION}=true")
    assert transformer_config(wanted, 300, place).gradient_accumulation_fusion


@pytest.mark.gpu
@pytest.mark.skipif(not gpus(), reason="needs a GPU")
@pytest.mark.parametrize("setting", [[], [f"model.megatron.{FUSION}=false"]])
def test_weight_gradient_fusion_on_a_gpu(tmp_path, setting):
    """It is on, by apex or by torch, unless the user disables it."""
    from megamm.mcore import cpu

    cpu.install()
    from megamm.mcore.transformer_config import transformer_config

    built = transformer_config(_config(tmp_path, *setting), 300, choose("gpu"))
    assert built.gradient_accumulation_fusion == (not setting)
