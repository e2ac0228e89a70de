"""Jobs for the tests of launchers/slurm: submitted by sbatch to a Cluster, followed by their runs' events and logs."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import fault_matrix
import pytest
from tiny_run import ROOT, numbers

from megamm.common import events

SCRIPT = ROOT / "launchers" / "slurm" / "pretrain_mm.sh"
HELD = ">until_asked@step:5:0:*"
"""Rank 0 waits in step 5 until its agent is asked to stop."""
# Other processes share the machine's cores: slow is not a hang.
PATIENCE = ("resilience.hang_seconds=300", "resilience.startup_seconds=300")


@dataclass
class Job:
    """A submitted job: its run's folder and name, and the log that all its starts append to."""

    lab: "Lab"
    name: str
    number: str
    log_file: Path | None = None

    @property
    def run(self) -> Path:
        return self.lab.folder / self.name

    @property
    def log(self) -> str:
        return (self.log_file or self.lab.folder / f"{self.name}.log").read_text()

    def wait(self, *states, **options):
        return self.lab.cluster.wait_for(self.number, *states, **options)

    def events(self, kind):
        return [event for event in events.read(self.run) if event["kind"] == kind]

    def is_at(self, kind, count=1):
        """Wait for that many events of that kind."""
        self.lab.cluster.until(lambda: len(self.events(kind)) >= count, f"{self.name}: {count} {kind}", 240)

    def go_on(self):
        """Continue at its pause, after waiting for it."""
        paused = self.run.with_suffix(".records") / "paused"
        self.lab.cluster.until(paused.exists, f"{self.name}: a pause")
        paused.unlink()

    def attempt_of_the_kill(self):
        """Return the only failed attempt: other ranks than the killed one may also fail when their connections end."""
        failed = self.events("failed")
        (attempt,) = {event["attempt"] for event in failed}
        assert any("SIGKILL" in event["cause"] for event in failed), failed
        return attempt

    def ends(self):
        """Wait until it has completed; return its record."""
        record = self.wait()
        assert record["JobState"] == "COMPLETED", self.log
        self.tells("the run is done")
        return record

    def ends_as_undisturbed(self):
        record = self.ends()
        assert fault_matrix.differences(self.lab.folder, self.name, 0) == [], self.log
        return record

    def ends_nearly_as_undisturbed(self):
        """Check a run on another number of ranks: the same rows, and losses up to the order of sums."""
        record = self.ends()
        of = self.lab.folder / "baseline"
        assert fault_matrix.rows(self.run.with_suffix(".records")) == fault_matrix.rows(of.with_suffix(".records"))
        for ours, theirs in zip(numbers(self.run), numbers(of), strict=True):
            # The balance of the ranks depends on their number.
            wanted = {key: value for key, value in theirs.items() if value is not None and key != "imbalance"}
            assert {key: ours[key] for key in wanted} == pytest.approx(wanted, rel=1e-5)
        return record

    def tells(self, *sentences):
        """Check that one log has these sentences, in this order."""
        log, at = self.log, 0
        for sentence in sentences:
            at = log.find(sentence, at)
            assert at >= 0, f"{sentence} is missing or too early:\n{log}"


class Lab:
    """A cluster, and the folder of the baseline run, which the jobs' runs share."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        self.scratch = folder / "scratch"
        self.scratch.mkdir()

    def prepare(self, name, faults=""):
        """Return the config of a run folder/name, and the environment for submitting it."""
        command, environment = fault_matrix.prepare(self.folder, name, faults)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return command[-1], environment | self.cluster.env | {"PATH": path, "MEGAMM_PREFLIGHT": "0"}

    def sbatch(self, name, *options, faults="", overrides=(), config=None, **env):
        """Submit a job whose run is folder/name, unless the config names another."""
        written, environment = self.prepare(name, faults)
        sent = ["sbatch", "--parsable", f"--output={self.folder / name}.log", *options, SCRIPT]
        arguments = [config or written, *PATIENCE, *overrides]
        number = self.cluster(*sent, *arguments, env=environment | env, cwd=self.folder)
        assert number.isdigit(), number
        return Job(self, name, number)


def time_is_up(*jobs):
    """Shorten their time limits so that the warning is due; Slurm looks every 30 s. The next start has time again."""
    heard = [len(job.events("signal")) for job in jobs]
    for job in jobs:
        hours, minutes, _ = job.lab.cluster.job(job.number)["RunTime"].split(":")
        job.lab.cluster("scontrol", "update", f"JobId={job.number}", f"TimeLimit={int(hours) * 60 + int(minutes) + 2}")
    for job, before in zip(jobs, heard, strict=True):
        job.is_at("signal", before + 1)
        job.lab.cluster("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
