"""launchers/slurm on a real Slurm (slurm_cluster.py): every job goes through sbatch (slurm_lab.py), as an operator's.

After each, losses, rows and the last checkpoint are those of an undisturbed run of `megamm train` alone, bit for bit.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import fault_matrix
import faults
import pytest
from slurm_cluster import NODES, Cluster, why_not
from slurm_lab import PATIENCE, SCRIPT, Job, Lab, time_is_up
from tiny_run import numbers

HELD = ">until_asked@step:5:0:*"
"""Rank 0 waits in step 5 until its agent is asked to stop."""

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def lab(undisturbed):
    if why := why_not():
        pytest.skip(why)
    with Cluster() as cluster:
        yield Lab(cluster, undisturbed)


@pytest.fixture(scope="module")
def swept(lab):
    """A sweep of two runs by submit.py, on two nodes each: one that comes to its time limit, one that ends early."""
    config, env = lab.prepare("submitit", HELD)
    command = [sys.executable, SCRIPT.with_name("submit.py"), config, *PATIENCE, "--sweep", "train.stop_after=10,4"]
    command += ["--nodes=2", "--slurm=nodelist=n1,n2", "--minutes=60", "--folder", lab.folder / "submitted"]
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


def test_the_life_of_a_job(lab, swept):
    """A rank is killed, a node loses power, a higher partition takes the nodes, the time is up: one job, one log.

    Slurm takes half a minute each for lost nodes and time limits. The sweep waits for its limit at the same time.
    """
    whole = ("--nodelist=n3,n4", "--ntasks-per-node=1", "--cpus-per-task=64")
    # A run that is asked to stop may do another step.
    places = ("pause@step:4:0:0", "sigkill@step:5:1:0", "pause@step:5:0:1", "until_asked@step:6:0:*")
    job = lab.sbatch("life", *whole, "--time=60", faults=">".join([*places, "until_asked@step:8:0:*"]))
    job.is_at("saved")
    job.go_on()
    job.is_at("injected", 3)
    assert lab.cluster.job(job.number)["Restarts"] == "0"
    assert job.attempt_of_the_kill() == 0
    job.tells("restart 0, on n3 n4", "with 1 ranks on each of 2 nodes", "attempt 0 failed", "resumed")

    lab.cluster.cut("n4")
    job.go_on()
    job.wait("PENDING")
    lab.cluster.start("n4")
    job.is_at("injected", 4)
    job.tells("Node failure on n4", "restart 1, on n3 n4", "resumed")

    urgent = lab.cluster("sbatch", "--parsable", "--partition=urgent", *whole, "--output=/dev/null", "--wrap=true")
    assert lab.cluster.wait_for(urgent)["JobState"] == "COMPLETED"
    job.is_at("injected", 5)
    job.tells("restart 1", "got USR1", "with a checkpoint: requeueing", "restart 2", "resumed")

    swept[0].is_at("injected")
    time_is_up(job, swept[0])
    assert job.ends_as_undisturbed()["Restarts"] == "3"
    job.tells("restart 2", "got USR1", "SIGUSR1: a checkpoint", "with a checkpoint: requeueing", "restart 3", "resumed")
    assert [event["ranks"] for event in job.events("launched")] == [2] * 4


def test_submitit(lab, swept):
    """The first has come to its time limit, by now if not before; submitit requeues it."""
    limited, short = swept
    limited.is_at("injected")
    if not limited.events("signal"):
        time_is_up(limited)
    assert limited.ends_as_undisturbed()["Restarts"] == "1"
    again = "whoever started this is to run it again"
    limited.tells("restart 0", again, "Requeued job", "restart 1", "the run is done")
    assert short.ends()["Restarts"] == "0"
    whole = lab.folder / "undisturbed"
    assert numbers(short.run) == [line for line in numbers(whole) if line["step"] <= 4]
    rows = fault_matrix.rows(whole.with_suffix(".records"))
    assert fault_matrix.rows(short.run.with_suffix(".records")) == dict(list(rows.items())[:4])


def test_a_cancelled_job_saves_and_does_not_come_back(lab):
    job = lab.sbatch("cancelled", "--ntasks-per-node=2", faults=HELD)
    job.is_at("injected")
    lab.cluster("scancel", job.number)
    record = job.wait()
    job.tells("SIGTERM: a checkpoint", "with a checkpoint; Slurm has ended this job")
    assert (record["JobState"], record["Restarts"]) == ("CANCELLED", "0"), job.log
    assert [path.is_dir() for path in sorted((job.run / "checkpoints").glob("step_0000000[56]"))] == [True]


@pytest.fixture
def small_scratch(lab):
    """The disk of temporary files is full on n1, the node that a job's script runs on: its environment."""
    lab.cluster.run_on("n1", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(lab.scratch))
    quick = "--least-write 0 --least-bandwidth 0"
    yield {"MEGAMM_PREFLIGHT": "1", "MEGAMM_PREFLIGHT_OPTIONS": quick, "MEGAMM_SCRATCH": str(lab.scratch)}
    lab.cluster.run_on("n1", "umount", str(lab.scratch))


def test_a_job_leaves_a_bad_node(lab, small_scratch):
    job = lab.sbatch("elsewhere", "--nodes=2", **small_scratch)
    record = job.ends_as_undisturbed()
    assert (record["Restarts"], record["ExcNodeList"]) == ("1", "n1"), job.log
    job.tells("restart 0, on n1 n2", "1 good nodes, 2 needed: requeueing", "restart 1, on", "with 1 ranks on")


def test_one_task_a_rank_and_a_bad_node(lab, small_scratch):
    """The bad node is left out and drained. Then a rank is killed: its task stays, and starts it again with all."""
    env = small_scratch | {"MEGAMM_NNODES_MIN": "2", "MEGAMM_DRAIN": "1", "MEGAMM_TASK_PER": "rank"}
    job = lab.sbatch("bad", "--nodelist=n1,n2,n3", "--ntasks-per-node=2", faults="sigkill@step:7:1:0", **env)
    assert job.ends_nearly_as_undisturbed()["Restarts"] == "0"
    job.tells("bad node n1: scratch", "left out, for what is said of them above: n1")
    job.tells("with 2 ranks on each of 2 nodes, 2 tasks a node", "attempt 0 failed", "resumed")
    assert job.attempt_of_the_kill() == 0
    assert [event["ranks"] for event in job.events("launched") + job.events("restarting")] == [4, 4]
    assert "DRAIN" in lab.cluster("sinfo", "--noheader", "--nodes=n1", "--format=%T").upper()
    lab.cluster("scontrol", "update", "NodeName=n1", "State=RESUME")


def test_gpus_of_tasks(lab):
    """A program in place of megamm tells what it sees: one task all GPUs of its node, several one each."""
    variable = re.search(r"\w+_VISIBLE_DEVICES", SCRIPT.read_text())[0]
    python = lab.folder / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$(hostname) task $SLURM_LOCALID has ${variable}"\n')
    python.chmod(0o755)
    env = {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    for per, seen in (("", ("0", "1")), ("node", ("0,1",))):
        options = ("--nodelist=n1,n2", "--ntasks-per-node=2", "--gpus-per-task=1")
        job = lab.sbatch(f"gpus-{per}", *options, MEGAMM_TASK_PER=per, **env)
        job.ends()
        told = {f"{node} task {i} has {gpus}" for node in ("n1", "n2") for i, gpus in enumerate(seen)}
        assert {line for line in job.log.splitlines() if " has " in line} == told, job.log


def test_four_nodes_become_two(lab):
    fault, soon = ">pause@step:5:0:*", ["resilience.rendezvous.last_call=8"]
    job = lab.sbatch("elastic", "--nodes=4", "--no-kill", faults=fault, overrides=soon, MEGAMM_NNODES_MIN="2")
    job.is_at("injected")
    for node in ("n3", "n4"):
        lab.cluster.cut(node)
    job.go_on()
    assert job.ends_nearly_as_undisturbed()["Restarts"] == "0"
    for node in ("n3", "n4"):
        lab.cluster.start(node)
    assert job.events("launched")[0]["ranks"] == 4
    assert job.events("restarting")[-1]["ranks"] == 2
    lab.cluster.until(lambda: lab.cluster.idle() == list(NODES), "all nodes idle")


def test_a_chain_and_an_array(lab):
    """A job that may not be requeued leaves the rest to the next of its name, here an array's first element.

    Ranks follow from the GPUs of the allocation.
    """
    chain = ("--gpus-per-node=2", "--job-name=chain", "--dependency=singleton", "--no-requeue")
    first = lab.sbatch("chain-0", *chain, faults=HELD)
    records = {faults.FAULTS: "", faults.FOLDER: f"{lab.folder}/chain-$SLURM_ARRAY_TASK_ID.records"}
    array = ("--array=0-1", f"--output={lab.folder}/chain-%a.log")
    second = lab.sbatch("chain-1", *chain, *array, config=lab.folder / "chain-%a.yaml", **records)
    first.is_at("injected")
    assert lab.cluster.job(second.number)["JobState"] == "PENDING"
    lab.cluster("scancel", "--batch", "--signal=USR1", first.number)
    assert first.wait()["ExitCode"] == "75:0"
    first.tells("requeueing is not allowed")
    for i in range(2):
        element = Job(lab, f"chain-{i}", f"{second.number}_{i}")
        element.ends_as_undisturbed()
        element.tells(f"job {second.number}_{i} (chain)", "with 2 ranks on each of 1 nodes")
    first.tells("requeueing is not allowed", "resumed", "the run is done")
