"""The writer process alone: killed at every change to the file system, at random times, or one of two writers.

After each kill the newest checkpoint is the previous one or the new one, complete; the next save works and cleans up.
"""

import errno
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megamm import checkpoint
from megamm.checkpoint import files, writer, writer_client
from megamm.checkpoint import folder as folders
from megamm.checkpoint.writer_client import WriterProcess
from megamm.common import events

FAULTS = Path(__file__).parent / "lib" / "writer_faults.py"
SIZE = 3 * mmap.PAGESIZE + 64
"""Bytes of a staged file: its end is written through the page cache, the rest with O_DIRECT."""


@pytest.fixture
def memory():
    """Return shared memory with a staged file."""
    descriptor = os.memfd_create("image")
    os.write(descriptor, random.Random(1).randbytes(SIZE))
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def faulty(monkeypatch):
    """Make writers that start from now on kill themselves at a call (0: never), and list calls in a file."""

    def set_up(kill_at: int, trace: Path | None = None) -> None:
        monkeypatch.setattr(writer_client, "COMMAND", (sys.executable, str(FAULTS)))
        monkeypatch.setenv("KILL_AT", str(kill_at))
        if trace is not None:
            monkeypatch.setenv("TRACE", str(trace))

    yield set_up


def _start(memory: int) -> WriterProcess:
    return WriterProcess(memory, SIZE)


def _save(writer: WriterProcess, run: Path, step: int, rank: int = 0, world: int = 1, attempt: str = "") -> None:
    job = {
        "kind": "save",
        "run": str(run),
        "step": step,
        "keep": 1,
        "keep_best": False,
        "attempt": attempt or f"{id(writer)}-{step:06d}",
    }
    contents = {f"rng_{rank:05d}.safetensors": b"r" * 100} | (
        {} if rank else {"state.json": b"{}", "tensors/.metadata": b"i"}
    )
    answers = ["written"] if rank else ["written", "published"]
    writer.send(
        job | {"bytes": SIZE, "rank": rank, "world": world, "stall": 0.0, "staged": "", "answers": answers}, contents
    )


def _until_done(writer: WriterProcess, last: str) -> dict | None:
    """Return its answer of this kind; None if it ended before."""
    try:
        while True:
            for answer in writer.answers(30):
                if answer["kind"] == last:
                    return answer
    except EOFError:
        return None


def _newest(run: Path) -> int:
    found = checkpoint.newest(run)
    return int(found.name[5:]) if found else 0


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture
def healthy(memory):
    """Return a writer without faults."""
    writer = _start(memory)
    yield writer
    writer.close(10)


@pytest.mark.parametrize(
    "kind",
    [
        "next step",
        pytest.param("same step again", marks=pytest.mark.everything),
        pytest.param("same step, names cannot be exchanged", marks=pytest.mark.everything),
    ],
)
def test_killed_at_every_change(memory, faulty, healthy, tmp_path, monkeypatch, kind):
    same_step = kind != "next step"
    if "cannot" in kind:
        monkeypatch.setenv("NO_EXCHANGE", "1")
    kill_at, outcomes, ended = 0, set(), False
    while not ended:
        kill_at += 1
        run = tmp_path / str(kill_at)
        _save(healthy, run, 1)
        assert _until_done(healthy, "published")["error"] is None
        faulty(kill_at)
        writer = _start(memory)
        _save(writer, run, 1 if same_step else 2)
        ended = _until_done(writer, "published") is not None
        writer.close(10)
        outcomes.add(_newest(run))
        if _newest(run):
            checkpoint.verify(run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip())
        _save(healthy, run, 3)
        assert _until_done(healthy, "published")["error"] is None
        assert _newest(run) == 3 and _names(run) == ["latest", "step_00000003"], f"{kill_at}: {_names(run)}"
    assert kill_at > 35
    # A file system that cannot exchange names has a moment with neither.
    assert outcomes == ({1, 2} if not same_step else {0, 1} if "cannot" in kind else {1})


def test_a_name_implies_contents(memory, faulty, tmp_path):
    """All files and names in a folder are synced before it is renamed, so power loss leaves a valid state."""
    faulty(0, tmp_path / "trace")
    writer = _start(memory)
    _save(writer, tmp_path / "run", 1)
    assert _until_done(writer, "published")["error"] is None
    writer.close(10)
    unsynced: set[str] = set()
    for call, path, other in map(json.loads, (tmp_path / "trace").read_text().splitlines()):
        parent = str(Path(path).parent)
        if call in ("write", "mkdir", "unlink"):
            unsynced |= {path} if call == "write" else {parent}
        elif call == "open" and Path(path).is_file():
            unsynced.add(parent)
        elif call == "fsync":
            unsynced.discard(path)
        elif call == "rename" and "step_" in Path(other).name:
            assert not [left for left in unsynced if left.startswith(path + "/") or left == path]
            final = Path(other)
            unsynced.add(str(final.parent))
    assert str(final.parent) not in unsynced, "the new name must be synced, too"


@pytest.mark.everything
def test_200_random_kills(memory, tmp_path):
    """A writer saves repeatedly; every kill leaves the previous checkpoint or the next one, complete."""
    draw, step = random.Random(3), 0
    for _ in range(200):
        step += 1
        writer = _start(memory)
        _save(writer, tmp_path, step)
        assert _until_done(writer, "published")["error"] is None
        for _ in range(3):  # enough for the time
            _save(writer, tmp_path, step + 1, attempt=f"{draw.random()}-{step + 1:06d}")
        killer = threading.Timer(draw.uniform(0, 0.03), os.kill, [writer.process.pid, signal.SIGKILL])
        killer.start()
        assert _until_done(writer, "never") is None
        writer.close(0)
        found = _newest(tmp_path)
        assert found in (step, step + 1), f"{found} after {step} was published"
        step = found


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.everything)])
def test_one_of_two_ranks_is_killed_at_every_change(memory, faulty, healthy, tmp_path, killed):
    kill_at, ended = 0, False
    while not ended:
        kill_at += 1
        run = tmp_path / str(kill_at)
        faulty(kill_at)
        writers = {killed: _start(memory), 1 - killed: healthy}
        for rank in (0, 1):
            _save(writers[rank], run, 2, rank, world=2, attempt="a-000001")
        ended = _until_done(writers[killed], "written" if killed else "published") is not None
        if killed == 1 and not ended:
            (run / "checkpoints").mkdir(parents=True, exist_ok=True)
            give_up(run)
        if killed == 1:
            answer = _until_done(writers[0], "published")
            assert (answer["error"] is None) or (not ended and "ended with signal 9" in answer["error"])
        else:
            assert _until_done(healthy, "written")["error"] is None
        writers[killed].close(10)
        assert _newest(run) in (0, 2)
        assert killed == 0 or _newest(run) == (2 if answer["error"] is None else 0)
    assert _newest(run) == 2


def test_a_rank_ahead_of_the_first_loses_nothing(memory, tmp_path):
    """With local storage saves do not wait for each other: rank 1 may finish its part of step 2 before rank 0."""
    first, second = _start(memory), _start(memory)
    for step in (1, 2):
        _save(second, tmp_path, step, 1, world=2, attempt=f"a-{step:06d}")
        assert _until_done(second, "written")["error"] is None
    for step in (1, 2):
        _save(first, tmp_path, step, world=2, attempt=f"a-{step:06d}")
        assert _until_done(first, "published")["error"] is None
        assert _newest(tmp_path) == step
    first.close(10)
    second.close(10)


def test_a_rank_that_ends_does_not_wait_for_those_that_are_lost(memory, tmp_path):
    """It waits only for writers that are nearly done. Leftovers are removed by the next launch."""
    _save(healthy_other := _start(memory), tmp_path, 1, 1, world=2, attempt="a-000001")
    assert _until_done(healthy_other, "written")["error"] is None
    for step, wanted in ((1, 1), (2, 1)):
        first = _start(memory)
        _save(first, tmp_path, step, world=2, attempt=f"a-{step:06d}")
        begin = time.monotonic()
        first.close(30)
        assert time.monotonic() - begin < 15 and _newest(tmp_path) == wanted  # half of the wait for others
    healthy_other.close(10)
    assert any(".tmp-" in name for name in _names(tmp_path))
    first = _start(memory)
    _save(first, tmp_path, 2, attempt="b-000001")
    assert _until_done(first, "published")["error"] is None and _names(tmp_path) == ["latest", "step_00000002"]
    first.close(10)


def give_up(run: Path) -> None:
    """Do what rank 1 does when it learns that its writer is gone."""
    from megamm.checkpoint.writer import SaveAttempt

    job = {
        "run": str(run),
        "step": 2,
        "attempt": "a-000001",
        "rank": 1,
        "world": 2,
        "keep": 1,
        "stall": 0.0,
        "bytes": SIZE,
    }
    SaveAttempt(job).give_up("the writer process ended with signal 9")


def test_events_tell_of_the_save(memory, tmp_path):
    writer = _start(memory)
    _save(writer, tmp_path, 7)
    done = _until_done(writer, "published")
    writer.close(10)
    (event,) = events.read(tmp_path)
    assert (event["kind"], event["step"], event["tier"]) == ("saved", 7, "run")
    assert event["bytes"] == done["bytes"] > SIZE and event["seconds"] > 0


def test_a_rank_without_space_for_a_word_is_not_waited_for(tmp_path, monkeypatch):
    job = {"run": str(tmp_path), "step": 3, "attempt": "a-000001", "world": 2}
    plain = files.write

    def full(path, pieces):
        plain(path, [])
        if list(pieces):
            raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(OSError, match="no space"):
        writer.SaveAttempt(job | {"rank": 1}).write_own(memoryview(b"x"), {})
    monkeypatch.setattr(files, "write", plain)
    first = writer.SaveAttempt(job | {"rank": 0})
    first.write_own(memoryview(b"y"), {})
    begin = time.monotonic()
    with pytest.raises(OSError, match="rank 1: no space left for an error message"):
        first.publish()
    assert time.monotonic() - begin < 5 and not list((tmp_path / "checkpoints").iterdir())


def test_it_ignores_the_signals_of_a_terminal_and_a_scheduler(memory, tmp_path):
    writer = _start(memory)
    _save(writer, tmp_path, 1)
    assert _until_done(writer, "published")["error"] is None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        os.kill(writer.process.pid, number)
    _save(writer, tmp_path, 2)
    assert _until_done(writer, "published")["error"] is None
    writer.close(10)
    assert writer.process.returncode == 0 and folders.all_of(tmp_path) == [checkpoint.path_of(tmp_path, 2)]


def test_it_ends_with_its_rank():
    """A rank killed with -9 closes nothing itself; the pipe is held open here."""
    program = f"""
import os, sys
from megamm.checkpoint.writer_client import WriterProcess
memory = os.memfd_create("image"); os.ftruncate(memory, {SIZE})
writer = WriterProcess(memory, {SIZE})
os.dup2(writer.process.stdin.fileno(), 100, inheritable=True)
os.spawnv(os.P_NOWAIT, "/bin/sleep", ["sleep", "30"])
writer.send({{"kind": "constant"}}, {{}})
print(writer.process.pid, flush=True)
sys.stdin.read()
"""
    rank = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    children = []
    try:
        writer = psutil.Process(int(rank.stdout.readline()))
        children = psutil.Process(rank.pid).children()
        _wait_for_signals(writer.pid)
        rank.kill()
        writer.wait(timeout=10)
    except psutil.NoSuchProcess:
        pass
    finally:
        rank.kill()
        rank.wait()
        for child in children:
            if child.is_running() and child.name() == "sleep":
                child.kill()


def _wait_for_signals(pid: int) -> None:
    """Wait until the writer has set up its signals, which it does after setting its parent-death signal."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        status = Path(f"/proc/{pid}/status").read_text()
        ignored = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)
        if ignored & 1 << (signal.SIGTERM - 1):
            return
        time.sleep(0.01)
    raise AssertionError("the writer did not start")
