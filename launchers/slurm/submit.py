"""Submit the job of pretrain_mm.sh from Python with submitit: one run, or a sweep of runs as an array.

    python launchers/slurm/submit.py CONFIG [key=value ...] --nodes 2 --gpus-per-node 8 --minutes 1440
    python launchers/slurm/submit.py CONFIG --sweep optimizer.lr=1e-3,3e-4 --sweep train.seed=1,2 --slurm qos=high

In: a config, checked before anything is submitted, and options for sbatch; cluster.env as with sbatch. Out: one line
per job with its number, the folder of its run and its log. On the first node submitit starts pretrain_mm.sh, which
works as under sbatch, except that submitit does the requeue, because it counts time limits (--max-timeouts).
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import submitit

from megamm.common import exit_codes
from megamm.common.errors import UserError
from megamm.config import load_config

SCRIPT = Path(__file__).resolve().parent / "pretrain_mm.sh"
WARNING = "USR1"
"""Signal before a time limit or preemption. Slurm sends it to all steps, so `megamm train` gets it directly."""
WARNING_SECONDS = 300


class Pretrain:
    """The task that submitit runs on the first node of the job."""

    def __init__(self, script: str, arguments: list[str]) -> None:
        self.script, self.arguments = script, arguments
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        # The script would forward the signal to processes that already got it.
        command = ["env", f"--ignore-signal={WARNING}", "bash", self.script, *self.arguments]
        with tempfile.NamedTemporaryFile("r", dir="/dev/shm") as bad:  # in memory: this node's disks may be faulty
            self.process = subprocess.Popen(command, env={**os.environ, "MEGAMM_EXCLUDE_FILE": bad.name})
            try:
                code = self._exit_code()
                if code == exit_codes.REQUEUE:
                    signal.raise_signal(signal.Signals[f"SIG{WARNING}"])  # submitit calls checkpoint() and requeues
            finally:  # submitit exits through an exception, here or in the line that waits
                exclude(bad.read().strip())
        if code:
            raise RuntimeError(f"{self.script} failed with exit code {code}")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return the same task again once the checkpoint is written; submitit calls this in its signal handler."""
        if self.process is not None:
            self._exit_code()
        return submitit.helpers.DelayedSubmission(Pretrain(self.script, self.arguments))

    def _exit_code(self) -> int:
        """Wait for the script; safe in a signal handler while the main code waits too (Popen.wait() would deadlock)."""
        assert self.process is not None
        ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        return ended.si_status


def exclude(nodes: str) -> None:
    """Exclude comma-separated nodes from this requeued job (only a requeued job can be changed)."""
    if nodes:
        update = ["scontrol", "update", f"JobId={submitit.JobEnvironment().job_id}", f"ExcNodeList={nodes}"]
        subprocess.run(["env", "--ignore-signal=TERM", *update], check=False)  # the requeue kills the job


def points(sweeps: list[str]) -> list[list[str]]:
    """Expand sweeps into all combinations: ["a=1,2", "b=3"] -> [["a=1", "b=3"], ["a=2", "b=3"]]."""
    axes = []
    for sweep in sweeps:
        key, _, values = sweep.partition("=")
        if not key or not values:
            raise UserError("invalid --sweep", where=sweep, remedy="write --sweep key=value,value")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return [list(point) for point in itertools.product(*axes)]


def runs_of(config: Path, overrides: list[str], sweeps: list[str]) -> list[tuple[list[str], Path]]:
    """Return arguments and output folder of every run; raise UserError if a config is invalid."""
    found = []
    for point in points(sweeps):
        run = load_config(config, [*overrides, *point])
        name = "_".join(part.rpartition(".")[2].replace("=", "-") for part in point)
        place = [f"output={run.output / name}"] if name else []
        found.append(([str(config), *overrides, *point, *place], run.output / name if name else run.output))
    if len({output for _, output in found}) < len(found):
        raise UserError(
            "two runs of the sweep would use the same output folder", remedy="sweep keys whose last parts differ"
        )
    return found


def executor_of(chosen: argparse.Namespace) -> submitit.AutoExecutor:
    """Configure submitit: one task, because the script starts the others."""
    extra = dict(option.split("=", 1) if "=" in option else (option, True) for option in chosen.slurm)
    asked = {"nodes": chosen.nodes, "gpus-per-node": chosen.gpus_per_node, "requeue": True} | extra
    asked = {name: value for name, value in asked.items() if value is not None}
    for name in asked:  # sbatch prefers its environment over options in the script, where submitit writes them
        os.environ.pop("SBATCH_" + name.replace("-", "_").upper(), None)
    for name in ("SBATCH_TIMELIMIT", "SBATCH_SIGNAL", "SBATCH_JOB_NAME"):
        os.environ.pop(name, None)
    executor = submitit.AutoExecutor(chosen.folder / "%j", cluster="slurm", slurm_max_num_timeout=chosen.max_timeouts)
    executor.update_parameters(
        name="megamm",
        timeout_min=chosen.minutes,
        tasks_per_node=1,
        stderr_to_stdout=True,
        slurm_signal_delay_s=chosen.warning_seconds,
        slurm_srun_args=["--nodes=1", "--ntasks=1", "--overlap", "--open-mode=append"],
        slurm_additional_parameters=asked,
    )
    return executor


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("--minutes", type=int, default=1440, help="time limit of each start of the job, in minutes")
    parser.add_argument("--sweep", action="append", default=[], metavar="key=v,v", help="one run per value; repeatable")
    parser.add_argument("--slurm", action="append", default=[], metavar="name=value", help="further option of sbatch")
    parser.add_argument("--folder", type=Path, default=Path("slurm"), help="folder for logs, on a shared file system")
    parser.add_argument("--max-timeouts", type=int, default=1000, help="maximum number of requeues after time limits")
    parser.add_argument("--warning-seconds", type=int, default=WARNING_SECONDS, help="seconds before the limit")
    return parser


def submit(chosen: argparse.Namespace) -> list[submitit.Job[None]]:
    """Submit the jobs and print number, folder and log of each."""
    runs = runs_of(chosen.config, chosen.overrides, chosen.sweep)
    executor = executor_of(chosen)
    # For the job's environment; in this process submitit read the variable when it was imported.
    os.environ |= {"MEGAMM_REQUEUE": "0", "SUBMITIT_PREEMPT_SIGNAL": WARNING}
    submitit.JobEnvironment.USR_SIG = WARNING
    tasks = [Pretrain(str(SCRIPT), arguments) for arguments, _ in runs]
    # An array even for one job, so that all are reported in the same way.
    with executor.batch():
        jobs = [executor.submit(task) for task in tasks]
    for job, (_, output) in zip(jobs, runs, strict=True):
        print(f"job {job.job_id}: run {output}, log {job.paths.stdout}")
    return jobs


if __name__ == "__main__":
    try:
        submit(options().parse_intermixed_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_codes.USER_ERROR)
