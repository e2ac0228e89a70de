"""A real Slurm on this machine: a controller and a few nodes on loopback, for the duration of a `with Cluster()`.

Every node looks like a separate host to its programs: host name nX, address 127.0.0.X, own processes and mounts
(namespaces(7)), two GPUs (empty device files). Killing its first process is a power cut. All files are in one
temporary folder; all processes end with the one that started them. It needs root and Debian's packages slurm-wlm and
munge; it installs nothing. Slurm's times are short here: see slurm.conf(5) for the meaning of each.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ports import free_port

NODES = ("n1", "n2", "n3", "n4")
ADDRESSES = {name: f"127.0.0.{11 + i}" for i, name in enumerate(NODES)}
GPUS, CPUS = 2, 64
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "munged", "unshare", "setpriv", "nsenter")
_NAMESPACES = ("--uts", "--pid", "--mount", "--fork", "--mount-proc", "--propagation", "private")
_WITH_US = ("setpriv", "--pdeathsig", "KILL")
START_SECONDS = 30

CONF = """
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
# Ports of jobs follow from their numbers: those of clusters side by side shall differ.
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# The default life of a credential, 120 s, is how long a requeued job waits.
AuthInfo=socket={root}/munge.socket,cred_expire=5
# Several daemons share ports here, on addresses of their own.
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,requeue_setup_env_fail
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
SlurmctldTimeout=30
MessageTimeout=5
TCPTimeout=2
KillWait=15
UnkillableStepTimeout=20
MinJobAge=3600
JobRequeue=1
GresTypes=gpu
NodeName=n[1-{nodes}] NodeAddr=127.0.0.[11-{last}] Port={node} CPUs={cpus} Boards=1 SocketsPerBoard=2 \
CoresPerSocket={half} ThreadsPerCore=1 RealMemory=2000000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""

# With NoInAddrAny srun listens on its host name's address, 127.0.0.X; the peer sees 127.0.0.1 as the source of the
# connection, and calls back there.
SRUN = """#!/bin/sh
exec unshare --uts sh -c 'hostname localhost && exec {root}/bin/srun.real "$@"' srun "$@"
"""

# The first process of a node.
INIT = """#!/bin/sh -e
hostname "$1"
mount --bind {root}/hosts /etc/hosts
mount --bind {root}/bin/srun /usr/bin/srun
export SLURM_CONF={root}/slurm.conf
while :; do slurmd -D -N "$1" || sleep 1; done
"""


def why_not() -> str:
    """Return why there can be no cluster here; "" if there can."""
    if os.geteuid():
        return "a Slurm of one's own needs root"
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"{', '.join(missing)} not found: apt-get install slurm-wlm munge"
    tried = subprocess.run(["unshare", *_NAMESPACES, "true"], capture_output=True, text=True)
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else ""


class Cluster:
    """Started by `with`; jobs are submitted with `sbatch`, from `env`."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.env = {"SLURM_CONF": str(self.root / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []
        self._nodes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._configure()
            self._spawn("munged", *self._munge_files())
            self.until(lambda: (self.root / "munge.socket").exists(), "munged")
            self._spawn("slurmctld", "-D", "-f", self.env["SLURM_CONF"])
            for name in NODES:
                self.start(name)
            self.until(lambda: self.idle() == list(NODES), "all nodes idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self._nodes.values(), *reversed(self._daemons)]:
            process.kill()
            process.wait()
        shutil.rmtree(self.root)

    # --- nodes ---

    def start(self, name: str) -> None:
        """Power the node on."""
        command = ["unshare", *_NAMESPACES, "--kill-child=KILL", str(self.root / "bin" / "init"), name]
        self._nodes[name] = self._open(command, name)

    def cut(self, name: str) -> None:
        """Power the node off: every process of it ends at once."""
        process = self._nodes.pop(name)
        process.kill()
        process.wait()

    def run_on(self, name: str, *command: str) -> None:
        """Run a command as root of the node."""
        init = self._nodes[name].pid
        child = Path(f"/proc/{init}/task/{init}/children").read_text().split()[0]
        subprocess.run(["nsenter", "--target", child, "--mount", "--uts", "--pid", *command], check=True)

    def idle(self) -> list[str]:
        """Return the idle nodes."""
        return sorted(self("sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", "--format=%N").split())

    # --- jobs ---

    def __call__(self, *command: object, **options: object) -> str:
        """Return the output of a Slurm command."""
        env = options.pop("env", {**os.environ, **self.env})
        words = [str(word) for word in command]
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, **options)
        return done.stdout.strip() if done.returncode == 0 else f"error: {done.stderr.strip()}"

    def job(self, number: str) -> dict[str, str]:
        """Return the job's record: scontrol's names and values."""
        words = self("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, *states: str, seconds: float = 300) -> dict[str, str]:
        """Return its record once it is in one of the states; by default in a final one."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        return self.until(lambda: (job := self.job(number)).get("JobState") in wanted and job, f"job {number}", seconds)

    def until(self, what: Callable[[], Any], name: str, seconds: float = START_SECONDS) -> Any:
        """Return the first true value of what()."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < deadline, f"{name}: not after {seconds} s\n{self('squeue')}\n{self.logs()}"
            time.sleep(0.2)
        return found

    # --- inside ---

    def logs(self) -> str:
        """Return the last lines of every daemon's log."""
        files = sorted((self.root / "log").iterdir())
        return "\n".join(f"== {file.name}\n" + "\n".join(file.read_text().splitlines()[-8:]) for file in files)

    def _open(self, command: list[str], name: str) -> subprocess.Popen:
        with (self.root / "log" / f"{name}.out").open("a") as log:
            env = {**os.environ, **self.env}
            return subprocess.Popen([*_WITH_US, *command], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _spawn(self, *command: str) -> None:
        self._daemons.append(self._open(list(command), command[0]))

    def _munge_files(self) -> list[str]:
        (self.root / "munge").mkdir(mode=0o700)
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = {"key-file": key, "pid-file": key.with_name("pid"), "log-file": key.with_name("log")}
        files |= {"seed-file": key.with_name("seed"), "socket": self.root / "munge.socket"}
        return ["--foreground", *(f"--{option}={path}" for option, path in files.items())]

    def _configure(self) -> None:
        root = self.root
        root.chmod(0o755)  # required by munged
        for name in ("log", "state", "bin", "dev", *(f"spool/{node}" for node in NODES)):
            (root / name).mkdir(parents=True)
        lines = [Path("/etc/hosts").read_text(), *(f"{address} {name}\n" for name, address in ADDRESSES.items())]
        (root / "hosts").write_text("".join(lines))
        values = {"root": root, "host": socket.gethostname().partition(".")[0], "nodes": len(NODES), "cpus": CPUS}
        values |= {"controller": free_port(), "node": free_port(*ADDRESSES.values())}
        # A port is used again after 625 jobs. Processes that start one after the other, like workers of pytest, are at
        # least 20 jobs apart in this way.
        values |= {"first_job": 1 + os.getpid() * 43 % 60000}
        values |= {"last": 10 + len(NODES), "half": CPUS // 2, "gpus": GPUS}
        (root / "slurm.conf").write_text(CONF.format(**values))
        for i in range(GPUS):
            os.mknod(root / "dev" / f"nvidia{i}", 0o666 | 0o020000, os.makedev(1, 3))
        gres = f"NodeName=n[1-{len(NODES)}] Name=gpu File={root}/dev/nvidia[0-{GPUS - 1}]\n"
        (root / "gres.conf").write_text(gres)
        shutil.copy2("/usr/bin/srun", root / "bin" / "srun.real")
        for name, text in (("srun", SRUN), ("init", INIT)):
            (root / "bin" / name).write_text(text.format(root=root))
            (root / "bin" / name).chmod(0o755)
