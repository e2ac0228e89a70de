"""launchers/slurm on a real Slurm (slurm_cluster.py): every job goes through sbatch, as an operator's does.

After each, losses, rows and the last checkpoint are those of an undisturbed run of `megamm train` alone, bit for bit.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import fault_matrix
import pytest
from slurm_cluster import Cluster, why_not

from megamm.resilience import events

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launchers" / "slurm" / "pretrain_mm.sh"
# Others share the machine's cores: slow is no hang.
PATIENCE = ("resilience.hang_seconds=300", "resilience.startup_seconds=300")
HELD = ">until_asked@step:5:0:*"
"""Rank 0 waits in step 5 until its agent is asked to stop."""

pytestmark = pytest.mark.slurm


@dataclass
class Job:
    """One that was sent: its run's folder and name, and the log that all its starts append to."""

    lab: "Lab"
    name: str
    number: str

    @property
    def run(self) -> Path:
        return self.lab.folder / self.name

    @property
    def log(self) -> str:
        return (self.lab.folder / f"{self.name}.log").read_text()

    def wait(self, *states, **options):
        return self.lab.cluster.wait_for(self.number, *states, **options)

    def events(self, kind):
        return [event for event in events.read(self.run) if event["kind"] == kind]

    def is_at(self, kind):
        """Wait for an event of that kind."""
        self.lab.cluster._wait(lambda: self.events(kind), f"{self.name}: {kind}", 240)

    def ends_as_undisturbed(self):
        """Its record, once it has ended well."""
        record = self.wait()
        assert record["JobState"] == "COMPLETED", self.log
        assert fault_matrix.differences(self.lab.folder, self.name, 0) == [], self.log
        return record


class Lab:
    """A cluster, and a folder with data, an undisturbed run, and those of the jobs."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder

    def sbatch(self, name, *options, faults="", script=SCRIPT, overrides=(), **env):
        """Send a job whose run is folder/name."""
        command, environment = fault_matrix.prepare(self.folder, name, faults)
        environment |= self.cluster.env | {"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}", "MEGAMM_PREFLIGHT": "0"}
        log = f"--output={self.folder / name}.log"
        sent = ["sbatch", "--parsable", log, *options, script, command[-1], *PATIENCE, *overrides]
        number = self.cluster(*sent, env=environment | env, cwd=self.folder)
        assert number.isdigit(), number
        return Job(self, name, number)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    if why := why_not():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("slurm") / "runs"
    with Cluster() as cluster:
        fault_matrix.undisturbed(folder)
        yield Lab(cluster, folder)


def test_a_killed_rank_starts_again_in_place(lab):
    job = lab.sbatch("killed", "--nodes=2", faults="sigkill@step:5:1:0")
    record = job.ends_as_undisturbed()
    assert record["Restarts"] == "0"
    assert ["SIGKILL" in event["cause"] for event in job.events("failed")] == [True]
    assert [event["ranks"] for event in job.events("launched")] == [2]


def test_a_node_loses_power(lab):
    job = lab.sbatch("power", "--nodelist=n3,n4", faults=">pause@step:5:0:*")
    job.is_at("injected")
    lab.cluster.cut("n4")
    (lab.folder / "power.records" / "paused").unlink()
    lab.cluster.wait_for(job.number, "PENDING")
    lab.cluster.start("n4")
    record = job.ends_as_undisturbed()
    assert record["Restarts"] == "1"


def test_a_cancelled_job_saves_and_does_not_come_back(lab):
    job = lab.sbatch("cancelled", "--nodes=2", faults=HELD)
    job.is_at("injected")
    lab.cluster("scancel", job.number)
    record = job.wait()
    assert record["JobState"] == "CANCELLED" and record["Restarts"] == "0", job.log
    assert "with a checkpoint; Slurm has ended this job" in job.log
    assert (job.run / "checkpoints" / "step_00000005").is_dir() or (job.run / "checkpoints" / "step_00000006").is_dir()


def test_time_limit(lab):
    job = lab.sbatch("limit", "--nodes=2", "--time=2", "--signal=B:USR1@70", faults=HELD)
    record = job.ends_as_undisturbed()
    assert record["Restarts"] == "1"


def test_preemption(lab):
    whole = ("--nodelist=n1,n2", "--ntasks-per-node=1", "--cpus-per-task=64")
    job = lab.sbatch("preempted", *whole, faults=HELD)
    job.is_at("injected")
    urgent = lab.cluster("sbatch", "--parsable", "--partition=urgent", *whole, "--output=/dev/null", "--wrap=true")
    assert lab.cluster.wait_for(urgent)["JobState"] == "COMPLETED"
    record = job.ends_as_undisturbed()
    assert record["Restarts"] == "1"
