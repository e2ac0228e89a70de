"""Restart in place: seconds from a fault to the next finished step, by phase, on a tiny run.

Two ranks on this machine; each attempt has one fault (tests/lib/faults.py), then the run resumes from its last
checkpoint. detection: from the fault until the supervisor knows it; teardown: all ranks gone; decision: a new agent
if it was killed, rendezvous and policy; start: fork, process groups, model; resume: checkpoint; first step: data and
step. Run: `python benchmarks/restart.py [--json OUT]`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests" / "lib"
COLUMNS = ("detection", "teardown", "decision", "start", "resume", "first step", "total")
RANKS = ("sigkill", "sigkill", "sigkill", "exception", "sigsegv", "exit0", "sigstop", "deadlock")
ABOVE = ("kill_agent", "kill_agent", "kill_agent", "kill_template", "kill_template", "kill_template")
FAULTS = (*RANKS, *ABOVE)
KILLED = {"sigkill": "a rank", "kill_agent": "the agent", "kill_template": "the prefork parent"}
HANG_SECONDS = 5


def run(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run with one fault in each of its first attempts, at steps 3, 5, 7, ..."""
    sys.path.insert(0, str(TESTS))
    import faults
    import tiny_run

    tiny_run.make_data(folder)
    steps = 2 * len(FAULTS) + 2
    train = {"steps": steps, "global_batch_size": 4, "micro_batch_size": 1, "log_every": 1}
    resilience = {"backoff_seconds": 0, "hang_seconds": HANG_SECONDS}
    sections = {"train": train, "checkpoint": {"every": 2, "keep": 2}, "resilience": resilience}
    config = tiny_run.write_config(folder, folder / "run", **sections)
    plan = ",".join(f"{kind}@step:{2 * i + 3}:1:{i}" for i, kind in enumerate(FAULTS))
    command = [sys.executable, "-m", "megamm", "train", str(config), "--nproc", "2"]
    env = faults.environment(plan, tiny_run.environment())
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=540)

    from megamm.common import events

    return events.read(folder / "run")


def rows(story: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each fault: seconds by column."""
    found = []
    kinds = ("injected", "failed", "restarting", "first_step")
    of = {kind: [e for e in story if e["kind"] == kind] for kind in kinds}
    first_steps = {e["attempt"]: e for e in of["first_step"]}
    for injected, failed, restarting in zip(of["injected"], of["failed"], of["restarting"], strict=True):
        first = first_steps[restarting["attempt"]]
        seconds, begun = first["seconds"], restarting["time"]
        row = {
            "fault": injected["fault"],
            "detection": failed["time"] - injected["time"],
            "teardown": restarting["teardown"],
            "decision": begun - failed["time"] - restarting["teardown"],
            "resume": seconds["resume"],
            "first step": seconds["data"] + seconds["step"],
            "total": first["time"] - injected["time"],
        }
        row["start"] = first["time"] - begun - row["resume"] - row["first step"]
        found.append({key: value if key == "fault" else round(value, 3) for key, value in row.items()})
    return found


def main() -> None:
    """Print the table; write it with the measured environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = rows(run(Path(folder)))
    print(f"{'fault':14}" + "".join(f"{name:>12}" for name in COLUMNS))
    for row in table:
        print(f"{row['fault']:14}" + "".join(f"{row[name]:12.2f}" for name in COLUMNS))
    killed = {
        who: statistics.median(row["total"] for row in table if row["fault"] == kind) for kind, who in KILLED.items()
    }
    load = os.getloadavg()[0]
    for who, seconds in killed.items():
        print(f"kill -9 of {who} to the next finished step: median {seconds:.2f} s")
    print(f"load {load:.1f} on {os.cpu_count()} cores")
    if given.json:
        where = {"cpu": platform.processor(), "cores": os.cpu_count(), "load": load, "date": time.strftime("%Y-%m-%d")}
        report = {"machine": where, "hang_seconds": HANG_SECONDS, "rows": table, "kill_to_step_median": killed}
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
