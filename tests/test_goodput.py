"""Goodput on hand-made event logs with known seconds, and a check that the parts add up to the whole."""

import random

import pytest

from megamm.observability.goodput import KINDS, Restart, account


def line(time, step, steps, step_seconds, wait=0.0, evaluation=0.0, stall=0.0):
    parts = {"step_seconds": step_seconds, "data_wait_seconds": wait}
    parts |= {"evaluation_seconds": evaluation, "checkpoint_stall_seconds": stall}
    return {"time": time, "step": step, "steps": steps} | parts


def event(time, kind, **fields):
    return {"time": time, "kind": kind} | fields


def seconds(result):
    return {kind: value for kind, value in result.seconds.items() if value}


def test_an_undisturbed_run():
    """10 s of start-up, 20 steps of 1 s (2 s of waiting), evaluation 3 s, two stalls of 0.5 s, 1 s of closing."""
    events = [event(100, "launched", restart=0), event(110, "started", step=0, world=2)]
    lines = [line(120, 10, 10, 10.0, wait=2.0), line(123, 10, 0, 0.0, evaluation=3.0)]
    lines += [line(133.5, 20, 10, 10.0, stall=0.5)]
    events += [event(125, "saved", step=10, stall=0.5), event(134, "saved", step=20, stall=0.5)]
    result = account([*events, event(135, "finished", step=20)], lines)
    told = {"start_up": 10, "productive": 18, "data_wait": 2, "evaluation": 3, "checkpoint_stall": 1, "unknown": 1}
    assert seconds(result) == pytest.approx(told)
    assert result.wall == 35 and result.ratio == pytest.approx(18 / 35)
    assert result.attempts == 1 and not result.restarts and not result.notes
    assert [s.kind for s in result.spans] == ["start_up", "productive", "unknown"]


HANG = [
    event(0, "launched", restart=0),
    event(4, "started", step=0, world=4),
    event(18, "saved", step=5, stall=0.0),
    event(30, "hang", ranks=[2], silent=6.0),
    event(31, "failed", rank=2, step=13, phase="step", cause="hang: rank 2"),
    event(36, "restarting", restart=1, backoff=2.0, teardown=1.0, rendezvous=3.0),
    event(41, "resumed", step=5, seconds=2.0),
    event(43, "started", step=5, world=4),
    event(55, "finished", step=15),
]


def test_a_hang_and_its_restart():
    """Steps of 1 s are logged every 10; the run hangs in step 13 and resumes after step 5."""
    result = account(HANG, [line(14, 10, 10, 10.0), line(54, 15, 10, 10.0, wait=1.0)])
    told = {
        "start_up": 4 + (43 - 36 - 2 - 2),
        "productive": 5 + 9,
        "repeated": 5 + (31 - 14 - 7),
        "detection": 7,  # 6 s of silence, and 1 s from then to the event
        "teardown": 1,
        "rendezvous": 3,
        "down": 2,
        "load": 2,
        "data_wait": 1,
        "unknown": 1 + 1 + 1,  # between teardown and restart, and in the second attempt after the lines' parts
    }
    assert seconds(result) == pytest.approx(told)
    assert result.wall == pytest.approx(55)
    expected = Restart(31, "hang", "hang: rank 2", 2, 13, "step", 7.0, 1.0, 3.0, 2.0, 43 - 31 + 7, 5)
    assert result.restarts == [expected] and result.attempts == 2


def test_unreported_steps_before_the_checkpoint_are_kept_at_the_last_pace():
    """Lines every 10 steps of 2 s; killed in step 18; a checkpoint after step 15, which no line reports."""
    events = [
        event(0, "launched", restart=0),
        event(0, "started", step=0),
        event(36, "failed", rank=0, step=18, phase="step", cause="signal 9", detection=1.0),
        event(36, "restarting", restart=1, teardown=0.0, rendezvous=0.0),
        event(37, "resumed", step=15, seconds=0.5),
        event(38, "started", step=15),
    ]
    result = account(events, [line(20, 10, 10, 20.0), line(48, 20, 5, 10.0)])
    assert result.seconds["productive"] == pytest.approx(20 + 5 * 2 + 10)
    assert result.seconds["repeated"] == pytest.approx(36 - 20 - 10 - 1)
    assert result.seconds["detection"] == 1 and result.wall == 48


def test_what_is_made_again_twice_is_repeated_twice():
    """Three attempts run the same steps 1 to 4, with no event but their first steps: only the last one counts."""
    events = [event(10 * i, "started", step=0) for i in range(3)]
    lines = [line(10 * i + 4, 4, 4, 4.0) for i in range(3)]
    result = account(events, lines)
    assert seconds(result) == pytest.approx({"productive": 4, "repeated": 8, "down": 12})
    assert result.attempts == 3
    assert any("has no end record" in note for note in result.notes)


def test_a_roll_back_inside_of_an_attempt_is_seen_by_its_lines():
    events = [event(0, "launched"), event(0, "started", step=0)]
    result = account(events, [line(10, 10, 10, 10.0), line(16, 10, 6, 6.0)])
    assert seconds(result) == pytest.approx({"productive": 4 + 6, "repeated": 6})
    resuming = account(events, [line(10, 10, 10, 10.0)], resuming_from=7)
    assert seconds(resuming) == pytest.approx({"productive": 7, "repeated": 3})


def test_failing_before_the_first_step_and_a_new_job():
    """A failed start-up (5 s), an hour in the queue, a job that works: agents of two nodes launch it."""
    events = [
        event(0, "launched", restart=0),
        event(5, "failed", rank=0, step=None, phase="start", cause="exit code 1"),
    ]
    events += [event(3605, "launched", restart=0), event(3605.2, "launched", restart=0)]
    events += [event(3610, "started", step=0)]
    result = account(events, [line(3620, 10, 10, 10.0)])
    assert seconds(result) == pytest.approx({"start_up": 10, "down": 3600, "productive": 10})
    assert result.attempts == 2 and result.restarts[0].phase == "start" and result.restarts[0].detection is None


def test_what_is_missing_is_said_and_not_guessed():
    assert account([], []).ratio is None
    old = account([], [{"step": 1, "loss/text": 2.0}])
    assert old.wall == 0 and old.notes == ["1 lines of metrics have no time: their steps are unknown"]
    unlaunched = account([], [line(10, 5, 5, 5.0), line(20, 10, 5, 5.0)])
    assert seconds(unlaunched) == pytest.approx({"productive": 10, "unknown": 5})
    assert len(unlaunched.notes) == 2
    back = account([event(0, "launched"), event(0, "started", step=0)], [line(10, 5, 5, 5.0), line(11, 10, 5, 5.0)])
    assert back.notes == ["a clock was set back: the recorded parts are longer than the elapsed time"]


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_are_the_whole(seed):
    """Random failures: every second from the first launch to the last record is counted once."""
    draw = random.Random(seed)
    clock, step, events, lines, kept = 1000.0, 0, [], [], {}
    for attempt in range(6):
        clock += draw.uniform(0, 3) * (attempt > 0)
        fields = {"teardown": 0.25, "rendezvous": 0.5, "backoff": draw.choice([0, 1.5])} if attempt else {}
        events.append(event(clock, "restarting" if attempt else "launched", **fields))
        clock += draw.uniform(2, 9)
        if attempt:
            events.append(event(clock, "resumed", step=step, seconds=draw.uniform(0, 2)))
        clock += draw.uniform(0, 1)
        events.append(event(clock, "started", step=step))
        first = step
        for _ in range(draw.randint(0, 5)):
            steps, took, wait, stall = draw.randint(1, 7), draw.uniform(1, 9), draw.uniform(0, 1), draw.uniform(0, 1)
            clock, step = clock + took + stall, step + steps
            lines.append(line(clock, step, steps, took, wait=wait, stall=stall))
            kept |= dict.fromkeys(range(step - steps + 1, step + 1), (took - wait) / steps)
        if attempt < 5:
            clock += draw.uniform(0.1, 4)
            events.append(event(clock, "failed", rank=0, step=step, phase="step", cause="x", detection=0.05))
            step = draw.randint(first, step)
            kept = {s: cost for s, cost in kept.items() if s <= step}
    result = account(events, lines)
    assert result.wall == pytest.approx(result.end - result.begin)
    assert result.seconds["productive"] == pytest.approx(sum(kept.values()))
    assert set(result.seconds) == set(KINDS) and all(value >= 0 for value in result.seconds.values())
    ends = [s.end for s in result.spans]
    assert [s.begin for s in result.spans[1:]] == pytest.approx(ends[:-1])
    assert result.attempts == 6 and len(result.restarts) == 5
