"""Faults in real runs: each is detected, the run continues automatically, and its results equal a baseline run's."""

import json
import shutil
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
import warm
from faults import environment as with_faults
from ports import free_port
from tiny_run import environment, make_data, numbers, write_config

from megamm.common import events
from megamm.elastic import heartbeat
from megamm.observability import metrics

TRAIN = {"steps": 8, "global_batch_size": 4, "micro_batch_size": 1, "log_every": 1, "eval_every": 4}
CHECKPOINT = {"every": 2, "keep": 9}
QUICK = {"backoff_seconds": 0, "same_step_limit": 9}
COMMANDS = []


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


def config_of(data, name, local=None, **resilience):
    sections = {"train": TRAIN, "checkpoint": CHECKPOINT | {"local": local}, "resilience": QUICK | resilience}
    return data / name, write_config(data, data / name, **sections)


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    while COMMANDS:
        COMMANDS.pop().kill()


def start(config, *options, faults=None):
    """Start the command in a process; next to the config are a file for its output, and $NODE for its local storage."""
    env = with_faults(faults, environment()) if faults else environment()
    number = time.monotonic_ns()
    env["NODE"] = str(config.with_suffix(f".{number}.node"))
    with config.with_suffix(f".{number}.log").open("w") as log:
        command = [sys.executable, "-m", "megamm", "train", str(config), *map(str, options)]
        COMMANDS.append(warm.start(command, env=env, stdout=log, stderr=log))
    return COMMANDS[-1]


def output_of(config):
    return "".join(path.read_text() for path in sorted(config.parent.glob(f"{config.stem}.*.log")))


def run(config, *options, faults=None):
    """Return its exit code."""
    return start(config, *options, faults=faults).wait(timeout=240)


def of_kind(output, *kinds):
    return [event for event in events.read(output) if event["kind"] in kinds]


def wait_for(what, process, config):
    """Return the first true value of what(), while the process runs."""
    deadline = time.monotonic() + 120
    while not (found := what()):
        assert process.poll() is None, output_of(config)
        assert time.monotonic() < deadline, f"timed out: {output_of(config)}"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def undisturbed(data):
    output, config = config_of(data, "baseline")
    assert run(config, "--nproc", 2) == 0, output_of(config)
    kinds = [e["kind"] for e in events.read(output) if e["kind"] not in ("saved", "straggler")]
    assert kinds == ["launched", "started", "first_step", "finished"]
    lines = numbers(output)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    return lines


RANK_FAULTS = {
    "sigkill@step:3:1:0": "signal 9 (SIGKILL)",
    "sigstop@data:4:0:1": "hang in ",
    "exception@start:0:1:2": "InjectedError: injected",
    "exit0@evaluate:4:0:3": "ended early (sys.exit(0))",
    "hold_gil@step:5:1:4": "hang in fault_kinds.py",
    "deadlock@save:6:1:5": "_deadlock, others wait in all_",
    "sigsegv@resume:0:0:6": "signal 11 (SIGSEGV)",
    "abort@step:7:0:7": "signal 6 (SIGABRT)",
    "_exit0@end:8:1:8": "ended early (exit code 0)",
}


def test_faults_of_ranks(data, undisturbed):
    """One fault per attempt: nine restarts, then the losses of the baseline run, bit for bit."""
    output, config = config_of(data, "ranks", hang_seconds=2)
    assert run(config, "--nproc", 2, faults=",".join(RANK_FAULTS)) == 0, output_of(config)
    assert numbers(output) == undisturbed
    failed = of_kind(output, "failed")
    assert len(failed) == len(RANK_FAULTS)
    for (fault, cause), event in zip(RANK_FAULTS.items(), failed, strict=True):
        phase, step, rank, attempt = fault.partition("@")[2].split(":")
        assert cause in event["cause"], fault
        assert (event["phase"], event["rank"], event["attempt"]) == (phase, int(rank), int(attempt)), fault
        assert event["step"] == (int(step) or None), fault
    restarts = of_kind(output, "restarting")
    assert [e["restart"] for e in restarts] == list(range(1, 10))
    assert all(e["reason"] == "failure" for e in restarts)


def test_hangs_are_explained(data, undisturbed):
    """The run of the previous test reports the rank waited for, the collective, and the position of every rank."""
    output = data / "ranks"
    injected = {e["fault"]: e["time"] for e in of_kind(output, "injected")}
    hangs = of_kind(output, "hang")
    assert [(e["ranks"], e["phase"], e["step"]) for e in hangs] == [
        ([0], "data", 4),
        ([1], "step", 5),
        ([1], "save", 6),
    ]
    for fault, event in zip(("sigstop", "hold_gil", "deadlock"), hangs, strict=True):
        assert event["silent"] <= event["limit"] + 1.5  # seconds: the agent's polling interval, and the machine's load
        assert event["time"] - injected[fault] <= event["limit"] + 3
        texts = {path.stem: path.read_text() for path in Path(event["dump"]).iterdir()}
        assert texts.keys() == {"rank_00000", "rank_00001"}
        guilty, waiting = event["reports"] if event["ranks"] == [0] else reversed(event["reports"])
        assert guilty["collective"] is None and waiting["collective"] in event["collective"]
        assert "(number " in waiting["recorded"]
        assert guilty["state"] == {"sigstop": "T", "hold_gil": "R", "deadlock": "S"}[fault]
        assert "in beat" in texts[f"rank_{guilty['rank']:05d}"]
        assert f"in {waiting['collective']}" in texts[f"rank_{waiting['rank']:05d}"]


@pytest.mark.everything
def test_faults_above_the_ranks(data, undisturbed):
    """The parents of the ranks are killed; a signal ends the run with a checkpoint; no process is left behind."""
    output, config = config_of(data, "above")
    faults = "kill_fork_server@step:2:0:0,kill_template@step:3:1:0,kill_agent@step:5:0:1"
    faults += ",sigstop@resume:0:0:2,sigterm@data:6:1:3,until_asked@step:6:1:3"
    assert run(config, "--nproc", 2, faults=faults) == 75, output_of(config)
    causes = [event["cause"] for event in of_kind(output, "failed")]
    assert causes[:2] == ["the ranks' prefork parent exited", "the agent exited with signal 9 (SIGKILL)"]
    (hang,) = of_kind(output, "hang")
    assert len(causes) == 3 and hang["limit"] < 60  # the new agent knows how long resuming takes
    assert [e["signal"] for e in of_kind(output, "signal")] == ["SIGTERM"]
    done = numbers(output)[-1]["step"]
    assert done in (6, 7)  # a rank that had begun step 7 finished it
    assert numbers(output) == [line for line in undisturbed if line["step"] <= done]
    assert (output / "checkpoints" / f"step_{done:08d}").is_dir()

    command = start(config, "--nproc", 2, faults="until_asked@step:8:0:0")
    wait_for(lambda: [e for e in of_kind(output, "injected") if e["step"] == 8], command, config)
    tree = psutil.Process(command.pid).children(recursive=True)
    assert {beat.pid for beat in heartbeat.read(output)} <= {process.pid for process in tree}
    command.kill()
    command.wait()
    _, alive = psutil.wait_procs(tree, timeout=10)
    assert not alive

    assert run(config, "--nproc", 2) == 0, output_of(config)
    assert numbers(output) == undisturbed


def test_a_crash_loop_gives_up_and_says_where(data):
    output, config = config_of(data, "loop", same_step_limit=2)
    assert run(config, faults="exception@step:3:*:*") == 3
    assert len(of_kind(output, "failed")) == 2
    why = of_kind(output, "gave_up")[0]["why"]
    assert why.startswith(
        "2 failures in a row at step 3; the last was rank 0: InjectedError: injected (fault_kinds.py:"
    )
    assert f"error: gave up: {why}" in output_of(config)


def errors_of(config):
    return [line for line in output_of(config).splitlines() if line.startswith("error: ") or "Traceback" in line]


def test_what_the_user_must_mend_is_told_in_one_line_and_not_tried_again(data):
    """One of two ranks raises it; for errors on both ranks see below."""
    output, config = config_of(data, "mistake")
    assert run(config, "--nproc", 2, faults="user_error@step:2:1:*") == 2
    assert errors_of(config) == ["error: an injected mistake; fix it"]
    assert len(of_kind(output, "failed")) == 1 and not of_kind(output, "restarting", "gave_up")


@pytest.mark.everything
def test_two_nodes_tell_the_users_mistake_once(data):
    output, config = config_of(data, "mistake_of_nodes")
    options = ["--nnodes", "2", "--rendezvous", f"127.0.0.1:{free_port()}", "resilience.rendezvous.last_call_timeout=1"]
    nodes = [start(config, *options, faults="user_error@step:2:1:*") for _ in range(2)]
    assert [node.wait(timeout=120) for node in nodes] == [2, 2], output_of(config)
    assert errors_of(config) == ["error: an injected mistake; fix it"]
    assert len(of_kind(output, "failed")) == 1


REFUSED = {
    "other_model": (["model.num_layers=3"], "error: the checkpoint has"),
    "other_data": (["train.seed=5"], "error: the checkpoint has"),
    "damaged": ([], "error: damaged checkpoint"),
}


def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(data, undisturbed):
    """Both ranks find the same error: another model, other data, all checkpoints damaged."""
    commands = {}
    for name, (overrides, _) in REFUSED.items():
        output, config = config_of(data, name)
        step = output / "checkpoints" / "step_00000002"
        shutil.copytree(data / "baseline" / "checkpoints" / step.name, step)
        if name == "damaged":
            (step / "state.json").write_text("{}")
        commands[config] = start(config, "--nproc", 2, *overrides)
    for config, command in commands.items():
        assert command.wait(timeout=240) == 2
        said = REFUSED[config.stem][1]
        assert [line[: len(said)] for line in errors_of(config)] == [said], config.stem
        output = data / config.stem
        assert len(of_kind(output, "failed")) == 1 and not of_kind(output, "restarting", "gave_up")


@pytest.mark.everything
def test_no_checkpoint_within_the_grace_time(data):
    """The rank that should save hangs: it is killed after the grace time, and the run does not restart."""
    output, config = config_of(data, "grace", grace_seconds=1, hang_seconds=60)
    assert run(config, faults="sigterm@data:3:*:0,deadlock@step:3:*:0") == 1
    assert "no checkpoint within resilience.grace_seconds = 1" in of_kind(output, "failed")[0]["cause"]
    assert not of_kind(output, "restarting")


def test_a_single_process_without_restarts_saves_on_a_signal(data):
    output, config = config_of(data, "single", max_restarts=0)
    assert run(config, faults="own_signal@step:3:0:0") == 75, output_of(config)
    assert max(line["step"] for line in metrics.read_lines(output)) == 3
    state = json.loads((output / "checkpoints" / "step_00000003" / "state.json").read_text())
    assert state["consumed_rows"] == 12
    assert not of_kind(output, "launched")


def test_nodes_come_and_go(data, undisturbed):
    """One node, then two and a spare, which takes over; one continues alone, another joins; the rows are the same."""
    output, config = config_of(data, "nodes", hang_seconds=60)
    times = ["resilience.rendezvous.keep_alive_interval=1", "resilience.rendezvous.last_call_timeout=1"]
    options = ["--nnodes", "1:2", "--rendezvous", f"127.0.0.1:{free_port()}", *times]
    # It is asked in step 3 and stops after 3 or 4: a rank that has begun the next step finishes it.
    kills = "kill_command@step:5:1:1,kill_command@step:5:1:2"
    faults = f"until_asked@data:3:0:0,{kills},until_asked@data:6:0:3"
    first = start(config, *options, faults=faults)  # it hosts the store
    wait_for(lambda: of_kind(output, "launched"), first, config)
    lost, another = config_of(data, "lost")  # another job, started at this one's port
    assert run(another, *options) == 2
    assert f"error: this node's job does not match the other nodes': config.output is \"{output}\" there" in output_of(
        another
    )
    assert not lost.exists()
    again = [start(config, *second) for second in ((), ("resilience.max_restarts=0",))]  # with an agent, and without
    assert [each.wait(timeout=60) for each in again] == [2, 2]
    assert output_of(config).count("error: another job trains in this folder, process ") == 2
    others = [start(config, *options, faults=faults) for _ in range(2)]
    wait_for(lambda: [e for e in of_kind(output, "restarting") if e["ranks"] == 1], first, config)
    others.append(start(config, *options, faults=faults))
    assert first.wait(timeout=240) == 0, output_of(config)
    assert sorted(other.wait(timeout=60) for other in others) == [-9, -9, 0], output_of(config)
    story = [(e["kind"], e["ranks"], e.get("reason")) for e in of_kind(output, "launched", "restarting")]
    assert story == [
        ("launched", 1, None),
        ("restarting", 2, "nodes changed"),
        ("restarting", 2, "failure"),
        ("restarting", 1, "failure"),
        ("restarting", 2, "nodes changed"),
    ]
    assert_near(numbers(output), undisturbed)
    state = json.loads((output / "checkpoints" / "step_00000008" / "state.json").read_text())
    assert state["consumed_rows"] == 32 and state["world_size"] == 2


def assert_near(lines, baseline):
    """Compare with a run on another number of ranks, whose sums differ in the last digits."""
    assert [line["step"] for line in lines] == [line["step"] for line in baseline]
    for ours, theirs in zip(lines, baseline, strict=True):
        # The balance of the ranks depends on their number.
        wanted = {k: v for k, v in theirs.items() if v is not None and k != "imbalance"}
        assert {k: ours[k] for k in wanted} == pytest.approx(wanted, rel=1e-5)


@pytest.mark.everything
def test_a_faulty_node_is_evicted(data, undisturbed):
    """The faulty node is first the store's host, which serves the store to the end, then another of two and a spare.

    No node leaves anything in its memory.
    """
    output, config = config_of(data, "evicted", "$NODE", hang_seconds=60, loss_guard={"evict": True})
    times = ["resilience.rendezvous.keep_alive_interval=1", "resilience.rendezvous.last_call_timeout=1"]
    options = ["--nnodes", "1:2", "--rendezvous", f"127.0.0.1:{free_port()}", *times]
    # Until asked, so that all three nodes have joined: it stops after step 2 or 3.
    faults = "until_asked@data:2:0:0,nan@step:4:0:1,nan@step:6:1:2"
    first = start(config, *options, faults=faults)
    wait_for(lambda: of_kind(output, "launched"), first, config)
    others = [start(config, *options, faults=faults) for _ in range(2)]
    codes = sorted(other.wait(timeout=240) for other in others)
    assert codes == [0, 4], output_of(config)
    assert first.poll() is None
    assert first.wait(timeout=60) == 4
    evicted = of_kind(output, "evicted")
    assert [(e["node"], e["attempt"], e["step"]) for e in evicted] == [
        (socket.gethostname(), 1, 4),
        (socket.gethostname(), 2, 6),
    ]
    assert [e["why"].partition(" at step")[0] for e in evicted] == [
        "rank 0: transient fault",
        "rank 1: transient fault",
    ]
    assert output_of(config).count("is evicted: rank ") == 2 and not of_kind(output, "failed")
    assert len(list(data.glob("evicted.*.node/node_id"))) == 3 and not list(data.glob("evicted.*.node/*/"))
    story = [(e["kind"], e["ranks"], e.get("reason")) for e in of_kind(output, "launched", "restarting")]
    assert story == [
        ("launched", 1, None),
        ("restarting", 2, "nodes changed"),
        ("restarting", 2, "nodes changed"),
        ("restarting", 1, "nodes changed"),
    ]
    assert_near(numbers(output), undisturbed)


@pytest.mark.everything
def test_the_only_node_is_evicted_with_a_diagnosis(data):
    output, config = config_of(data, "alone", loss_guard={"evict": True})
    assert run(config, "--nproc", 2, faults="nan@step:3:1:*") == 4, output_of(config)
    (event,) = of_kind(output, "evicted")
    assert event["why"].startswith("rank 1: transient fault at step 3: ") and event["step"] == 3
    assert [line for line in output_of(config).splitlines() if line.startswith("error: ")] == [
        f"error: node {event['node']} is evicted: {event['why']}; check its hardware, then restart it"
    ]
    assert not of_kind(output, "restarting", "failed", "gave_up")
    assert (output / "checkpoints" / "step_00000003" / "manifest.json").is_file()
