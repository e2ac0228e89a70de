"""How pretrain_mm.sh handles arguments, exit codes and its site's file; test_slurm(_jobs).py run it for real.

srun and scontrol are small programs that log their arguments, as are container runtimes, which tests cannot install.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_run import environment

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "launchers" / "slurm"
USAGE = "usage: sbatch [options] launchers/slurm/pretrain_mm.sh CONFIG [key=value ...]"
SRUN = """#!/bin/sh
printf "srun %s" "$*" | tr "\\n" ";" >>"$NOTES"; echo >>"$NOTES"
case "$*" in
*" doctor "*) for node in $GOOD; do echo "$node 0"; done ;;
*" train "*) echo "$SAYS" >&2; exit "$CODE" ;;
esac
"""
SCONTROL = """#!/bin/sh
case "$1 $2" in
"show hostnames") echo "$3" | tr , '\\n' ;;
"show job")
    [ "$3" = -o ] && end=" " || end="\n   "
    printf "JobId=7 JobState=$STATE Reason=$REASON$end%s$end" "ExcNodeList=(null)" "Command=$COMMAND" "StdOut=$LOG" ;;
*) echo "scontrol $*" >>"$NOTES" ;;
esac
"""
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "megamm", "SLURM_JOB_NODELIST": "n1,n2", "STATE": "RUNNING"}
QUIET = {"REASON": "None", "SAYS": "", "COMMAND": "(null)", "GOOD": "n1 n2"}


@pytest.fixture
def start(tmp_path):
    """Run the script, or another command; return its exit code, log, and its requests to Slurm."""

    def run(*arguments, command=("bash", SLURM / "pretrain_mm.sh"), code=0, **env):
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        (tmp_path / "config.yaml").touch()
        notes, log = tmp_path / "notes", tmp_path / "log"
        notes.write_text("")
        all_env = environment() | JOB | QUIET | {"CODE": str(code), "NOTES": str(notes), "LOG": str(log)} | env
        all_env = {key: value for key, value in all_env.items() if value is not None}
        all_env["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        with log.open("w") as file:
            done = subprocess.run(
                [*command, *arguments], cwd=tmp_path, env=all_env, stdout=file, stderr=file, timeout=60
            )
        return SimpleNamespace(code=done.returncode, log=log.read_text(), asked=notes.read_text().splitlines())

    return run


@pytest.mark.parametrize(
    ("arguments", "env", "why"),
    [
        ([], {}, "no CONFIG given"),
        (["nowhere.yaml"], {}, "config nowhere.yaml not found"),
        (["config.yaml", "--nodes=2"], {}, "--nodes=2 is not key=value"),
        (["config.yaml"], {"SLURM_JOB_ID": None}, "not running in a Slurm job"),
        (["config.yaml"], {"MEGAMM_CLUSTER_ENV": "/nowhere"}, "/nowhere not found"),
    ],
)
def test_wrong_arguments_are_refused(start, arguments, env, why):
    done = start(*arguments, **env)
    assert done.code == 2 and why in done.log and USAGE in done.log and not done.asked


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"MEGAMM_TASK_PER": "gpu"}, "MEGAMM_TASK_PER=gpu is neither node nor rank"),
        (
            {"SLURM_GPUS_PER_TASK": "2", "SLURM_GPUS_ON_NODE": "8"},
            "--gpus-per-task=2, but a rank uses one GPU: set 1",
        ),
        ({"SLURM_GPUS_ON_NODE": "4", "MEGAMM_NPROC": "8"}, "MEGAMM_NPROC=8, but the job has 4 GPUs per node"),
        (
            {"MEGAMM_TASK_PER": "rank", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "4"},
            "8 tasks on a node with 4 CPUs: add --ntasks-per-node=8",
        ),
    ],
)
def test_tasks_that_cannot_be_are_refused(start, env, why):
    done = start("config.yaml", **env)
    assert done.code == 2 and not done.asked
    assert done.log.startswith(f"error: {why}") and len(done.log.splitlines()) == 1


@pytest.mark.parametrize(
    ("code", "env", "exit_code", "is_requeued"),
    [
        (0, {}, 0, False),
        (2, {}, 2, False),
        (3, {}, 3, False),
        (75, {}, 0, True),
        (75, {"SLURM_RESTART_COUNT": "500"}, 0, True),
        (1, {}, 0, True),
        (137, {"SLURM_RESTART_COUNT": "9"}, 0, True),
        (137, {"SLURM_RESTART_COUNT": "10"}, 137, False),
        (138, {"SLURM_RESTART_COUNT": "10"}, 0, True),
        (75, {"STATE": "COMPLETING"}, 75, False),
        (75, {"STATE": "COMPLETING", "REASON": "TimeLimit"}, 0, True),
        (75, {"MEGAMM_REQUEUE": "0"}, 75, False),
        (1, {"MEGAMM_REQUEUE": "0"}, 75, False),
        (2, {"MEGAMM_REQUEUE": "0"}, 2, False),
    ],
)
def test_exit_codes(start, code, env, exit_code, is_requeued):
    done = start("config.yaml", code=code, MEGAMM_PREFLIGHT="0", **env)
    assert (done.code, "scontrol requeue 7" in done.asked) == (exit_code, is_requeued), done.log


@pytest.mark.parametrize("arguments", ["", " config.yaml output=a b"])
def test_a_checkout_and_a_log_with_spaces_in_their_paths(start, tmp_path, arguments):
    """Slurm runs a copy of the script; it finds cluster.env beside the original, and evictions in the log."""
    checkout, spool = tmp_path / "my project (v1)" / "launchers" / "slurm", tmp_path / "spool"
    shutil.copytree(SLURM, checkout)
    (checkout / "cluster.env").write_text(f"MEGAMM_NPROC=5\n{(checkout / 'cluster.env').read_text()}")
    spool.mkdir()
    shutil.copy(checkout / "pretrain_mm.sh", spool / "slurm_script")
    log = tmp_path / "my logs" / "run (1).log"
    log.parent.mkdir()
    says = "pretrain_mm: training with\nsrun: error: n2: task 1: Exited with exit code 4\n"
    log.write_text(says)
    command = f"{checkout / 'pretrain_mm.sh'}{arguments}"
    env = {"COMMAND": command, "LOG": str(log), "MEGAMM_PREFLIGHT": "0"}
    (tmp_path / "my config.yaml").touch()
    done = start("my config.yaml", "output=a b", command=("bash", spool / "slurm_script"), code=75, **env)
    assert "train my config.yaml output=a b --nproc 5" in done.asked[0], done.log
    assert done.asked[1:] == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n2"], done.log


def test_nodes_that_failed_are_excluded(start):
    done = start("config.yaml", GOOD="n1")
    assert done.asked[-2:] == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n2"], done.log
    says = "srun: error: n2: task 1: Exited with exit code 4\nsrun: error: n1: task 0: Exited with exit code 75"
    done = start("config.yaml", code=75, SAYS=says, MEGAMM_DRAIN="1", MEGAMM_PREFLIGHT="0")
    drain = "scontrol update NodeName=n2 State=DRAIN Reason=failed a check of megamm, job 7"
    assert done.asked[1:] == [drain, "scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n2"], done.log


def test_all_nodes_bad_is_the_set_up(start):
    done = start("config.yaml", GOOD="n9")
    assert done.code == 2 and "not requeued" in done.log and len(done.asked) == 1


def test_what_is_started_on_the_nodes(start):
    """Ranks, minimum and spare nodes, the preflight alone and together, the index of an array in arguments."""
    sent = {"SLURM_GPUS_ON_NODE": "8", "MEGAMM_NNODES_MIN": "1", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    done = start("config.yaml", "train.seed=%a", **sent, MEGAMM_NNODES_MAX="1")
    alone, together, train = done.asked
    doctor = "python3 -m megamm doctor train.seed=3 --preflight --config config.yaml --gpus 8"
    assert alone.endswith(doctor) and f"{doctor} --nnodes 1:2 --rendezvous n1:12225" in together
    assert train.endswith("train config.yaml train.seed=3 --nproc 8 --nnodes 1:1 --rendezvous n1:12224")
    assert "--nodelist=n1,n2" in train and "--no-kill" in train and "--ntasks-per-node=1" in train
    train = start("config.yaml", SLURM_NTASKS_PER_NODE="4", SLURM_JOB_NODELIST="n1", MEGAMM_PREFLIGHT="0").asked[0]
    assert train.endswith("python3 -m megamm train config.yaml --nproc 4") and "--no-kill" not in train


def test_one_task_a_rank(start):
    """Each task is an agent of one rank, with its share of CPUs and of the GPUs that the node's tasks all see."""
    site = {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "96", "MEGAMM_NNODES_MIN": "1"}
    alone, together, train = start("config.yaml", **site, SLURM_GPUS_PER_TASK="h100:1").asked
    assert all("--ntasks=2 --ntasks-per-node=1 " in doctor for doctor in (alone, together))
    assert "--ntasks=16 --ntasks-per-node=8 " in train and "--cpus-per-task=12 --gpus-per-node=8 " in train
    assert train.endswith("python3 -m megamm train config.yaml --nproc 1 --nnodes 8:16 --rendezvous n1:12224")
    own = re.search("bash -c (.*) _ python3", train)[1]
    variable = re.search(r"\w+_VISIBLE_DEVICES", own)[0]
    for visible, gpu in (({variable: "4,5,7"}, "7"), ({}, "2")):
        env = {"PATH": os.environ["PATH"], "SLURM_LOCALID": "2"} | visible
        assert subprocess.check_output(["bash", "-c", own, "_", "printenv", variable], env=env, text=True) == f"{gpu}\n"
    (train,) = start("config.yaml", **site, SLURM_GPUS_PER_TASK="1", MEGAMM_TASK_PER="node", MEGAMM_PREFLIGHT="0").asked
    assert "--ntasks=2 --ntasks-per-node=1 " in train and "--nproc 8 --nnodes 1:2" in train
    (train,) = start("config.yaml", MEGAMM_TASK_PER="rank", MEGAMM_PREFLIGHT="0", SLURM_JOB_NODELIST="n1").asked
    assert train.endswith("train config.yaml --nproc 1") and "bash -c" not in train


def test_containers(start, tmp_path):
    site = {"MEGAMM_CONTAINER_IMAGE": "/images/mm.sqsh", "MEGAMM_CONTAINER_MOUNTS": "/data:/data"}
    (train,) = start("config.yaml", **site, MEGAMM_PREFLIGHT="0").asked
    pyxis = "--container-image=/images/mm.sqsh --container-mounts=/data:/data --container-workdir="
    assert f"{pyxis}{tmp_path} python3 -m megamm train" in train
    (train,) = start("config.yaml", **site, MEGAMM_CONTAINER_RUNTIME="apptainer", MEGAMM_PREFLIGHT="0").asked
    inside = f"apptainer exec --nv --bind /data:/data --pwd {tmp_path} /images/mm.sqsh python3 -m megamm train"
    assert inside in train and "--container-image" not in train


def test_submitit_excludes_nodes(start, tmp_path):
    """submit.py's job, run as submitit does on the first node: evicted and bad nodes after the requeue."""
    for name, text in (("sbatch", "#!/bin/sh\necho Submitted batch job 7\n"), ("sinfo", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    shutil.copy(ROOT / "examples" / "cpu_tiny.yaml", tmp_path / "config.yaml")
    env = environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    sent = [sys.executable, SLURM / "submit.py", "config.yaml", "--nodes=2", "--minutes=60"]
    subprocess.run(sent, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=60)
    says = "srun: error: n2: task 1: Exited with exit code 4\nsrun: error: n1: task 0: Exited with exit code 75"
    of_job = {"SUBMITIT_EXECUTOR": "slurm", "MEGAMM_REQUEUE": "0", "SUBMITIT_PREEMPT_SIGNAL": "USR1"}
    started = [sys.executable, "-m", "submitit.core._submit", tmp_path / "slurm" / "%j"]
    for what, excluded in ((dict(SAYS=says, MEGAMM_PREFLIGHT="0"), "n2"), (dict(GOOD="n2"), "n1"), ({}, "")):
        done = start(command=started, code=75, **what, **of_job)
        update = [f"scontrol update JobId=7 ExcNodeList={excluded}"] if excluded else []
        asked = [line for line in done.asked if line.startswith("scontrol")]
        assert asked == ["scontrol requeue 7", *update], done.log


def test_sweeps(tmp_path):
    """A wrong value or two runs of one folder are rejected before anything is submitted."""

    def submit(*options):
        command = [sys.executable, SLURM / "submit.py", ROOT / "examples" / "cpu_tiny.yaml", *options]
        return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)

    wrong = submit("--sweep", "optimizer.lr=1e-3,high")
    assert wrong.returncode == 2 and "optimizer.lr" in wrong.stderr and len(wrong.stderr.splitlines()) == 1
    assert submit("--sweep", "optimizer.lr").stderr == (
        "error: invalid --sweep (optimizer.lr); write --sweep key=value,value\n"
    )
    assert "same output folder" in submit("--sweep", "train.seed=1,1").stderr
