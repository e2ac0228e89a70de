"""launchers/slurm on a real Slurm (slurm_cluster.py): jobs that Slurm stops and restarts, by sbatch and submitit.

After each, losses, rows and the last checkpoint equal those of a baseline run of `megamm train` alone, bit for bit.
Every start costs seconds on each node. With `make test-all` a node of the job by sbatch also loses power (`make test`
has that on Kubernetes, test_k8s_runs.py), it reaches its time limit too, and the runs of the sweep have two nodes each
instead of two ranks on one.
All other jobs are in test_slurm_jobs.py, a separate file, so that another worker of pytest runs it at the same time.
"""

import subprocess
import sys
from pathlib import Path

import fault_matrix
import faults
import pytest
from slurm_lab import HELD, PATIENCE, SCRIPT, Job, time_is_up
from tiny_run import numbers

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def everything(request):
    return request.config.getoption("everything")


@pytest.fixture(scope="module")
def swept(lab, everything):
    """Submit a sweep of two runs with submit.py, of two ranks each: one reaches its time limit, one ends early."""
    config, env = lab.prepare("submitit", HELD)
    command = [sys.executable, SCRIPT.with_name("submit.py"), config, *PATIENCE, "--sweep", "train.stop_after=10,4"]
    command += ["--nodes=2"] if everything else ["--nodes=1", "--gpus-per-node=2"]
    command += ["--slurm=exclude=n3,n4", "--minutes=60", "--folder", lab.folder / "submitted"]
    env |= {faults.FOLDER: f"{lab.folder}/submitit/$SLURM_ARRAY_TASK_ID.records"}
    jobs = []
    for index, steps in enumerate((10, 4)):
        records = lab.folder / "submitit" / f"{index}.records"
        records.mkdir(parents=True)
        records.with_name(f"stop_after-{steps}.records").symlink_to(records)
    done = subprocess.run([*map(str, command)], env=env, cwd=lab.folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for line, steps in zip(done.stdout.splitlines(), (10, 4), strict=True):
        _, number, _, run, _, log = line.split()
        assert run == f"{lab.folder}/submitit/stop_after-{steps},"
        jobs.append(Job(lab, f"submitit/stop_after-{steps}", number.rstrip(":"), Path(log)))
    return jobs


def test_the_life_of_a_job(lab, swept, everything):
    """A rank is killed, a higher partition preempts the nodes: one job, one log.

    With `make test-all` a node loses power in between, and time runs out in the end. Slurm takes half a minute each.
    The sweep waits for its limit at the same time.
    """
    whole = ("--nodelist=n3,n4", "--ntasks-per-node=1", "--cpus-per-task=64")
    # A run that is asked to stop may run another step.
    places = ("pause@step:4:0:0", "sigkill@step:5:1:0", "pause@step:5:0:1", "until_asked@step:6:0:*")
    places += ("until_asked@step:8:0:*",) if everything else ()
    job = lab.sbatch("life", *whole, "--time=60", faults=">".join(places))
    job.is_at("saved")
    job.go_on()
    job.is_at("injected", 3)
    assert lab.cluster.job(job.number)["Restarts"] == "0"
    assert job.attempt_of_the_kill() == 0
    job.tells("restart 0, on n3 n4", "with 1 ranks on each of 2 nodes", "attempt 0 failed", "resumed")

    if everything:
        lab.cluster.cut("n4")
        job.go_on()
        job.wait("PENDING")
        lab.cluster.start("n4")
        job.is_at("injected", 4)
        job.tells("Node failure on n4", "restart 1, on n3 n4", "resumed")
    else:
        job.go_on()
        job.is_at("injected", 4)

    urgent = lab.cluster("sbatch", "--parsable", "--partition=urgent", *whole, "--output=/dev/null", "--wrap=true")
    assert lab.cluster.wait_for(urgent)["JobState"] == "COMPLETED"
    if everything:
        job.is_at("injected", 5)
    job.tells("got USR1", "with a checkpoint: requeueing")

    swept[0].is_at("injected")
    if everything:
        time_is_up(job, swept[0])
    restarts = 3 if everything else 1
    assert job.ends_as_undisturbed()["Restarts"] == str(restarts)
    job.tells("got USR1", "with a checkpoint: requeueing", f"restart {2 if everything else 1}", "resumed")
    if everything:
        words = "restart 2", "got USR1", "SIGUSR1: writing a checkpoint", "with a checkpoint: requeueing", "restart 3"
        job.tells(*words, "resumed")
    assert [event["ranks"] for event in job.events("launched")] == [2] * (1 + restarts)


def test_submitit(lab, swept):
    """The first run reaches its time limit, or has with `make test-all`; submitit requeues it."""
    limited, short = swept
    limited.is_at("injected")
    if not limited.events("signal"):
        time_is_up(limited)
    assert limited.ends_as_undisturbed()["Restarts"] == "1"
    again = "the caller must run it again"
    limited.tells("restart 0", again, "Requeued job", "restart 1", "the run is done")
    assert short.ends()["Restarts"] == "0"
    whole = lab.folder / "baseline"
    assert numbers(short.run) == [line for line in numbers(whole) if line["step"] <= 4]
    rows = fault_matrix.rows(whole.with_suffix(".records"))
    assert fault_matrix.rows(short.run.with_suffix(".records")) == dict(list(rows.items())[:4])
