"""tools/gpu_check.py without a GPU: its plan, the isolation of its steps, the files that it writes."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from demo_tools import load_tool

gpu_check = load_tool("gpu_check")


def _step(name: str, code: str, seconds: float = 60.0, **fields: Any) -> Any:
    return gpu_check.Step(name, (sys.executable, "-S", "-c", code, "{result}"), seconds, **fields)


def _run(tmp_path: Path, *steps: Any, left: float = 600.0) -> dict[str, Any]:
    return {o.name: o for o in gpu_check.run_steps(steps, tmp_path / "logs", time.monotonic() + left)}


WRITES = "import sys; print('measured'); open(sys.argv[1], 'w').write('{\"speed\": 3}')"


def test_no_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "gpus", list)
    for arguments, message in (
        ([], "error: gpu_check: torch sees no GPU; run it on a machine with one, or try the script with --device cpu"),
        (["--device", "cpu"], "error: gpu_check: --device cpu is for a trial of the script; add --small"),
        (["--device", "cpu", "--small", "--only", "x"], "error: gpu_check --only: x is not a step; use some of: build"),
    ):
        assert gpu_check.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(message) and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_plan_has_every_step_with_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = gpu_check.plan("cpu", True)
    names = [step.name for step in steps]
    trained = [f"train-{job}-{precision}" for precision in ("bf16", "fp8") for job in ("dense", "experts", "mix")]
    assert names == ["build csrc", "kernels", "parity", *trained, "checkpoint", "memory", "tests", "operators", "video"]
    assert all(0 < step.seconds <= 180 for step in steps)
    assert all("--small" in step.command for step in steps if "tools/gpu_check_steps.py" in step.command)
    found = gpu_check.accelerators.installed()
    for dali, reason in ((None, "DALI is not installed"), ("1.50", "")):
        monkeypatch.setattr(gpu_check.accelerators, "installed", lambda d=dali: dataclasses.replace(found, dali=d))
        assert gpu_check.plan("cpu", True)[-1].why_skipped == reason
    assert next(step for step in steps if step.name == "memory").why_skipped.startswith("the simulated GPU has no")
    assert gpu_check.simulated_kind("NVIDIA H100 80GB HBM3").name == "h100-80"
    # Each step's program exists; the page names every step.
    page = (gpu_check.ROOT / "docs" / "gpu-check.md").read_text()
    for step in steps:
        files = [word for word in step.command if word.endswith(".py")]
        assert all((gpu_check.ROOT / file).is_file() for file in files)
        name, _, precision = step.name.rpartition("-")
        assert f"`{step.name}`" in page or (f"`{name}-bf16`" in page and precision == "fp8")


def test_a_step_that_fails_loses_no_other(tmp_path: Path) -> None:
    """Steps that raise, crash, write nothing or something broken, and those that cannot run."""
    found = _run(
        tmp_path,
        _step("first", WRITES),
        _step("raises", "raise ValueError('the driver is too old')"),
        _step("crashes", "import os; os.abort()"),
        _step("silent", "pass"),
        _step("broken", "import sys; open(sys.argv[1], 'w').write('{')"),
        _step("absent", "raise SystemExit(1)", why_skipped="DALI is not installed"),
        _step("last", WRITES),
    )
    texts = {name: (one.status, one.reason) for name, one in found.items()}
    assert texts["first"] == texts["last"] == ("passed", "")
    assert found["last"].result == {"speed": 3}
    assert texts["raises"] == ("failed", "ValueError: the driver is too old")
    assert texts["crashes"][0] == "failed"
    assert texts["silent"] == ("failed", "it has written no result")
    assert texts["broken"][0] == "failed" and texts["broken"][1].startswith("its result cannot be read: ")
    assert texts["absent"] == ("skipped", "DALI is not installed")
    assert "the driver is too old" in (tmp_path / "logs" / "raises.log").read_text()


def test_a_step_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    """The step and a process of it hold a pipe open: it closes when both have ended."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    hangs = f"import os, signal; os.open({str(pipe)!r}, os.O_WRONLY); os.fork(); signal.pause()"
    found = _run(tmp_path, _step("hangs", hangs, seconds=0.5), _step("last", WRITES))
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b""
    os.close(reader)
    assert found["hangs"].status == "timed out" and found["hangs"].reason.startswith("after 0 s; its last line: ")
    assert found["last"].status == "passed"


def test_steps_without_time_are_skipped(tmp_path: Path) -> None:
    found = _run(tmp_path, _step("late", WRITES), left=0.0)
    assert (found["late"].status, found["late"].reason) == ("skipped", "no time was left")


KERNEL = {"kernel": "rope", "candidate": "csrc", "form": "bfloat16", "agrees": False, "error": 0.5, "bound": 0.01}
KERNEL |= {"seconds": 1e-3, "chosen": False, "problem": "result 0 is off by 5.0e-01, and 1.0e-02 is the bound"}
CASE = {"op": "rope", "shape": "8 x 8", "dtype": "bfloat16", "is_whole": False}
CASE |= {"forward": {"copy": {"ms": 9}, "csrc": {"ms": 1}, "torch": {"ms": 2}}}
CASE |= {"backward": {"csrc": {"ms": 0.5}, "torch": {"ms": 2}}}
TRAINED = {"parameters": 1.2e9, "tokens/s": 54321.0, "MFU": 0.41, "peak memory (GiB)": 30.2}
JUNIT = '<testsuites><testsuite tests="9" failures="1" errors="0" skipped="2"/></testsuites>'


def test_report_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """From steps that write what real ones do; one of them fails, so that the exit code is 1."""

    def writes(name: str, text: str, code: int = 0) -> Any:
        return _step(name, f"import sys; open(sys.argv[1], 'w').write({text!r}); raise SystemExit({code})")

    steps = [
        _step("kernels", f"print({json.dumps({'kernels': [KERNEL]})!r}); raise SystemExit(1)"),
        writes("train-dense-bf16", json.dumps(TRAINED)),
        writes("memory", json.dumps({"train-dense-bf16": 31.5})),
        writes("tests", JUNIT, 1),
        writes("operators", json.dumps({"cases": [CASE]})),
        _step("video", "", why_skipped="DALI is not installed"),
    ]
    monkeypatch.setattr(gpu_check, "plan", lambda *_: steps)
    options = ["--device", "cpu", "--small", "--name", "trial", "--out", str(tmp_path), "--logs", str(tmp_path / "l")]
    assert gpu_check.main(options) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["failed", "passed", "passed", "failed", "passed", "skipped"]
    report = json.loads((tmp_path / "gpu_check_trial.json").read_text())
    assert [step["status"] for step in report["steps"]] == [line.split()[1] for line in lines[:-1]]
    assert report["versions"]["torch"] and report["is_small"]
    results = {step["name"]: step["result"] for step in report["steps"]}
    assert results["tests"] == {"passed": 6, "tests": 9, "failures": 1, "errors": 0, "skipped": 2}
    page = (tmp_path / "gpu_check_trial.md").read_text()
    for row in (
        "| video | skipped | 0.0 | DALI is not installed |",
        "| dense-bf16 | 1,200,000,000 | 54,321 | 0.41 | 30.2 | 31.5 |",
        f"| rope | csrc | no: {KERNEL['problem']} | 5.0e-01 / 1.0e-02 | 1 |  | bfloat16 |",
        "| rope | 8 x 8 bfloat16 | csrc 1.5, torch 4 |",
        "its speeds mean nothing",
    ):
        assert row in page, page


@pytest.mark.everything
def test_all_steps_on_a_cpu(tmp_path: Path) -> None:
    """The real steps with tiny sizes; the limits are those of a GPU times eight, for a busy machine."""
    steps = [dataclasses.replace(step, seconds=8 * step.seconds) for step in gpu_check.plan("cpu", True)]
    found = _run(tmp_path, *steps, left=8 * 600)
    problems = {o.name: o.reason for o in found.values() if o.status not in ("passed", "skipped")}
    assert not problems
    assert found["parity"].result["experts"]["error"] < 1e-5
    assert found["tests"].result["passed"] > 5 and not found["tests"].result["failures"]
    for name in ("train-dense-bf16", "train-experts-fp8", "train-mix-fp8"):
        assert found[name].result["tokens/s"] > 0 and found[name].result["MFU"] is None
    assert found["checkpoint"].result["bytes"] > 1e6
    assert {row["kernel"] for row in found["kernels"].result["kernels"]} >= {"rope", "attention", "fp8", "adam"}
    assert {case["op"] for case in found["operators"].result["cases"]} == {"rms_norm", "swiglu"}
