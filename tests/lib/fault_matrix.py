"""Runs every fault in every phase of a run and checks the outcome; `make faults` writes docs/faults.md with this.

    python tests/lib/fault_matrix.py --out out/faults --table docs/faults.md [--kinds sigkill,sigstop]

One run per kind of fault, on two gloo ranks, has it in one phase after the other. Its outcome counts only if the run
ends automatically with exit code 0, reports the numbers of the baseline run to the last digit (losses, grad norms,
learning rates, held-out losses), ends in the same bytes of the last checkpoint's tensors and generators, and has read
the same rows in every step that it kept. Seconds are those of the run's own events.
"""

import argparse
import itertools
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import warm
from fault_cases import KINDS, NODES, PLACES, Faults, fault_of, plan
from faults import environment as with_faults
from tiny_run import environment, make_data, numbers, write_config

from megamm.common import events

RANKS, STEPS, BATCH, TIMEOUT = 2, 10, 4, 600
TRAIN = {"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": 1, "log_every": 1, "eval_every": 4}
CHECKPOINT = {"every": 2, "keep": 9}
RESILIENCE = {"backoff_seconds": 0, "same_step_limit": 9, "hang_seconds": 3, "startup_seconds": 30}
ON_SMALL_DISK = """
run=$1 && shift && mount -t tmpfs -o size=32m tmpfs "$run/checkpoints" || exit 9
"$@"
code=$?
cp -r "$run/checkpoints" "$run/kept" && umount "$run/checkpoints" && rmdir "$run/checkpoints" || exit 9
mv "$run/kept" "$run/checkpoints" && exit $code
"""
"""A shell script: run a command with its output's checkpoints on a private file system."""


@dataclass(frozen=True)
class Cell:
    """One fault in one phase: seconds until it was detected and from then to the next step; cause None: no restart."""

    phase: str
    was_injected: bool
    cause: str | None
    detection: float | None
    recovery: float | None


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run; `wrong` lists why it does not count, empty if it does."""

    cells: list[Cell]
    wrong: list[str]


def prepare(folder: Path, name: str, faults: str) -> tuple[list[str], dict[str, str]]:
    """Return command, without the processes, and environment of a run with output folder/name."""
    sections = {"train": TRAIN, "checkpoint": CHECKPOINT, "resilience": RESILIENCE}
    config = write_config(folder, folder / name, **sections)
    records = folder / f"{name}.records"
    records.mkdir()
    return [sys.executable, "-m", "megamm", "train", str(config)], with_faults(faults, environment(), records)


def local_tier(folder: Path, name: str) -> Path:
    """Return local storage of the runs that have one."""
    return folder / f"{name}.local"


def run(
    folder: Path, name: str, faults: str, workers: int = 0, small_disk: bool = False, has_local: bool = False
) -> int:
    """Train to the end under these faults; return the exit code. The console's text is in folder/name.log."""
    command, env = prepare(folder, name, faults)
    if small_disk:
        (folder / name / "checkpoints").mkdir(parents=True)
        unshare = ["unshare", "--user", "--map-root-user", "--mount"]
        command = [*unshare, "sh", "-c", ON_SMALL_DISK, "sh", str(folder / name), *command]
    with (folder / f"{name}.log").open("w") as log:
        options = ["--nproc", str(RANKS), f"data.workers={workers}"]
        options += [f"checkpoint.local={local_tier(folder, name)}"] if has_local else []
        process = warm.start([*command, *options], env=env, stdout=log, stderr=log)
        try:
            return process.wait(timeout=TIMEOUT)
        finally:
            process.kill()


def rows(records: Path) -> dict[int, list[str]]:
    """Return digests of all ranks' rows of every step (by where its rows end) in the last attempt that read it."""
    lines = [json.loads(text) for path in records.glob("rows_*.jsonl") for text in path.read_text().splitlines()]
    last: dict[int, list[int]] = {}
    for line in lines:
        last[line["end"]] = max(last.get(line["end"], []), line["attempt"])
    return {
        end: sorted(row for line in lines if (line["end"], line["attempt"]) == (end, attempt) for row in line["rows"])
        for end, attempt in sorted(last.items())
    }


def last_bytes(output: Path) -> dict[str, str]:
    """Return digests of the last checkpoint's tensors and generators."""
    files = json.loads((output / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").read_text())["files"]
    return {name: entry["xxh3_128"] for name, entry in files.items() if name.endswith((".distcp", ".safetensors"))}


def differences(folder: Path, name: str, code: int) -> list[str]:
    """Return how the run differs from the baseline run."""
    ours, theirs = folder / name, folder / "baseline"
    if code:
        return [f"exit code {code}"]
    read = rows(folder / f"{name}.records")
    checks = {
        "other numbers": numbers(ours) == numbers(theirs),
        "other rows": read == rows(folder / "baseline.records"),
        "not every row": [len(digests) for digests in read.values()] == [BATCH] * STEPS,
        "another last checkpoint": last_bytes(ours) == last_bytes(theirs),
    }
    return [what for what, is_right in checks.items() if not is_right]


def cells(output: Path, faults: Faults) -> list[Cell]:
    """Return the effect of each injection, from the run's events up to the next one."""
    story = [event for event in events.read(output) if event.get("fault") != "pause"]
    starts = [i for i, event in enumerate(story) if event["kind"] == "injected"] + [len(story)]
    parts = [story[i:j] for i, j in itertools.pairwise(starts)]
    found = []
    for kind, phase in faults:
        if phase == "restart":
            del parts[:1]  # the kill that causes the restart
        if not parts or parts[0][0]["fault"] != fault_of(kind):
            found.append(Cell(phase, False, None, None, None))
            continue
        part = parts.pop(0)
        failed = next((event for event in part if event["kind"] == "failed"), None)
        if failed is None:
            found.append(Cell(phase, True, None, None, None))
            continue
        # The first step follows a fault at start-up: measure to its start, which may be logged after the next fault.
        end = "started" if phase == "start-up" else "first_step"
        of_next = itertools.takewhile(lambda event: event["kind"] != "failed", parts[0] if parts else [])
        since = [*part[part.index(failed) :], *of_next]
        again = next((event["time"] - failed["time"] for event in since if event["kind"] == end), None)
        found.append(Cell(phase, True, failed["cause"], failed["time"] - part[0]["time"], again))
    return found


def suffer(folder: Path, name: str, faults: Faults) -> Outcome:
    """Run under that name with these faults, and check it."""
    kinds = [KINDS[kind] for kind, _ in faults]
    workers, has_local = max(k.data_workers for k in kinds), any(k.local_tier for k in kinds)
    code = run(folder, name, plan(faults), workers, any(k.small_disk for k in kinds), has_local)
    wrong, found = differences(folder, name, code), cells(folder / name, faults)
    if has_local:
        wrong += ["local storage was not used"] if not local_tier(folder, name).exists() else []
        wrong += ["memory is left in local storage"] if list(local_tier(folder, name).glob("*/")) else []
    return Outcome(found, wrong + surprises(faults, found))


def surprises(faults: Faults, found: list[Cell]) -> list[str]:
    """Return injections that were not made or had another effect; LookupError: the fault found no target."""
    wrong = []
    for (kind, phase), cell in zip(faults, found, strict=True):
        if not cell.was_injected:
            wrong.append(f"{phase}: not reached")
        elif (cell.cause is not None) != KINDS[kind].restarts or "LookupError" in (cell.cause or ""):
            wrong.append(f"{phase}: {cell.cause or 'no restart'}, unlike expected")
    return wrong


def undisturbed(folder: Path) -> None:
    """Make the data and the baseline run that all others are compared with."""
    folder.mkdir(parents=True)
    make_data(folder)
    assert run(folder, "baseline", "") == 0, (folder / "baseline.log").read_text()


def table(folder: Path) -> str:
    """Return docs/faults.md from all outcomes of the folder."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.outcome")}
    what = {name: kind.what for name, kind in KINDS.items()} | NODES
    lines = [f"| fault | {' | '.join(PLACES)} |", "|---" * (len(PLACES) + 1) + "|"]
    for name in what:
        if name not in found:
            lines.append(f"| {what[name]} | not run |" + " |" * (len(PLACES) - 1))
            continue
        by_phase = {cell["phase"]: cell for cell in found[name]["cells"]}
        shown = [_shown(by_phase[phase]) if phase in by_phase else "" for phase in PLACES]
        failed = " **fails**" if found[name]["wrong"] else ""
        lines.append(f"| {what[name]}{failed} | {' | '.join(shown)} |")
    parts = [
        HEAD.format(cores=os.cpu_count(), load=os.getloadavg()[2], hang=RESILIENCE["hang_seconds"]),
        *lines,
        "",
    ]
    parts += ["Empty cells: the fault does not apply in that phase.", ""]
    parts += [f"- {kind.what}: {kind.elsewhere}" for name, kind in KINDS.items() if name in found and kind.elsewhere]
    if wrong := [
        f"- {what[name]}: {'; '.join(found[name]['wrong'])}" for name in what if found.get(name, {}).get("wrong")
    ]:
        parts += ["", "What fails:", "", *wrong]
    return "\n".join(parts) + "\n"


def _shown(cell: dict) -> str:
    if not cell["was_injected"]:
        return "not reached"
    if cell["cause"] is None:
        return "continues"
    return f"{cell['detection']:.1f} + " + ("?" if cell["recovery"] is None else f"{cell['recovery']:.1f}")


HEAD = """# Fault matrix

Written by `make faults` (tests/lib/fault_matrix.py) on {cores} processor cores (load average then: {load:.0f}), with
two gloo ranks and a tiny model. In each run one kind of fault is injected in one phase after the other. A run passes
only if it finishes automatically with the losses, gradient norms, learning rates, last checkpoint and rows of a run
without faults, bit for bit; otherwise it is marked.

Cells are seconds: from the fault to its detection + from there to the next finished step (start-up: to the start of
the first step). A hang is detected after {hang} s + twice a step (`resilience.hang_seconds`). "continues": no restart.
"""


def outcome(folder: Path, name: str) -> Outcome:
    """Return the outcome of a kind of fault in all its phases."""
    if name in KINDS:
        return suffer(folder, name, [(name, phase) for phase in KINDS[name].phases])
    from fault_nodes import suffer_apart  # it imports this module

    wrong = suffer_apart(folder, name)
    return Outcome(cells(folder / name, [(name, "steady state")]), wrong)


def main() -> None:
    """Run the command line (see the module's docstring)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="output folder; outcomes in it are not repeated")
    parser.add_argument("--table", type=Path, help="file for the table of all outcomes in --out")
    parser.add_argument("--kinds", default=",".join([*KINDS, *NODES]), help="kinds of faults, separated by commas")
    chosen = parser.parse_args()
    if not (chosen.out / "baseline").exists():
        undisturbed(chosen.out)
    failed = False
    for name in chosen.kinds.split(","):
        path = chosen.out / f"{name}.outcome"
        if not path.exists():
            path.write_text(json.dumps(asdict(outcome(chosen.out, name)), indent=1))
        wrong = json.loads(path.read_text())["wrong"]
        failed = failed or bool(wrong)
        print(f"{name}: {'; '.join(wrong) or 'as the baseline run'}", flush=True)
    if chosen.table is not None:
        chosen.table.write_text(table(chosen.out))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
