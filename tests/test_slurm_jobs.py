"""launchers/slurm on a real Slurm: cancelled jobs, bad and lost nodes, tasks and GPUs, chains and arrays.

After each, losses, rows and the last checkpoint equal those of a baseline run of `megamm train` alone, bit for bit; if
the number of ranks changes, losses differ in the order of sums. Jobs that Slurm restarts: test_slurm.py.
"""

import os
import re
import shutil

import faults
import pytest
from slurm_cluster import NODES
from slurm_lab import HELD, SCRIPT, Job

pytestmark = pytest.mark.slurm


def test_a_cancelled_job_saves_and_does_not_come_back(lab):
    job = lab.sbatch("cancelled", "--ntasks-per-node=2", faults=HELD)
    job.is_at("injected")
    lab.cluster("scancel", job.number)
    record = job.wait()
    job.tells("SIGTERM: writing a checkpoint", "with a checkpoint; Slurm has ended this job")
    assert (record["JobState"], record["Restarts"]) == ("CANCELLED", "0"), job.log
    assert [path.is_dir() for path in sorted((job.run / "checkpoints").glob("step_0000000[56]"))] == [True]


def test_a_checkout_with_spaces_and_brackets(lab):
    """slurmctld's own record of a script in such a folder; python3 on the node shows what it is asked to run."""
    cluster, folder = lab.cluster, lab.folder / "my project (v1)"
    shutil.copytree(SCRIPT.parent, folder / "slurm")
    (folder / "slurm" / "cluster.env").write_text(f"MEGAMM_NPROC=5\n{(SCRIPT.parent / 'cluster.env').read_text()}")
    (folder / "bin").mkdir()
    (folder / "bin" / "python3").write_text('#!/bin/sh\nprintf "<%s>" "$@"; echo\n')
    (folder / "bin" / "python3").chmod(0o755)
    (folder / "my config.yaml").touch()
    log = folder / "a log.txt"
    env = {**os.environ, **cluster.env, "MEGAMM_PREFLIGHT": "0", "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    sent = ["sbatch", "--parsable", f"--output={log}", folder / "slurm" / SCRIPT.name, "my config.yaml", "output=a b"]
    number = cluster(*sent, env=env, cwd=folder)
    record = cluster.wait_for(number)
    assert record["JobState"] == "COMPLETED", log.read_text()
    assert "<-m><megamm><train><my config.yaml><output=a b><--nproc><5>" in log.read_text()


@pytest.fixture
def small_scratch(lab):
    """Return an environment in which the disk of temporary files is full on n1, the node that runs the job's script."""
    lab.cluster.run_on("n1", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(lab.scratch))
    quick = "--least-write 0 --least-bandwidth 0"
    yield {"MEGAMM_PREFLIGHT": "1", "MEGAMM_PREFLIGHT_OPTIONS": quick, "MEGAMM_SCRATCH": str(lab.scratch)}
    lab.cluster.run_on("n1", "umount", str(lab.scratch))


@pytest.mark.everything
def test_a_job_leaves_a_bad_node(lab, small_scratch):
    job = lab.sbatch("elsewhere", "--nodes=2", **small_scratch)
    record = job.ends_as_undisturbed()
    assert (record["Restarts"], record["ExcNodeList"]) == ("1", "n1"), job.log
    job.tells("restart 0, on n1 n2", "1 good nodes, 2 needed: requeueing", "restart 1, on", "with 1 ranks on")


@pytest.mark.everything
def test_one_task_a_rank_and_a_bad_node(lab, small_scratch):
    """The bad node is excluded and drained. Then a rank is killed: its task stays, and restarts it with all others."""
    env = small_scratch | {"MEGAMM_NNODES_MIN": "2", "MEGAMM_DRAIN": "1", "MEGAMM_TASK_PER": "rank"}
    job = lab.sbatch("bad", "--nodelist=n1,n2,n3", "--ntasks-per-node=2", faults="sigkill@step:7:1:0", **env)
    assert job.ends_nearly_as_undisturbed()["Restarts"] == "0"
    job.tells("bad node n1: scratch", "excluded for the faults listed above: n1")
    job.tells("with 2 ranks on each of 2 nodes, 2 tasks per node", "attempt 0 failed", "resumed")
    assert job.attempt_of_the_kill() == 0
    assert [event["ranks"] for event in job.events("launched") + job.events("restarting")] == [4, 4]
    assert "DRAIN" in lab.cluster("sinfo", "--noheader", "--nodes=n1", "--format=%T").upper()
    lab.cluster("scontrol", "update", "NodeName=n1", "State=RESUME")


def test_gpus_of_tasks(lab):
    """A program in place of megamm reports what it sees: one task all GPUs of its node, several tasks one each."""
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


@pytest.mark.everything
def test_four_nodes_become_two(lab):
    fault, soon = ">pause@step:5:0:*", ["resilience.rendezvous.last_call_timeout=8"]
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


@pytest.mark.everything
def test_a_chain_and_an_array(lab):
    """A job that may not be requeued leaves the rest to the next job of its name, here an array's first element.

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
