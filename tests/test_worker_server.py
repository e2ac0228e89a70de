"""The folder of the data workers' sockets is removed, however the process that made it ends."""

import multiprocessing
import multiprocessing.connection
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from tiny_run import environment, make_data, numbers, write_config

from megamm.common import processes
from megamm.common.errors import UserError

PROGRAM = """
import multiprocessing.forkserver, os, signal, sys
from megamm.common.processes import socket_folder
from megamm.data.pipeline import worker_server

def start():
    process = context.Process(target=print, args=("worked",))
    process.start()
    process.join()

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megamm.data.pipeline.worker_server"])
    os.environ[worker_server.FOLDER] = socket_folder()
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


def test_the_longest_path_that_has_room(tmp_path, monkeypatch):
    """Python's own names are appended to it, by its own function; one byte more is one too many, in any encoding."""
    monkeypatch.setattr(processes, "_SHORT_FOLDERS", (str(tmp_path / "absent"),))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    for length, begin in ((75, ""), (75, "ä"), (76, ""), (76, "ä")):
        parent = tempfile.mkdtemp(dir="/tmp")
        folder = f"{parent}/{begin}{'b' * (length - len(parent) - 1 - len(begin.encode()))}"
        os.mkdir(folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)
        if length == 75:
            assert processes.socket_folder().startswith(folder)
            multiprocessing.connection.Listener(family="AF_UNIX").close()
        else:
            with pytest.raises(UserError, match=r"a path of 76 bytes: too long.*at most 75 bytes"):
                processes.socket_folder()
        assert tempfile.gettempdir() == folder
        shutil.rmtree(parent)


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
