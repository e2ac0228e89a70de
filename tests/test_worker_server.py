"""The folder of the data workers' sockets is removed, however the process that made it ends."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from warm import environment

PROGRAM = """
import multiprocessing.forkserver, multiprocessing.util, os, signal, sys
from megamm.data.pipeline import worker_server

def start():
    process = context.Process(target=print, args=("worked",))
    process.start()
    process.join()

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megamm.data.pipeline.worker_server"])
    os.environ[worker_server.FOLDER] = multiprocessing.util.get_temp_dir()
    start()
    if sys.argv[1] == "stop":
        multiprocessing.forkserver._forkserver._stop()
        start()
    print(multiprocessing.util.get_temp_dir(), flush=True)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["exit", "stop", "kill"])
def test_no_folder_is_left(how):
    """stop: a server ends and another one replaces it, which needs the folder."""
    with tempfile.TemporaryDirectory() as folder:  # short: the path of a socket in it has at most 107 characters
        leaves_no_folder(Path(folder), how)


def leaves_no_folder(tmp_path, how):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), how]
    env = environment() | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == (-9 if how == "kill" else 0) and not done.stderr
    *worked, folder = done.stdout.split()
    assert worked == ["worked"] * (2 if how == "stop" else 1)
    assert Path(folder).parent == tmp_path
    deadline = time.monotonic() + 60
    while os.path.exists(folder):
        assert time.monotonic() < deadline
