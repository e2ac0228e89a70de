"""`megamm runs` and `megamm attach`: a run's state read from its folder, and a run followed to its end."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import warm
from faults import environment as with_faults
from tiny_run import environment, make_data, megamm, write_config

from megamm.common import events
from megamm.elastic import heartbeat
from megamm.observability import metrics
from megamm.observability.report import runs

NOW = 1_000_000.0


def write(
    run: Path, told: list[tuple[float, str, dict]], beats: list[tuple[float, str, int]] = (), attempt: int = 0
) -> Path:
    """Write events (seconds before NOW, kind, fields), and a heartbeat per rank (seconds before NOW, phase, step)."""
    (run / heartbeat.HEARTBEATS).mkdir(parents=True)
    lines = [{"time": NOW - ago, "kind": kind} | fields for ago, kind, fields in told]
    (run / events.EVENTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for rank, (ago, phase, step) in enumerate(beats):
        beat = heartbeat.Beat(rank, 1, f"host-{rank}", phase, step, 9, NOW - ago, attempt)
        (run / heartbeat.HEARTBEATS / f"node_{rank:05d}.json").write_text(json.dumps(vars(beat)))
    return run


def add_lines(run: Path, steps: int, step_seconds: float, target: int = 100) -> None:
    lines = [
        {"step": s, "steps": 1, "step_seconds": step_seconds, "loss/text": 9.0 - s, "loss/image": None, "time": NOW}
        for s in range(1, steps + 1)
    ]
    (run / metrics.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "metrics.prom").write_text(f'megamm_step{{run="x"}} 3.0\nmegamm_target_steps{{run="x"}} {float(target)}\n')


LAUNCHED = (900.0, "launched", {"attempt": 0, "ranks": 2})
STARTED = (880.0, "started", {"step": 0, "world": 2})
FAILED = {"attempt": 0, "step": 3, "phase": "step", "rank": 1, "cause": "killed by SIGKILL"}
STEPPING = [(1.0, "step", 3), (2.0, "data", 3)]


@pytest.mark.parametrize(
    ("told", "beats", "state", "why"),
    [
        ([(30.0, *LAUNCHED[1:])], [], "waiting", "launched, no step yet"),
        ([LAUNCHED], [(5.0, "start", 0), (5.0, "start", 0)], "waiting", "launched, no step yet"),
        ([LAUNCHED], [], "silent", "no heartbeat"),
        ([LAUNCHED, STARTED], STEPPING, "running", "in step"),
        ([LAUNCHED, STARTED, (9.0, "saved", {"step": 3})], STEPPING, "running", "in step"),
        ([LAUNCHED, STARTED], [(1.0, "step", 3), (100.0, "step", 3)], "silent", "rank 1 on host-1, in step"),
        ([LAUNCHED, STARTED], [(100.0, "save", 3), (100.0, "save", 3)], "running", "in save"),
        ([LAUNCHED, STARTED], [(700.0, "save", 3), (700.0, "save", 3)], "silent", "rank 0 on host-0, in save"),
        ([LAUNCHED, STARTED, (5.0, "failed", FAILED)], STEPPING, "waiting", "for a restart after: killed by SIGKILL"),
        ([LAUNCHED, STARTED, (5.0, "failed", FAILED), (2.0, "restarting", {})], STEPPING, "waiting", "restarting"),
        (
            [LAUNCHED, STARTED, (5.0, "evicted", {"why": "slow"})],
            STEPPING,
            "waiting",
            "for a restart after: evicted: slow",
        ),
        ([LAUNCHED, STARTED, (700.0, "failed", FAILED)], STEPPING, "failed", "killed by SIGKILL"),
        ([LAUNCHED, STARTED, (5.0, "failed", FAILED | {"cause": "error: x; y"})], STEPPING, "failed", "error: x; y"),
        ([LAUNCHED, (5.0, "gave_up", {"why": "3 failures"})], STEPPING, "failed", "gave up: 3 failures"),
        ([LAUNCHED, STARTED, (5.0, "signal", {"signal": "SIGUSR1"})], STEPPING, "stopping", "SIGUSR1"),
        (
            [LAUNCHED, STARTED, (5.0, "signal", {"signal": "SIGUSR1"}), (4.0, "failed", FAILED)],
            STEPPING,
            "failed",
            "killed by SIGKILL",
        ),
        (
            [LAUNCHED, STARTED, (5.0, "signal", {"signal": "SIGTERM"})],
            [(1.0, "end", 4), (1.0, "end", 4)],
            "stopped",
            "SIGTERM: run it again to continue",
        ),
        ([LAUNCHED, STARTED, (5.0, "finished", {"step": 100})], [(5.0, "end", 100)], "done", "finished"),
        # A single process without an agent records neither a launch nor an end.
        ([STARTED], [(5.0, "end", 100)], "done", "all ranks ended"),
        ([STARTED], [(5.0, "end", 40)], "stopped", "run it again"),
        # With an agent, wait for its report, unless it has been killed meanwhile.
        ([LAUNCHED, STARTED], [(5.0, "end", 100)], "running", "in end"),
        ([LAUNCHED, STARTED], [(200.0, "end", 100)], "done", "all ranks ended"),
        # The next launch of a stopped run.
        ([LAUNCHED, (800.0, "signal", {"signal": "SIGTERM"}), (5.0, "launched", {})], STEPPING, "waiting", "launched"),
    ],
)
def test_state_by_the_folder_alone(tmp_path, told, beats, state, why):
    run = write(tmp_path / "run", told, beats)
    add_lines(run, 3, step_seconds=1.0)
    found = runs.status(run, NOW)
    assert (found.state, why in found.why) == (state, True), found
    assert (found.step, found.steps, found.losses) == (3, 100, {"text": 6.0, "image": None})
    assert found.age == (max(ago for ago, *_ in beats) if beats else None)
    assert found.log == str(run / events.EVENTS)


def test_silence_is_measured_by_the_runs_own_steps(tmp_path):
    """100 s without a report are silence if a step takes one second, and not if it takes fifty."""
    run = write(tmp_path / "run", [LAUNCHED, STARTED], [(100.0, "step", 3)])
    for step_seconds, state in ((1.0, "silent"), (50.0, "running")):
        add_lines(run, 3, step_seconds)
        assert runs.status(run, NOW).state == state


def test_ranks_of_an_earlier_larger_launch_do_not_count(tmp_path):
    run = write(tmp_path / "run", [LAUNCHED, STARTED], STEPPING)
    stale = heartbeat.Beat(7, 1, "gone", "step", 2, 9, NOW - 5000, 3)
    (run / heartbeat.HEARTBEATS / "node_00007.json").write_text(json.dumps(vars(stale)))
    add_lines(run, 3, 1.0)
    assert runs.status(run, NOW).state == "running"


def test_runs_are_found_below_folders(tmp_path):
    for name in ("a/one", "a/b/two", "three"):
        write(tmp_path / name, [LAUNCHED])
    (tmp_path / "a" / "one" / "checkpoints" / "x").mkdir(parents=True)
    (tmp_path / "a" / "one" / "checkpoints" / "x" / events.EVENTS).touch()
    (tmp_path / "a" / "one" / "slurm-7.log").write_text("here\n")
    found = runs.find([tmp_path, tmp_path / "a"])
    assert sorted(found) == [tmp_path / name for name in ("a/b/two", "a/one", "three")]
    assert runs.status(tmp_path / "a" / "one", NOW).log.endswith("slurm-7.log")


def test_wrong_folders_are_one_line(tmp_path):
    for command, what in (("runs", "no such folder"), ("attach", "no such folder")):
        done = megamm(command, tmp_path / "none")
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and what in done.stderr
    done = megamm("attach", tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and "no events" in done.stderr
    assert megamm("runs", tmp_path).stdout == "no runs found\n"


def test_tail_of_a_file_that_is_replaced_and_cut(tmp_path):
    """A restart rewrites the metrics without the last lines; a kill leaves half a line."""
    path = tmp_path / "x.jsonl"
    tail = runs.Tail(path)
    assert tail.read() == []
    path.write_text("".join(json.dumps({"time": t}) + "\n" for t in (1.0, 2.0, 3.0)) + '{"ti')
    assert [line["time"] for line in tail.read()] == [1.0, 2.0, 3.0]
    with path.open("a") as file:
        file.write('me": 3.5}\n')
    assert [line["time"] for line in tail.read()] == [3.5]
    new = tmp_path / "new"
    new.write_text("".join(json.dumps({"time": t}) + "\n" for t in (1.0, 2.0, 4.0)))
    new.replace(path)
    assert [line["time"] for line in tail.read()] == [4.0]
    assert tail.read() == []


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """Return a run with one killed rank, followed from its first event: (output, JSON lines, attach's exit code)."""
    folder = tmp_path_factory.mktemp("followed")
    make_data(folder)
    config = write_config(folder, folder / "run", train={"steps": 6}, checkpoint={"every": 2})
    command = [sys.executable, "-m", "megamm"]
    env = with_faults("sigkill@step:4:0:0", environment())
    run = warm.start([*command, "train", str(config)], env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "run" / events.EVENTS).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    follower = warm.run(
        [*command, "attach", str(folder / "run"), "--json"], env=environment(), capture_output=True, text=True
    )
    _, error = run.communicate()
    assert run.returncode == 0, error.decode()
    return folder / "run", [json.loads(line) for line in follower.stdout.splitlines()], follower.returncode


def test_attach_tells_everything_once_and_ends_with_the_run(followed):
    run, told, code = followed
    *told, last = told
    assert code == 0 and (last["state"], last["step"], last["steps"]) == ("done", 6, 6)
    kinds = [line["kind"] for line in told if "kind" in line]
    assert [kind for kind in kinds if kind in runs.LIFE and kind != "resumed"] == [
        "launched",
        "started",
        "failed",
        "restarting",
        "started",
        "finished",
    ]
    assert [line for line in told if "kind" in line] == events.read(run)
    lines = [line for line in told if "kind" not in line]
    assert [line for line in metrics.read_lines(run) if line not in lines] == []
    assert len({line["time"] for line in lines}) == len(lines)
    texts = [runs.format_line(line) for line in told]
    assert all("\n" not in text for text in texts) and any("step 6  loss/text" in text for text in texts)


def test_runs_of_a_real_run(followed):
    run, _, _ = followed
    (status,) = (json.loads(line) for line in megamm("runs", run.parent, "--json").stdout.splitlines())
    last = metrics.read_lines(run)[-1]
    assert (status["state"], status["step"], status["steps"], status["restarts"]) == ("done", 6, 6, 1)
    assert status["losses"] == {k.split("/")[1]: v for k, v in last.items() if k.startswith("loss/")}
    assert 0 < status["goodput"] < 1 and status["age"] > 0
    shown = megamm("runs", run.parent).stdout.splitlines()
    assert shown[0].split()[:3] == ["run", "state", "step"] and shown[1].split()[:3] == [str(run), "done", "6/6"]


def test_attach_to_a_run_that_failed(tmp_path):
    run = write(tmp_path / "run", [LAUNCHED, (5.0, "gave_up", {"why": "3 failures"})])
    told: list[dict] = []
    thread = threading.Thread(target=lambda: told.extend(runs.follow(run)), daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive() and [line["kind"] for line in told] == ["launched", "gave_up"]
    done = megamm("attach", run)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "failed: gave up: 3 failures"


def test_many_runs_are_read_by_several_processes(tmp_path, monkeypatch):
    for number in range(5):
        add_lines(
            write(tmp_path / f"run{number}", [(90, "launched", {"ranks": 1})], [(1, "step", number)]), number, 1.0
        )
    found = runs.find([tmp_path, tmp_path / "run3"])
    assert [run.name for run in found] == [f"run{number}" for number in range(5)]
    monkeypatch.setattr(time, "time", lambda: NOW)
    alone = runs.statuses(found)
    monkeypatch.setattr(runs, "MANY", 2)
    assert runs.statuses(found) == alone and [one.step for one in alone] == list(range(5))
