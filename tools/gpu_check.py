"""Check megamm on one GPU in at most ten minutes, without internet: tests, parity, kernels, speed, memory, checkpoints.

    python tools/gpu_check.py                          on a GPU; `make gpu-check` is the same
    python tools/gpu_check.py --device cpu --small     tries the script itself on a CPU, with tiny sizes

Each step is a process of its own with a time limit, so that one that fails, crashes or hangs does not lose the others.
Output: gpu_check_NAME.json and the page gpu_check_NAME.md, by default in benchmarks/results; logs of the steps in
out/gpu_check. Exit code 0: every step has passed or was skipped with a reason; 1: a step has not; 2: no GPU was found.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from megamm import __version__
from megamm.common import gpu_constants
from megamm.common.device import choose, driver_version, gpus
from megamm.common.errors import UserError
from megamm.common.gpu_constants import GpuConstants
from megamm.config import accelerators

ROOT = Path(__file__).parents[1]
MINUTES = 10.0
Status = Literal["passed", "failed", "timed out", "skipped"]


@dataclass(frozen=True)
class Step:
    """A command that is run in the repository's root. seconds: its time limit; it may write {result}.

    why_skipped: why it cannot run here; empty if it can.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    why_skipped: str = ""


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step. reason: the last line that it printed, or why it was skipped; result: its figures."""

    name: str
    status: Status
    seconds: float
    reason: str = ""
    result: Any = field(default=None)


def plan(device: str, small: bool) -> list[Step]:
    """Return the steps in the order of their importance: if time runs out, the last ones are skipped."""
    python, given = sys.executable, ("--device", device, *["--small"] * small)
    tests = ("tests/test_rms_norm.py", "-k", "cpu") if device == "cpu" else ("tests", "-m", "gpu")

    def own(name: str, seconds: float, why_skipped: str = "") -> Step:
        command = (python, "tools/gpu_check_steps.py", name, *given, "--out", "{result}")
        return Step(name, command, seconds, why_skipped)

    build = (python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", ".")
    looks = (python, "-c", "from megamm.ops import library; raise SystemExit(library.load() or 0)")
    no_dali = "" if accelerators.installed().dali else "DALI is not installed"
    only = ["--only", "rms_norm", "swiglu"] * small
    fp8 = "" if device == "cpu" else choose("gpu").why_no_fp8
    name = choose("cpu" if device == "cpu" else "gpu").name
    unknown = "" if simulated_kind(name) else f"the simulated GPU has no constants of {name}"
    return [
        Step("build csrc", build if device == "auto" else looks, 150),
        Step("kernels", (python, "-m", "megamm", "doctor", "--kernels", "--again", "--json"), 150),
        own("parity", 60),
        *(own(f"train-{job}-bf16", 90) for job in ("dense", "experts", "mix")),
        *(own(f"train-{job}-fp8", 60, fp8) for job in ("dense", "experts", "mix")),
        own("checkpoint", 60),
        own("memory", 120, unknown),
        Step("tests", (python, "-m", "pytest", "-q", *tests, "-p", "no:cacheprovider", "--junitxml", "{result}"), 180),
        Step("operators", (python, "benchmarks/ops.py", "--quick", *only, "--json", "{result}"), 120),
        own("video", 60, no_dali),
    ]


def simulated_kind(name: str) -> GpuConstants | None:
    """Return the kind of GPU that the simulation has under this device's name; None if it has none."""
    return next((kind for kind in gpu_constants.all_kinds() if kind.device_name == name), None)


def run_steps(steps: Sequence[Step], logs: Path, deadline: float) -> Iterator[StepOutcome]:
    """Run the steps one after another until `deadline`, of time.monotonic; yield each outcome at once."""
    logs.mkdir(parents=True, exist_ok=True)
    for step in steps:
        left = deadline - time.monotonic()
        if step.why_skipped:
            yield StepOutcome(step.name, "skipped", 0.0, step.why_skipped)
        elif left <= 0:
            yield StepOutcome(step.name, "skipped", 0.0, "no time was left")
        else:
            yield _run(step, logs, min(step.seconds, left))


def _run(step: Step, logs: Path, limit: float) -> StepOutcome:
    name = re.sub("[^a-z0-9]+", "_", step.name)
    result, log = logs / f"{name}.result", logs / f"{name}.log"
    result.unlink(missing_ok=True)
    command = [word.format(result=result) if word == "{result}" else word for word in step.command]
    start = time.monotonic()
    with log.open("w") as output:
        # A session of its own, so that what the step has started can be ended with it.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    seconds = time.monotonic() - start
    last = _last_line(log)
    if code is None:
        return StepOutcome(step.name, "timed out", seconds, f"after {limit:.0f} s; its last line: {last}")
    try:
        figures = _figures(step, result, log)
    except (ValueError, ElementTree.ParseError) as error:
        return StepOutcome(step.name, "failed", seconds, f"its result cannot be read: {error}")
    if code == 0 and figures is None and "{result}" in step.command:
        return StepOutcome(step.name, "failed", seconds, "it has written no result")
    return StepOutcome(step.name, "passed" if code == 0 else "failed", seconds, "" if code == 0 else last, figures)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill the processes of a step that still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing was printed"


def _figures(step: Step, result: Path, log: Path) -> Any:
    """Return what a step has measured: the JSON of its result or of its last line, or the counts of its tests."""
    if result.exists() and step.name == "tests":
        suite = ElementTree.parse(result).getroot()[0].attrib
        counts = {key: int(suite[key]) for key in ("tests", "failures", "errors", "skipped")}
        return {"passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"], **counts}
    if result.exists():
        return json.loads(result.read_text())
    if step.name == "kernels":
        lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
        return json.loads(lines[-1]) if lines else None
    return None


def page(report: dict[str, Any]) -> str:
    """Return the report as markdown."""
    lines = [f"# GPU check: {report['device']}", ""]
    lines += [f"{report['date']}, `{report['command']}`: {report['seconds']:.0f} s.", ""]
    lines += [", ".join(f"{name} {version}" for name, version in report["versions"].items()), ""]
    if report["is_small"]:
        lines += ["**This is a trial of the script with tiny sizes: its speeds mean nothing.**", ""]
    by_name = {step["name"]: step for step in report["steps"]}
    lines += _table(
        ("step", "result", "seconds", "reason"),
        ((s["name"], s["status"], f"{s['seconds']:.1f}", s["reason"]) for s in report["steps"]),
    )
    trained = [(name, s["result"]) for name, s in by_name.items() if name.startswith("train-") and s["result"]]
    lines += ["## Training steps", ""]
    columns = ("parameters", "tokens/s", "MFU", "peak memory (GiB)")
    foreseen = by_name["memory"]["result"] or {} if "memory" in by_name else {}
    lines += _table(
        ("run", *columns, "predicted memory (GiB)"),
        (
            (name.removeprefix("train-"), *(_text(found.get(c)) for c in columns), _text(foreseen.get(name)))
            for name, found in trained
        ),
    )
    lines += ["## Kernels against plain torch", ""]
    kernels = (by_name["kernels"]["result"] or {}).get("kernels", []) if "kernels" in by_name else []
    lines += _table(
        ("kernel", "candidate", "agrees", "error / bound", "ms", "chosen", "form"),
        (
            (
                *(k["kernel"], k["candidate"], "yes" if k["agrees"] else f"no: {k['problem']}"),
                *(f"{k['error']:.1e} / {k['bound']:.1e}", f"{1e3 * k['seconds']:.3g}"),
                *("yes" if k["chosen"] else "", k["form"]),
            )
            for k in kernels
        ),
    )
    lines += ["## Operators against other libraries (ms, forward + backward)", ""]
    cases = (by_name["operators"]["result"] or {}).get("cases", []) if "operators" in by_name else []
    lines += _table(
        ("operator", "shape", "times"),
        ((case["op"], f"{case['shape']} {case['dtype']}", _times(case)) for case in cases),
    )
    for name in ("parity", "checkpoint", "tests", "video"):
        if name in by_name and by_name[name]["result"] is not None:
            lines += [
                f"## {name.capitalize()}",
                "",
                "```json",
                json.dumps(by_name[name]["result"], indent=1),
                "```",
                "",
            ]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[tuple[str, ...]]) -> list[str]:
    body = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    if not body:
        return ["Not measured.", ""]
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *body, ""]


def _times(case: dict[str, Any]) -> str:
    """Return the times of all sides; some measure backward together with forward."""
    sides = {name: forward["ms"] for name, forward in case["forward"].items() if name != "copy"}
    backward = {name: case["backward"][name]["ms"] for name in sides}
    return ", ".join(f"{n} {backward[n] + (0 if case['is_whole'] else ms):.3g}" for n, ms in sides.items())


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu: only to try the script")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all steps")
    parser.add_argument("--name", help="NAME of the output files (default: of the device)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the output files")
    parser.add_argument("--logs", type=Path, default=ROOT / "out" / "gpu_check", help="folder of the steps' logs")
    given = parser.parse_args(arguments)
    try:
        if given.device == "auto" and not gpus():
            remedy = "run it on a machine with one, or try the script with --device cpu --small"
            raise UserError("gpu_check: torch sees no GPU", remedy=remedy)
        if given.device == "cpu" and not given.small:
            raise UserError("gpu_check: --device cpu is for a trial of the script", remedy="add --small")
        steps = plan(given.device, given.small)
        if given.only:
            if wrong := set(given.only) - {step.name for step in steps}:
                names = ", ".join(step.name for step in steps)
                raise UserError(f"gpu_check --only: {min(wrong)} is not a step", remedy=f"use some of: {names}")
            steps = [step for step in steps if step.name in given.only]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    start = time.monotonic()
    outcomes = []
    for outcome in run_steps(steps, given.logs, start + 60 * given.minutes):
        outcomes.append(outcome)
        reason = f": {outcome.reason}" if outcome.reason else ""
        print(f"{outcome.name:20} {outcome.status:9} {outcome.seconds:6.1f} s{reason}", flush=True)
    device = choose("auto" if given.device == "auto" else "cpu").name
    report = {
        "device": device,
        "is_small": given.small,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "tools/gpu_check.py", *arguments]),
        "seconds": time.monotonic() - start,
        "versions": {
            "megamm": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "driver": driver_version() or "none",
            **{name: str(version) for name, version in asdict(accelerators.installed()).items() if version},
        },
        "steps": [asdict(outcome) for outcome in outcomes],
    }
    name = given.name or re.sub("[^a-z0-9]+", "_", device.lower()).strip("_")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"gpu_check_{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (given.out / f"gpu_check_{name}.md").write_text(page(report))
    print(f"written: {given.out / f'gpu_check_{name}'}.json and .md")
    return 0 if all(outcome.status in ("passed", "skipped") for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
