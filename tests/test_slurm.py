"""launchers/slurm on a real Slurm (slurm_cluster.py): every job goes through sbatch, as an operator's does.

After each, losses, rows and the last checkpoint are those of an undisturbed run of `megamm train` alone, bit for bit.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import fault_matrix
import pytest
from slurm_cluster import NODES, Cluster, why_not
from tiny_run import numbers

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

    def is_at(self, kind):
        """Wait for an event of that kind."""
        self.lab.cluster.until(lambda: self.events(kind), f"{self.name}: {kind}", 240)

    def ends_as_undisturbed(self):
        """Its record, once it has ended well."""
        record = self.wait()
        assert record["JobState"] == "COMPLETED", self.log
        assert fault_matrix.differences(self.lab.folder, self.name, 0) == [], self.log
        self.tells("the run is done")
        return record

    def tells(self, *sentences):
        """One log tells the story: these, in this order."""
        log, at = self.log, 0
        for sentence in sentences:
            at = log.find(sentence, at)
            assert at >= 0, f"{sentence} is not there, or too early:\n{log}"


class Lab:
    """A cluster, and a folder with data, an undisturbed run, and those of the jobs."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        self.scratch = folder / "scratch"
        self.scratch.mkdir()

    def prepare(self, name, faults=""):
        """Config of a run folder/name, and the environment of those who send it."""
        command, environment = fault_matrix.prepare(self.folder, name, faults)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return command[-1], environment | self.cluster.env | {"PATH": path, "MEGAMM_PREFLIGHT": "0"}

    def sbatch(self, name, *options, faults="", overrides=(), **env):
        """Send a job whose run is folder/name."""
        config, environment = self.prepare(name, faults)
        sent = ["sbatch", "--parsable", f"--output={self.folder / name}.log", *options, SCRIPT]
        number = self.cluster(*sent, config, *PATIENCE, *overrides, env=environment | env, cwd=self.folder)
        assert number.isdigit(), number
        return Job(self, name, number)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    if why := why_not():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("slurm") / "runs"
    fault_matrix.undisturbed(folder)
    with Cluster() as cluster:
        yield Lab(cluster, folder)


def test_a_killed_rank_starts_again_in_place(lab):
    job = lab.sbatch("killed", "--nodes=2", faults="sigkill@step:5:1:0")
    record = job.ends_as_undisturbed()
    assert record["Restarts"] == "0"
    assert ["SIGKILL" in event["cause"] for event in job.events("failed")] == [True]
    assert [event["ranks"] for event in job.events("launched")] == [2]
    job.tells("restart 0, on", "with 1 ranks on each of 2 nodes", "attempt 0 failed", "resumed")


def test_a_node_loses_power(lab):
    job = lab.sbatch("power", "--nodelist=n3,n4", faults=">pause@step:5:0:*")
    job.is_at("injected")
    lab.cluster.cut("n4")
    (lab.folder / "power.records" / "paused").unlink()
    job.wait("PENDING")
    lab.cluster.start("n4")
    assert job.ends_as_undisturbed()["Restarts"] == "1"
    job.tells("restart 0, on n3 n4", "Node failure on n4", "restart 1, on n3 n4", "resumed")


def time_is_up(*jobs):
    """Shorten their time limits so that the warning is due; Slurm looks every 30 s. The next start has time again."""
    for job in jobs:
        hours, minutes, _ = job.lab.cluster.job(job.number)["RunTime"].split(":")
        job.lab.cluster("scontrol", "update", f"JobId={job.number}", f"TimeLimit={int(hours) * 60 + int(minutes) + 2}")
    for job in jobs:
        job.is_at("signal")
        job.lab.cluster("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")


def test_time_limit(lab):
    job = lab.sbatch("limit", "--nodes=2", "--time=60", faults=HELD)
    job.is_at("injected")
    time_is_up(job)
    assert job.ends_as_undisturbed()["Restarts"] == "1"
    job.tells("restart 0", "got USR1", "SIGUSR1: a checkpoint", "with a checkpoint: requeueing", "restart 1", "resumed")


def test_preemption(lab):
    whole = ("--nodelist=n1,n2", "--ntasks-per-node=1", "--cpus-per-task=64")
    job = lab.sbatch("preempted", *whole, faults=HELD)
    job.is_at("injected")
    urgent = lab.cluster("sbatch", "--parsable", "--partition=urgent", *whole, "--output=/dev/null", "--wrap=true")
    assert lab.cluster.wait_for(urgent)["JobState"] == "COMPLETED"
    assert job.ends_as_undisturbed()["Restarts"] == "1"
    job.tells("restart 0", "got USR1", "with a checkpoint: requeueing", "restart 1", "resumed")


def test_a_cancelled_job_saves_and_does_not_come_back(lab):
    job = lab.sbatch("cancelled", "--nodes=2", faults=HELD)
    job.is_at("injected")
    lab.cluster("scancel", job.number)
    record = job.wait()
    job.tells("SIGTERM: a checkpoint", "with a checkpoint; Slurm has ended this job")
    assert (record["JobState"], record["Restarts"]) == ("CANCELLED", "0"), job.log
    assert [path.is_dir() for path in sorted((job.run / "checkpoints").glob("step_0000000[56]"))] == [True]


def test_a_bad_node_is_left_out(lab):
    """The disk of temporary files is full on one node, the one that the job's script runs on."""
    lab.cluster.run_on("n1", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(lab.scratch))
    quick = "--least-write 0 --least-bandwidth 0"
    env = {"MEGAMM_PREFLIGHT": "1", "MEGAMM_PREFLIGHT_OPTIONS": quick, "MEGAMM_SCRATCH": str(lab.scratch)}
    job = lab.sbatch("elsewhere", "--nodes=2", **env)
    record = job.ends_as_undisturbed()
    assert (record["Restarts"], record["ExcNodeList"]) == ("1", "n1"), job.log
    job.tells("restart 0, on n1 n2", "1 good nodes, 2 needed: requeueing", "restart 1, on", "with 1 ranks on")

    job = lab.sbatch("bad", "--nodelist=n1,n2,n3", MEGAMM_NNODES_MIN="2", MEGAMM_DRAIN="1", **env)
    assert job.ends_as_undisturbed()["Restarts"] == "0"
    job.tells("bad node n1: scratch", "left out, for what is said of them above: n1", "with 1 ranks on each of 2 nodes")
    assert "DRAIN" in lab.cluster("sinfo", "--noheader", "--nodes=n1", "--format=%T").upper()
    lab.cluster("scontrol", "update", "NodeName=n1", "State=RESUME")
    lab.cluster.run_on("n1", "umount", str(lab.scratch))


def test_four_nodes_become_two(lab):
    job = lab.sbatch("elastic", "--nodes=4", "--no-kill", faults=">pause@step:5:0:*", MEGAMM_NNODES_MIN="2")
    job.is_at("injected")
    for node in ("n3", "n4"):
        lab.cluster.cut(node)
    (lab.folder / "elastic.records" / "paused").unlink(missing_ok=True)
    record = job.wait()
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "0"), job.log
    for node in ("n3", "n4"):
        lab.cluster.start(node)
    assert job.events("launched")[0]["ranks"] == 4
    assert job.events("restarting")[-1]["ranks"] == 2
    of = lab.folder / "undisturbed"
    assert fault_matrix.rows(lab.folder / "elastic.records") == fault_matrix.rows(of.with_suffix(".records"))
    for ours, theirs in zip(numbers(job.run), numbers(of), strict=True):
        # How evenly the ranks are loaded depends on their number.
        wanted = {key: value for key, value in theirs.items() if value is not None and key != "imbalance"}
        assert {key: ours[key] for key in wanted} == pytest.approx(wanted, rel=1e-5)
    lab.cluster.until(lambda: lab.cluster.idle() == list(NODES), "all nodes idle")


def test_an_array_and_a_chain(lab):
    """Ranks follow from the GPUs of the allocation; a job that may not be requeued leaves the rest to the next."""
    configs = [lab.prepare(f"array-{i}") for i in range(2)]
    sent = ["sbatch", "--parsable", "--array=0-1", "--gpus-per-node=2", f"--output={lab.folder}/array-%a.log", SCRIPT]
    array = lab.cluster(*sent, lab.folder / "array-%a.yaml", *PATIENCE, env=configs[0][1], cwd=lab.folder)
    chain = ("--nodes=2", "--job-name=chain", "--dependency=singleton", "--no-requeue")
    first = lab.sbatch("chain", *chain, faults=HELD)
    config, env = lab.folder / "chain.yaml", lab.prepare("next")[1]
    sent = ["sbatch", "--parsable", *chain, f"--output={lab.folder}/next.log", SCRIPT, config, *PATIENCE]
    second = Job(lab, "next", lab.cluster(*sent, env=env, cwd=lab.folder))
    first.is_at("injected")
    assert lab.cluster.job(second.number)["JobState"] == "PENDING"
    lab.cluster("scancel", "--batch", "--signal=USR1", first.number)
    assert first.wait()["ExitCode"] == "75:0"
    first.tells("requeueing is not allowed")
    assert second.wait()["JobState"] == "COMPLETED", second.log
    assert numbers(first.run) == numbers(lab.folder / "undisturbed")
    for i in range(2):
        element = Job(lab, f"array-{i}", f"{array}_{i}")
        assert element.wait()["JobState"] == "COMPLETED", element.log
        element.tells("with 2 ranks on each of 1 nodes")
        assert numbers(element.run) == numbers(lab.folder / "undisturbed")


def test_submitit(lab):
    """A sweep of two; both come to their time limit, and submitit requeues them."""
    config, env = lab.prepare("submitit", HELD)
    command = [sys.executable, SCRIPT.with_name("submit.py"), config, *PATIENCE, "--sweep", "train.seed=1,2"]
    command += ["--nodes=2", "--minutes=60", "--folder", lab.folder / "submitted"]
    done = subprocess.run([*map(str, command)], env=env, cwd=lab.folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    jobs = []
    for line, seed in zip(done.stdout.splitlines(), (1, 2), strict=True):
        _, number, _, run, _, log = line.split()
        assert run == f"{lab.folder}/submitit/seed-{seed},"
        jobs.append(Job(lab, f"submitit/seed-{seed}", number.rstrip(":"), Path(log)))
    for job in jobs:
        job.is_at("injected")
    time_is_up(*jobs)
    for job in jobs:
        record = job.wait()
        assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1"), job.log
        job.tells(
            "restart 0", "whoever started this is to run it again", "Requeued job", "restart 1", "the run is done"
        )
    assert numbers(jobs[0].run) == numbers(lab.folder / "undisturbed")
    assert numbers(jobs[1].run)[-1]["step"] == fault_matrix.STEPS
