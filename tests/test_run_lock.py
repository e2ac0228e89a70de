"""One job at a time in a run's folder: a second one is rejected while the first lives, and never afterwards."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest
from tiny_run import environment

from megamm.common.errors import UserError
from megamm.elastic import run_lock

HOLD = """
import sys; from pathlib import Path; from megamm.elastic import run_lock
assert run_lock.hold(Path(sys.argv[1]), sys.argv[2]) is not None
print("held", flush=True); sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Return a process that holds tmp_path/run for the job "first"."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), "first"]
    with subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(run_lock, "_PATIENCE", 0.0)


def test_another_job_is_refused_until_the_holder_has_ended(holder, tmp_path, at_once):
    run = tmp_path / "run"
    said = (
        rf"another job trains in this folder, process {holder.pid} on \S+ since 20.* UTC \({run}\); stop that job first"
    )
    for _ in range(2):
        with pytest.raises(UserError, match=said):
            run_lock.hold(run, "second")
    holder.kill()
    holder.wait()
    held = run_lock.hold(run, "second")
    assert held is not None
    os.close(held)


def test_one_that_is_ending_is_waited_for(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock.time, "sleep", lambda _: holder.kill() or holder.wait())
    held = run_lock.hold(tmp_path / "run", "second")
    assert held is not None
    os.close(held)


def test_nodes_of_the_job_share_it(holder, tmp_path):
    assert run_lock.hold(tmp_path / "run", "first") is None


def test_a_holder_that_told_nothing(holder, tmp_path, at_once):
    (tmp_path / "run" / run_lock.LOCK).write_text("")
    with pytest.raises(UserError, match="process None on None "):
        run_lock.hold(tmp_path / "run", "second")


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", none)
    assert run_lock.hold(tmp_path / "run", "first") is None
    assert "([Errno 95] Operation not supported): a second job could use it" in caplog.text
