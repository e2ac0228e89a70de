"""The forking process has one thread, whatever OpenBLAS would start: a fork copies only the calling thread."""

import os
import subprocess
import sys

import pytest
from documented_workshop import environment
from tiny_run import ROOT

THREADS = {"OPENBLAS_NUM_THREADS": "4"}
"""Environment of a machine with four cores and no settings; OpenBLAS never starts more threads than cores."""


def run(folder, *command):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=ROOT,
        env=environment(folder) | THREADS,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


COUNT = "from megamm.common import processes; from megamm.train import ranks; {}; print(len(processes.threads()))"


@pytest.mark.everything
@pytest.mark.parametrize(
    ("loads", "threads"),
    [
        ("ranks.preload({'device': 'cpu', 'engine': 'native'}, lambda check: None)", 1),
        ("import numpy", min(4, len(os.sched_getaffinity(0)))),
    ],
    ids=["fork server", "numpy"],
)
def test_what_a_rank_is_forked_from_has_one_thread(loads, threads, tmp_path):
    """The second case shows that the first can fail."""
    assert run(tmp_path, "-c", COUNT.format(loads)).split()[-1] == str(threads)


@pytest.mark.everything
def test_worlds_fork_where_no_number_of_threads_is_set(tmp_path):
    """The server asserts before each fork that it has one thread; tools/parity.py failed there."""
    assert "proven" in run(tmp_path, "tools/parity.py", "--case", "world=2 mix=mixed")
