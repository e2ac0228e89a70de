"""Commands forked from a process that has imported megamm behave like those of a new interpreter."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import warm
from warm import environment

PROGRAM = """
import json, logging, os, signal, sys
print(json.dumps({
    "argv": sys.argv, "folder": os.getcwd(), "variables": dict(os.environ), "main": __name__,
    "files": sorted(os.listdir("/proc/self/fd"))[:3], "path": sys.path[:3], "handlers": len(logging.root.handlers),
    "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE)],
    "threads": len(os.listdir("/proc/self/task")), "session": os.getsid(0) == os.getpid(),
    "command": open("/proc/self/cmdline").read().rstrip(chr(0)).split(chr(0)),
}))
print(input(), file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def program(tmp_path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def both(command, **options):
    """Return the results of a fork and of a new interpreter, after a check that the command can be forked."""
    assert warm.unlike(command, {key: value for key, value in options.items() if key != "input"}) == ""
    common = {"capture_output": True, "text": True}
    return warm.run(command, **common, **options), subprocess.run(list(map(str, command)), **common, **options)


@pytest.mark.parametrize("new_session", [False, True])
def test_a_script_sees_what_it_would_see(program, tmp_path, new_session):
    command = [sys.executable, program, 7, "more"]
    env = environment() | {"MEGAMM_FAULTS_FOLDER": "x", "PYTHONPATH": f"{tmp_path}:{environment()['PYTHONPATH']}"}
    forked, cold = both(command, env=env, cwd=tmp_path, input="a line\n", start_new_session=new_session)
    assert forked.returncode == cold.returncode == 7
    assert forked.stdout == cold.stdout
    assert forked.stderr == cold.stderr == "a line\n"


def test_a_command_ends_as_it_would(tmp_path):
    command = [sys.executable, "-m", "megamm", "train", tmp_path / "none.yaml"]
    forked, cold = both(command, env=environment())
    assert (forked.returncode, forked.stdout, forked.stderr) == (cold.returncode, cold.stdout, cold.stderr)
    assert forked.returncode == 2


def test_signals_and_status(tmp_path):
    (tmp_path / "wait.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(100)\n")
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV):
        command = [sys.executable, tmp_path / "wait.py"]
        process = warm.start(command, env=environment(), stdout=subprocess.PIPE, text=True)
        assert isinstance(process, warm.WarmPopen) and process.stdout.readline() == "up\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
        process.send_signal(number)
        assert process.wait(timeout=60) == -number
        assert not psutil.pid_exists(process.pid)


def test_the_hook_of_a_pythonpath_runs(tmp_path):
    """It runs as at the start of a new interpreter (faults.py)."""
    (tmp_path / "sitecustomize.py").write_text("import os\nos.environ['HOOKED'] = 'yes'\n")
    (tmp_path / "told.py").write_text("import os\nprint(os.environ.get('HOOKED'))\n")
    env = environment()
    for path, told in ((f"{tmp_path}:{env['PYTHONPATH']}", "yes\n"), (env["PYTHONPATH"], "None\n")):
        command = [sys.executable, tmp_path / "told.py"]
        forked, cold = both(command, env=env | {"PYTHONPATH": path})
        assert forked.stdout == cold.stdout == told


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "HF_HOME", "PYTHONHASHSEED", "SOMETHING_NEW"])
def test_another_environment_is_a_cold_start(program, name):
    assert name in warm.unlike([sys.executable, program], {"env": environment() | {name: "3"}})
    assert not warm.unlike([sys.executable, program], {"env": environment()})


@pytest.mark.parametrize("command", [[sys.executable, "-c", "pass"], [sys.executable, "-S", "x.py"], ["ls", "x"]])
def test_other_commands_are_cold_starts(command):
    assert warm.unlike(command, {"env": environment()})


@pytest.mark.everything
def test_the_server_takes_what_it_has_forked_along(tmp_path):
    (tmp_path / "wait.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(100)\n")
    program = f"""
import subprocess, sys, warm
process = warm.start([sys.executable, {str(tmp_path / "wait.py")!r}], env=warm.environment(), stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, warm.server().process.pid, flush=True)
sys.stdin.read()
"""
    env = environment() | {"PYTHONPATH": f"{Path(warm.__file__).parent}:{environment()['PYTHONPATH']}"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], env=env, **pipes) as session:
        pids = list(map(int, session.stdout.readline().split()))
        assert len(pids) == 2
        session.kill()
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline
