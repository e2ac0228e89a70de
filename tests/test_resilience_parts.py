"""The decisions of the supervisor: restart policy, hang limits, stacks, where ranks stop, plan and options."""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from megamm.common import events, exit_codes, processes
from megamm.common.errors import UserError
from megamm.config import config_from_dict
from megamm.config.sections import ResilienceConfig
from megamm.elastic import hang_detector, heartbeat, restart_policy
from megamm.elastic.graceful_stop import AgentStopCondition, GracefulStop
from megamm.elastic.heartbeat import Heartbeat, read
from megamm.elastic.launcher import Nodes, admissible_nodes
from megamm.elastic.launcher_messages import LauncherChannel
from megamm.elastic.rank import NodeFault, code_of
from megamm.elastic.rank_status import HeartbeatPage
from megamm.elastic.rendezvous import SingleNode
from megamm.elastic.restart_policy import Failure, Rules, judge

RULES = Rules(max_restarts=5, same_step_limit=3, backoff_seconds=2.0)


def failures(*steps):
    return [Failure(attempt, step, "step", 0, "signal 9") for attempt, step in enumerate(steps)]


@pytest.mark.parametrize(
    ("steps", "pause"),
    [
        ([4], 0),
        ([4, 9], 0),
        ([4, 4], 2),
        ([9, 4, 4], 2),
        ([4, None], 2),
        ([None], 0),
        ([None, None], 2),
        ([3, 4, 3], 0),
    ],
)
def test_a_restart_waits_only_without_progress(steps, pause):
    assert judge(failures(*steps), RULES) == restart_policy.Verdict(pause=pause)


def test_pauses_double_up_to_a_limit():
    rules = Rules(max_restarts=100, same_step_limit=100, backoff_seconds=2.0)
    pauses = [judge(failures(*[7] * count), rules).pause for count in range(1, 12)]
    assert pauses == [0, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


@pytest.mark.parametrize("steps", [[4, 4, 4], [1, None, None, None], [4, None, 4], [1, 2, 5, None, 5]])
def test_a_crash_loop_ends(steps):
    why = judge(failures(*steps), RULES).gives_up
    assert why is not None and why.startswith(("3 failures in a row", "4 failures in a row"))


def test_the_budget_ends():
    assert judge(failures(1, 2, 3, 4, 5), RULES).gives_up is None
    why = judge(failures(1, 2, 3, 4, 5, 6), RULES).gives_up
    assert why == "all 5 restarts are used up; rank 0: signal 9, at step 6, phase step"
    assert judge(failures(1), Rules(0, 1, 0)).gives_up == "rank 0: signal 9, at step 1, phase step"


def test_failures_are_read_back_from_the_last_launch(tmp_path):
    """The first failure of each attempt is read; later ones are its consequences."""
    old, first, second = failures(7, 8, 9)
    events.record(tmp_path, "launched", attempt=0)
    events.record(tmp_path, "failed", **vars(old))
    events.record(tmp_path, "launched", attempt=0)
    events.record(tmp_path, "restarting", attempt=1)
    events.record(tmp_path, "failed", **vars(first))
    events.record(tmp_path, "failed", **vars(first) | {"rank": 1, "cause": "connection reset"})
    events.record(tmp_path, "failed", **vars(second))
    with (tmp_path / events.EVENTS).open("a") as file:
        file.write('{"kind": "failed", "att')  # truncated by a kill
    assert restart_policy.from_events(events.read(tmp_path)) == [first, second]
    assert max(restart_policy.attempts(events.read(tmp_path))) == 2


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def detector_of(hang_seconds=5.0, startup=600.0, run=Path("no heartbeats here")):
    clock = Clock()
    page = HeartbeatPage.create(2)
    return clock, page.ranks, hang_detector.HangDetector(hang_detector.Limits(hang_seconds, startup), run, clock)


def silence_until_overdue(clock, ranks, detector, tick=0.25):
    """Return the seconds until rank 1, the only silent one, is overdue."""
    begin, counts = clock.now, itertools.count(1000)
    while not (overdue := detector.overdue(ranks)):
        clock.now += tick
        ranks[0].write(next(counts), ranks[0].phase, 1, clock.now, True)
    assert overdue == [1]
    return clock.now - begin


def test_a_silent_rank_is_overdue_after_two_step_times_and_the_limit():
    clock, ranks, detector = detector_of()
    for status in ranks:
        status.write(1, "step", 3, clock.now, True)
        status.set_longest("step", 1.5)
        status.set_longest("data", 0.5)
    assert silence_until_overdue(clock, ranks, detector) == pytest.approx(2 * 2.0 + 5, abs=0.5)


def test_the_first_of_its_kind_is_bounded_by_what_the_first_step_took():
    clock, ranks, detector = detector_of()
    for status in ranks:
        status.set_longest("start", 1.0)
        status.set_longest("first", 3.0)
        status.write(1, "evaluate", 3, clock.now, True)
    assert silence_until_overdue(clock, ranks, detector) == pytest.approx(10 * 3 + 5, abs=0.5)
    ranks[1].set_longest("first", 300.0)
    detector.overdue(ranks)
    assert detector.limit(ranks[1]) == 600
    for status in ranks:
        status.write(2, "end", 3, clock.now, True)  # uploads at the end are independent of steps
    assert detector.limit(ranks[1]) == 600


def test_a_new_agent_of_a_launch_knows_how_long_things_take(tmp_path):
    def beats(attempt, rank, **seconds):
        heart = Heartbeat(tmp_path, rank, attempt)
        heart.longest |= seconds
        heart.beat("start", 0)
        heart.close()

    beats(0, 0, start=50.0, step=9.0)
    beats(0, 5, start=99.0)  # of an earlier launch with more ranks
    assert heartbeat.longest(tmp_path) == {}
    events.record(tmp_path, "launched", attempt=0)
    assert heartbeat.longest(tmp_path) == {}
    beats(0, 0, start=2.0, save=3.0)
    beats(0, 1, start=4.0)
    beats(1, 0, first=1.0)  # keeps its earlier values
    assert heartbeat.longest(tmp_path) == {"start": 4.0, "save": 3.0, "first": 1.0}
    clock = Clock()
    detector = hang_detector.HangDetector(
        hang_detector.Limits(5.0, 600.0), tmp_path, clock, heartbeat.longest(tmp_path)
    )
    page = HeartbeatPage.create(2)
    for status in page.ranks:
        status.write(1, "start", 0, clock.now, False)
    assert silence_until_overdue(clock, page.ranks, detector) == pytest.approx(2 * 4 + 5, abs=0.5)


def test_what_has_no_usual_time_yet_gets_the_long_limit_and_remembers():
    clock, ranks, detector = detector_of()
    for status in ranks:
        status.write(1, "save", 3, clock.now, True)
    assert silence_until_overdue(clock, ranks, detector) == pytest.approx(600, abs=0.5)
    ranks[0].set_longest("save", 4.0)
    detector.overdue(ranks)
    for status in ranks:
        status.clear()  # another attempt
        status.write(1, "save", 3, clock.now, False)
    detector.begin()
    assert silence_until_overdue(clock, ranks, detector) == pytest.approx(13, abs=0.5)


def test_a_restart_on_a_slower_node_gets_longer_each_time():
    """Its first step may take longer than twice the earlier one; a fixed limit would end every attempt the same way."""
    clock, ranks, detector = detector_of(startup=100.0)
    ranks[0].set_longest("first", 4.0)
    detector.overdue(ranks)
    limits = [13, 31, 67, 139, 205]  # twice the silence before + 5; that counts up to startup_seconds
    for limit in limits:
        for status in ranks:
            status.clear()
            status.write(1, "data", 5, clock.now, False)
        detector.begin()
        assert silence_until_overdue(clock, ranks, detector) == pytest.approx(limit, abs=4)
    for status in ranks:
        status.clear()
        status.write(1, "step", 6, clock.now, True)
        status.set_longest("first", 6.0)  # it succeeds: what it took counts from now on
        status.set_longest("step", 1.0)
    detector.begin()
    assert silence_until_overdue(clock, ranks, detector) == pytest.approx(2 * 1.0 + 5, abs=0.5)
    for status in ranks:
        status.clear()
        status.write(1, "data", 6, clock.now, False)
    detector.begin()
    assert silence_until_overdue(clock, ranks, detector) == pytest.approx(2 * 6.0 + 5, abs=0.5)


def test_nobody_is_overdue_while_a_rank_anywhere_waits_for_a_writer_at_work(tmp_path):
    clock, ranks, detector = detector_of(run=tmp_path)
    for status in ranks:
        status.write(1, "save", 3, clock.now, True)
        status.set_longest("save", 1.0)
    elsewhere = Heartbeat(tmp_path, rank=7, attempt=0)
    for _ in range(60):
        elsewhere.written = 0.0  # so that each is in the file
        elsewhere.beat("wait", 3)
        clock.now += 1
        assert detector.overdue(ranks) == []
    assert silence_until_overdue(clock, ranks, detector) == pytest.approx(3, abs=1.5)
    elsewhere.close()


def test_a_gpu_gets_more_time_unless_the_config_says_how_much():
    """A file system that stalls for 15 s, or a kernel loaded in 22 s, is not a hang of a GPU."""
    for hang, on_gpu, limit in ((None, False, 5), (None, True, 120), (7.0, True, 7), (7.0, False, 7)):
        clock, ranks, detector = detector_of(hang)
        for status in ranks:
            status.write(1, "step", 9, clock.now, True)
            status.set_longest("step", 1.0)
            if on_gpu:
                status.set_on_gpu()
        assert silence_until_overdue(clock, ranks, detector) == pytest.approx(2 * 1.0 + limit, abs=0.5)
    assert ResilienceConfig().hang_seconds is None


def test_a_compilation_is_not_counted_on_any_rank_of_the_node():
    clock, ranks, detector = detector_of(startup=100.0)
    for status in ranks:
        status.write(1, "step", 9, clock.now, True)
        status.set_longest("step", 1.0)
    ranks[0].set_compiling(True, 2)
    for _ in range(240):  # a minute, in which rank 1 waits in a collective
        clock.now += 0.25
        assert detector.overdue(ranks) == []
    ranks[0].set_compiling(False, 3)
    assert silence_until_overdue(clock, ranks, detector) == pytest.approx(2 * 1.0 + 5, abs=0.5)
    ranks[0].set_compiling(True, 2000)  # one that never ends is a hang
    begin = clock.now
    while not (overdue := detector.overdue(ranks)):
        clock.now += 0.25
    assert 0 in overdue and clock.now - begin == pytest.approx(100, abs=1)


def test_a_compilation_on_another_node_is_not_counted(tmp_path):
    clock, ranks, detector = detector_of(run=tmp_path, startup=100.0)
    for status in ranks:
        status.write(1, "step", 9, clock.now, True)
        status.set_longest("step", 1.0)
    elsewhere, old = Heartbeat(tmp_path, rank=7, attempt=1), Heartbeat(tmp_path, rank=8, attempt=0)
    for heart in (elsewhere, old):
        for step in (1, 2, 3):
            heart.beat("step", step)
    old._begin_compilation()  # in the attempt before: it was killed
    elsewhere._begin_compilation()
    for _ in range(240):
        clock.now += 0.25
        assert detector.overdue(ranks) == []
    elsewhere._end_compilation()
    assert silence_until_overdue(clock, ranks, detector) <= 2 * 1.0 + 5.5
    elsewhere._begin_compilation()  # one that never ends
    assert silence_until_overdue(clock, ranks, detector) == pytest.approx(100, abs=10)
    for heart in (elsewhere, old):
        heart.close()


@pytest.mark.everything
def test_torch_reports_its_compilations_and_recompilations(tmp_path):
    """A function compiled by torch (without code generation), again for another type; its time is not the step's."""
    page = HeartbeatPage.create(1)
    status, heart = page.ranks[0], Heartbeat(tmp_path, 0, 0, page.ranks[0])
    seen = []

    def backend(graph, inputs):
        seen.append((status.is_compiling, heartbeat.read(tmp_path)[0].is_compiling))
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            pass
        return graph

    torch.compile(lambda x: x, backend=lambda graph, _: graph)(torch.ones(1))  # imports what compiling needs
    heart.watch_compilations()
    for phase, step in (("data", 1), ("step", 1), ("data", 2), ("step", 2)):
        heart.beat(phase, step)
    compiled = torch.compile(lambda x: x * 2 + 1, backend=backend)
    before = status.count
    for dtype in (torch.float32, torch.float64):
        assert compiled(torch.ones(3, dtype=dtype)).sum() == 9
    assert seen == [(True, True)] * 2 and not status.is_compiling
    assert not heartbeat.read(tmp_path)[0].is_compiling and status.count == before + 4
    heart.beat("data", 3)
    assert status.longest()["step"] < 0.8  # of 1.0 s and more
    heart.close()
    compiled(torch.ones(3, dtype=torch.int32))
    assert len(seen) == 3 and seen[-1] == (False, False)


def test_the_first_steps_on_a_gpu_are_measured_apart(tmp_path):
    """Automatic dynamic shapes compile again in the second step: neither it nor the third tells the usual time."""
    page = HeartbeatPage.create(1)
    heart = Heartbeat(tmp_path, 0, 0, page.ranks[0])
    heart.set_on_gpu()
    warm = {}
    for step in range(5, 10):
        for phase in ("data", "step"):
            heart.beat(phase, step)
            warm[phase, step] = page.ranks[0].is_warm
    assert page.ranks[0].is_on_gpu and next(key for key, is_warm in warm.items() if is_warm) == ("data", 8)
    heart.close()
    after = Heartbeat(tmp_path, 1, 0, page.ranks[0])
    after.set_on_gpu()
    for phase, step, is_warm in (("step", 1, False), ("save", 1, False), ("step", 2, False), ("step", 3, False)):
        after.beat(phase, step)
        assert after.is_warm == is_warm
    after.beat("evaluate", 3)
    assert after.is_warm
    after.close()


def test_a_machine_that_slept_is_no_hang():
    clock, ranks, detector = detector_of()
    for status in ranks:
        status.write(1, "step", 3, clock.now, True)
        status.set_longest("step", 0.1)
    assert detector.overdue(ranks) == []
    clock.now += 3600
    assert detector.overdue(ranks) == []
    assert silence_until_overdue(clock, ranks, detector) > 3


DUMP = """Thread 0x00000000000000aa (most recent call first):
  File "/x/python/threading.py", line 331 in wait

Current thread 0x00000000000000bb (most recent call first):
  File "/x/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/x/torch/distributed/distributed_c10d.py", line 4287 in all_gather
  File "/x/megamm/train.py", line 99 in run
  File "<frozen runpy>", line 198 in _run_module_as_main
"""


def test_the_collective_is_that_of_the_main_threads_innermost_frame():
    assert hang_detector.main_frames(DUMP, 0xAA) == ["/x/python/threading.py:331 wait"]
    assert hang_detector.collective(hang_detector.main_frames(DUMP, 0xBB)) == "all_gather"
    assert (
        hang_detector.collective(["/x/megatron/core/distributed/param_and_grad_buffer.py:5 finish_grad_sync"])
        is not None
    )
    assert (
        hang_detector.collective(["/x/megamm/train.py:99 run", "/x/torch/distributed/distributed_c10d.py:1 barrier"])
        is None
    )
    assert hang_detector.collective([]) is None and hang_detector.main_frames("", 0xBB) == []


def test_a_dump_is_whole_once_the_main_thread_is_there_down_to_its_program():
    assert hang_detector.is_whole(DUMP, 0xBB)
    assert not any(hang_detector.is_whole(DUMP[:end], 0xBB) for end in range(len(DUMP)))
    script = DUMP.replace("<frozen runpy>", "/x/train.py").replace("_run_module_as_main", "<module>")
    deep = DUMP.replace('  File "<frozen runpy>", line 198 in _run_module_as_main', "  ...")
    assert hang_detector.is_whole(script, 0xBB) and hang_detector.is_whole(deep, 0xBB)
    first = DUMP.replace("00bb", "00cc").replace("00aa", "00bb")  # another thread's stack follows
    assert hang_detector.is_whole(first.replace("in wait", "in <module>"), 0xBB)


def test_a_signal_to_a_main_thread_needs_a_process_and_reaches_it():
    program = "import signal, threading; one = {signal.SIGUSR1}; print('up', flush=True)"
    program += "; threading.Thread(target=signal.sigwait, args=[one]).start(); print(signal.sigwait(one), flush=True)"
    blocked = {signal.SIGUSR1}  # in every thread, so that it waits for sigwait
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert child.stdout.readline() == "up\n"
    processes.signal_main_thread(child.pid, signal.SIGUSR1)
    assert child.stdout.readline() == f"{signal.SIGUSR1}\n"
    child.kill()
    child.wait()
    with pytest.raises(ProcessLookupError):
        processes.signal_main_thread(child.pid, signal.SIGUSR1)


def report(rank, collective="all_reduce", state="S", step=5):
    return hang_detector.HangReport(rank, step, "step", 9.0, state, collective, "frame")


@pytest.mark.parametrize(
    ("reports", "guilty"),
    [
        ([report(0), report(1, None), report(2)], [1]),
        ([report(0), report(1, None), report(2, state="T")], [2]),
        ([report(0), report(1, step=4), report(2)], [1]),
        ([report(0), report(1)], []),
        ([report(0, None), report(1, None)], [0, 1]),
    ],
)
def test_the_culprit_is_the_rank_that_others_wait_for(reports, guilty):
    assert hang_detector.culprits(reports) == guilty


def steps_until_stopped(stop_when, pace, done, last):
    """Run a rank's loop; a step ends for all ranks together, as collectives make it."""
    for step in itertools.count(1):
        if stop_when.stops_before(step) is not None:
            done.append(step - 1)
            return
        time.sleep(pace())
        last.wait(timeout=20)


@pytest.mark.parametrize("seed", range(8))
def test_ranks_stop_after_the_same_step(seed):
    """Three ranks at a random pace, asked at a random time; a rank that stops one step early would block the others."""
    draw = random.Random(seed)
    page, done, together = HeartbeatPage.create(3), [], threading.Barrier(3)
    stop = GracefulStop(page, SingleNode(), 1)
    ranks = [
        threading.Thread(
            target=steps_until_stopped,
            args=(AgentStopCondition(page, page.ranks[i]), lambda: draw.random() * 0.004, done, together),
        )
        for i in range(3)
    ]
    for rank in ranks:
        rank.start()
    time.sleep(draw.random() * 0.05)
    stop.ask("requeue", tell_others=False)
    deadline = time.monotonic() + 20
    while any(rank.is_alive() for rank in ranks):
        assert time.monotonic() < deadline
        stop.advance()
        time.sleep(0.001)
    assert len(done) == 3 and len(set(done)) == 1


def test_a_signal_overrides_a_regrouping_but_not_the_other_way():
    page, alone = HeartbeatPage.create(1), SingleNode()
    stop = GracefulStop(page, alone, 1)
    alone.send("stop/regroup", "asked")
    stop.follow()
    assert page.asked == "regroup"
    alone.send("stop/requeue", "asked")
    stop.follow()
    assert page.asked == "requeue"
    stop.ask("regroup", tell_others=False)
    assert page.asked == "requeue"


def test_heartbeats_are_read_back(tmp_path):
    heart = Heartbeat(tmp_path, 3, 1)
    heart.beat("start", 0)
    heart.beat("evaluate", 7)
    assert [(b.rank, b.phase, b.step, b.count, b.attempt, b.pid) for b in read(tmp_path)] == [
        (3, "evaluate", 7, 2, 1, os.getpid())
    ]
    (tmp_path / "heartbeats" / "node_00004.json").write_text('{"rank": 4')
    assert len(read(tmp_path)) == 1
    heart.close()


def test_a_node_has_one_file_of_heartbeats(tmp_path):
    """A rank that has moved to another node counts once; a run of an earlier version has a file for each rank."""
    for rank, on_node in {0: (0, 0), 1: (0, 1), 3: (1, 1)}.items():
        with contextlib.closing(Heartbeat(tmp_path, rank, 0, on_node=on_node)) as heart:
            heart.beat("start", 0)
    files = sorted((tmp_path / "heartbeats").iterdir())
    assert [file.name for file in files] == ["node_00000.json", "node_00001.json"]
    assert [beat.rank for beat in read(tmp_path)] == [0, 1, 3]
    with contextlib.closing(Heartbeat(tmp_path, 1, 1, on_node=(1, 0))) as heart:
        heart.beat("save", 5)
    assert [(beat.rank, beat.phase) for beat in read(tmp_path)] == [(0, "start"), (1, "save"), (3, "start")]
    files[0].rename(files[0].with_name("rank_00000.json"))
    assert [(beat.rank, beat.phase) for beat in read(tmp_path)] == [(0, "start"), (1, "save"), (3, "start")]


def test_the_first_step_is_measured_apart(tmp_path):
    page = HeartbeatPage.create(1)
    heart = Heartbeat(tmp_path, 0, 0, page.ranks[0])
    for phase, step in [("start", 0), ("resume", 0), ("data", 5), ("step", 5), ("data", 6), ("step", 6), ("save", 6)]:
        assert page.ranks[0].is_warm is False or step == 6
        heart.beat(phase, step)
    assert page.ranks[0].longest().keys() == {"start", "resume", "first", "data", "step"}
    assert (page.ranks[0].phase, page.ranks[0].step, page.ranks[0].count) == ("save", 6, 7)
    heart.close()


def test_signals_come_line_by_line():
    read_end, write_end = os.pipe()
    launcher = LauncherChannel(read_end)
    os.write(write_end, b"plan\nSIGTERM\nSIG")
    assert launcher.first_line() == "plan"
    assert launcher.take_signal() == "SIGTERM" and launcher.take_signal() is None
    os.write(write_end, b"USR1\n")
    launcher.wait(5)
    assert launcher.take_signal() == "SIGUSR1"
    os.close(read_end)
    os.close(write_end)


def test_an_agent_ends_with_its_launcher_before_it_does_anything_else():
    code = (
        "from megamm.elastic.launcher_messages import LauncherChannel; launcher = LauncherChannel(0); "
        "launcher.first_line(); launcher.wait(60); print('late')"
    )
    done = subprocess.run([sys.executable, "-c", code], input=b"plan\n", capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


@pytest.mark.parametrize(
    ("nodes", "rendezvous", "what"),
    [
        ("x", None, "invalid --nnodes x"),
        ("4:2", "h:1", "invalid range --nnodes 4:2"),
        ("0", None, "invalid range --nnodes 0"),
        ("1:2", None, "requires --rendezvous"),
    ],
)
def test_nodes_that_are_refused(nodes, rendezvous, what):
    with pytest.raises(UserError, match=what):
        Nodes.parse(nodes, rendezvous)


def config(**sections):
    return config_from_dict(
        {
            "output": "out",
            "model": dict(
                num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, head_dim=8
            ),
            "data": {"seq_length": 64, "sources": [{"path": "x"}]},
            "tokenizers": {},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 8, "global_batch_size": 8, "micro_batch_size": 1},
        }
        | sections,
        where="test",
    )


def test_numbers_of_nodes_that_divide_the_batch():
    assert admissible_nodes(config(), 1, Nodes.parse("1:9", "h:1")) == (1, 2, 4, 8)
    assert admissible_nodes(config(), 2, Nodes.parse("1:9", "h:1")) == (1, 2, 4)
    assert admissible_nodes(config(parallel={"tensor": 2}), 1, Nodes.parse("2:6", "h:1")) == (2, 4)
    with pytest.raises(UserError, match="global_batch_size"):
        admissible_nodes(config(), 3, Nodes())


@pytest.mark.parametrize(
    ("ranks", "node", "nodes", "code"),
    [
        ([3], 1, 2, exit_codes.RANK_EVICTED),
        ([3], 0, 2, exit_codes.RANK_REGROUP),
        ([2, 3], 2, 3, exit_codes.RANK_REGROUP),
        ([1, 2], 1, 3, exit_codes.RANK_EVICTED),
        ([1, 2], 0, 2, exit_codes.CRASHED),
        ([1], 0, 1, exit_codes.RANK_EVICTED),
    ],
)
def test_which_nodes_leave_for_a_fault_of_ranks(ranks, node, nodes, code, monkeypatch):
    """There are two ranks per node."""
    for name, value in {"LOCAL_WORLD_SIZE": 2, "GROUP_WORLD_SIZE": nodes, "GROUP_RANK": node}.items():
        monkeypatch.setenv(name, str(value))
    assert code_of(NodeFault(ranks, "slow")) == code
