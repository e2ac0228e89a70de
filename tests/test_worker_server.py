"""The folder of the data workers' sockets is removed, however the process that made it ends."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from tiny_run import environment, make_data, numbers, write_config

PROGRAM = """
import multiprocessing.forkserver, os, signal, sys
from megamm.common.processes import WORKERS_FOLDER, socket_folder
from megamm.data.pipeline import worker_server

def start():
    process = context.Process(target=print, args=("worked",))
    process.start()
    process.join()

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megamm.data.pipeline.worker_server"])
    os.environ[WORKERS_FOLDER] = socket_folder()
    start()
    if sys.argv[1] == "stop":
        multiprocessing.forkserver._forkserver._stop()
        start()
    print(socket_folder(), flush=True)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["exit", "stop", "kill"])
def test_no_folder_is_left(how):
    """stop: a server ends and another one replaces it, which needs the folder."""
    with tempfile.TemporaryDirectory() as folder:  # short: the path of a socket in it has at most 107 characters
        assert leaves_no_folder(Path(folder), how).parent == Path(folder)


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_long_path_of_temporary_files_is_not_used_for_sockets(tmp_path, how):
    """The kernel refuses a socket's path of 108 bytes: the truth is a worker that started (and `bind` below)."""
    folder = tmp_path / ("x" * (163 - len(str(tmp_path)) - 1))
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as one, pytest.raises(OSError, match="AF_UNIX path too long"):
        one.bind(str(folder / "s"))
    used = leaves_no_folder(folder, how)
    assert len(str(used)) < 75 and [path.name for path in folder.iterdir()] == ["program.py"]


LISTEN = """
import multiprocessing.connection
from megamm.common import processes
processes._SHORT_FOLDERS = ("/absent",)
print(processes.socket_folder())
multiprocessing.connection.Listener(family="AF_UNIX").close()
"""


@pytest.mark.parametrize("begin", ["", "ä"])
def test_the_longest_path_that_has_room(begin):
    """Python's own names are appended to it, by its own function; one byte more is one too many, in any encoding."""
    for length in (75, 76):
        with tempfile.TemporaryDirectory(dir="/tmp") as parent:
            folder = Path(parent, begin + "b" * (length - len(parent) - 1 - len(begin.encode())))
            folder.mkdir()
            env = environment() | {"TMPDIR": str(folder)}
            env.pop("XDG_RUNTIME_DIR", None)
            done = subprocess.run([sys.executable, "-c", LISTEN], env=env, capture_output=True, text=True, timeout=120)
            if length == 75:
                assert done.returncode == 0 and Path(done.stdout.strip()).parent == folder, done.stderr
            else:
                assert "a path of 76 bytes: too long" in done.stderr and "at most 75 bytes" in done.stderr


RANK = """
import multiprocessing.forkserver, os, signal
from megamm.common.processes import WORKERS_FOLDER, socket_folder

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["blocks"])
os.environ[WORKERS_FOLDER] = socket_folder()
semaphore = context.Semaphore()
multiprocessing.forkserver.ensure_running()
print(os.environ[WORKERS_FOLDER], semaphore._semlock.name, flush=True)
signal.pause()  # until it is killed
"""
SWEEP = """
import subprocess, sys
from megamm.common import processes

processes.adopt_orphans()
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(rank.stdout.readline(), processes.sweep())
"""


def test_a_fork_server_that_still_imports_leaves_nothing_when_it_is_swept(tmp_path):
    """On a slow node the import takes longer than anyone waits: the sweep removes the folder in its place."""
    os.mkfifo(tmp_path / "never")
    (tmp_path / "blocks.py").write_text(f"open({str(tmp_path / 'never')!r}).read()\n")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        env = environment() | {"TMPDIR": folder}
        env["PYTHONPATH"] = f"{tmp_path}:{env.get('PYTHONPATH', '')}"
        command = [sys.executable, "-c", SWEEP, RANK]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        sockets, semaphore, swept = done.stdout.split()
        assert Path(sockets).parent == Path(folder) and int(swept) == 3, done.stderr  # rank, fork server, tracker
        assert not list(Path(folder).iterdir()) and not Path(f"/dev/shm/sem.{semaphore.lstrip('/')}").exists()


@pytest.mark.everything
def test_a_run_with_a_long_path_of_temporary_files(tmp_path):
    """Two workers hand batches over by sockets of their own."""
    make_data(tmp_path)
    settings = {
        "data": {"workers": 2},
        "optimizer": {"warmup_steps": 0},
        "train": {"steps": 1},
        "resilience": {"max_restarts": 0},
    }
    config = write_config(tmp_path, tmp_path / "run", **settings)
    folder = tmp_path / ("x" * (163 - len(str(tmp_path)) - 1))
    folder.mkdir()
    command = [sys.executable, "-m", "megamm", "train", str(config)]
    env = environment() | {"TMPDIR": str(folder)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in numbers(tmp_path / "run")][:1] == [1]


def leaves_no_folder(tmp_path, how):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), how]
    env = environment() | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == (-9 if how == "kill" else 0) and not done.stderr
    *worked, folder = done.stdout.split()
    assert worked == ["worked"] * (2 if how == "stop" else 1)
    deadline = time.monotonic() + 60
    while os.path.exists(folder):
        assert time.monotonic() < deadline
    return Path(folder)
