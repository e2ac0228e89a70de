"""Rules of the rendezvous: who is in a round, in which order, who is informed; then with real nodes and processes."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter

import pytest
from ports import free_port
from rendezvous_nodes import PLAN, TIMES, Node, joined, node, wait_for

from megamm.elastic.membership import Membership
from megamm.elastic.rendezvous import JobEnded, RoundBroken, StoreLost, Times

LAST_CALL, LOST = 5.0, 6.0


class Job:
    """A membership with a clock that the test sets, and what each of its members has received."""

    def __init__(self, least, most):
        self.membership, self.now = Membership((least, most), LAST_CALL, LOST), 100.0
        self.received = {}
        self.silent = set()
        self.sent = 0

    def add(self, *addresses, trained=None, is_fresh=True):
        """Connect a node for each address, each of which asks for a round; return their ids."""
        added = [len(self.received) + i for i in range(len(addresses))]
        for member, address in zip(added, addresses, strict=True):
            self.received[member] = []
            self.membership.connect(member, address, self.now)
            self.membership.join(member, is_fresh, trained)
        self.tick()
        return added

    def tick(self, seconds=0.0):
        """Let time pass, in which all nodes but silent ones send keep-alives."""
        self.now += seconds
        for member in self.membership.members.keys() - self.silent:
            self.membership.alive(member, self.now)
        self.membership.tick(self.now)
        self.take()

    def take(self):
        for members, message in self.membership.outbox:
            self.sent += len(members)
            for member in members:
                self.received[member].append(message)
        self.membership.outbox.clear()

    def ranks(self):
        """Return members by rank, with their last round."""
        found = {m: one.rank for m, one in self.membership.members.items() if one.rank is not None}
        return [member for member, _ in sorted(found.items(), key=lambda item: item[1])]

    def last(self, member, key):
        return next((m for m in reversed(self.received[member]) if key in m), None)

    def plan(self, nodes):
        """Group rank 0 plans an attempt of so many nodes."""
        self.membership.put(self.ranks()[0], self.membership._round.number, "order", "plan")
        self.take()

    def join_again(self, *members, trained=()):
        for member in members:
            self.membership.join(member, False, trained.index(member) if member in trained else None)
        self.tick()


def test_the_largest_number_begins_at_once_and_the_least_after_the_last_call():
    job = Job(2, 3)
    job.add("a")
    job.tick(1000)
    assert job.ranks() == []
    job.add("b")
    job.tick(LAST_CALL - 0.1)
    assert job.ranks() == []
    job.tick(0.2)
    assert job.ranks() == [0, 1]
    full = Job(2, 3)
    full.add("a", "b", "c")
    assert full.ranks() == [0, 1, 2]
    assert [full.last(m, "rank")["rank"] for m in range(3)] == [0, 1, 2]


def test_the_last_call_begins_again_if_a_node_leaves_meanwhile():
    job = Job(2, 3)
    job.add("a", "b")
    job.tick(LAST_CALL / 2)
    job.membership.leave(1)
    job.tick(LAST_CALL)
    job.add("c")
    job.tick(LAST_CALL / 2)
    assert job.ranks() == []
    job.tick(LAST_CALL)
    assert job.ranks() == [0, 2]


def test_new_nodes_are_in_the_order_of_their_addresses_as_people_count():
    job = Job(4, 4)
    job.add("10.0.0.10", "node-2", "10.0.0.9", "node-1")
    assert [job.membership.members[m].address for m in job.ranks()] == ["10.0.0.9", "10.0.0.10", "node-1", "node-2"]


def test_nodes_that_trained_come_before_spares_and_keep_their_order():
    job = Job(2, 3)
    job.add("z", "y", "a")
    assert job.ranks() == [2, 1, 0]
    job.plan(2)
    trained = [2, 1]
    (late,) = job.add("0")
    assert job.last(2, "waiting")["waiting"] == 0, "all places are taken"
    job.membership.lose(2, "gone")
    job.join_again(0, 1, trained=trained)
    assert job.ranks() == [1, late, 0]
    job.plan(2)
    (back,) = job.add("b")
    job.join_again(late, 0, 1, trained=[1, late])
    assert job.ranks() == [1, late, back], "it has waited for longer than the spare"
    assert job.membership.members[0].rank is None


def test_a_round_waits_for_the_nodes_of_the_one_before_but_not_for_silent_ones():
    job = Job(1, 3)
    job.add("a", "b", "c")
    job.plan(3)
    job.join_again(0, 1)
    job.tick(LAST_CALL + 1)
    assert job.ranks() == [2], "the third still trains"
    job.silent = {2}
    job.tick(LOST + 0.1)
    job.tick(LAST_CALL + 0.1)
    assert job.ranks() == [0, 1]
    # It wakes up in a round that has gone on, learns it, and is one of the next.
    job.silent = set()
    assert "without this node" in job.last(2, "key")["value"]
    job.join_again(2)
    job.tick(1.1)
    assert job.last(0, "waiting") == {"waiting": 1, "present": 3}
    job.join_again(0, 1, trained=[0, 1])
    assert job.ranks() == [0, 1, 2]


def test_a_node_that_was_silent_while_it_waited_is_taken_back():
    job = Job(2, 2)
    job.add("a")
    job.silent = {0}
    job.tick(LOST + 1)
    job.add("b")
    job.tick(LAST_CALL + 1)
    assert job.ranks() == []
    job.silent = set()
    job.tick()
    assert job.ranks() == [0, 1]


@pytest.mark.parametrize("how", ["lost", "silent"])
def test_without_the_node_that_plans_the_others_join_again(how):
    job = Job(2, 3)
    job.add("a", "b", "c")
    if how == "lost":
        job.membership.lose(0, "its agent has exited")
    else:
        job.silent = {0}
        job.tick(LOST + 1)
    job.tick()
    assert job.last(1, "key")["value"] == job.last(2, "key")["value"] == ""
    job.membership.put(1, 1, "order", "late")
    job.take()
    assert job.last(1, "key")["value"] == "", "the first value stays"
    job.join_again(1, 2)
    job.tick(LAST_CALL + 1)
    assert job.ranks() == [1, 2]


def test_the_others_are_informed_of_a_lost_node_but_not_of_one_that_leaves():
    job = Job(3, 3)
    job.add("a", "b", "c")
    job.plan(3)
    job.membership.lose(2, "its agent has exited")
    job.take()
    assert job.last(0, "lost") == {"round": 1, "lost": 2, "why": "c: its agent has exited"}
    job.membership.leave(1)
    job.tick()
    assert job.last(0, "lost")["lost"] == 2
    job.membership.lose(7, "unknown")


def test_values_are_of_one_round_and_the_first_stays():
    job = Job(2, 2)
    job.add("a", "b")
    job.plan(2)
    for value in ("first", "second"):
        job.membership.put(1, 1, "lost", value)
    job.membership.put(1, 0, "end", "of an old round")
    job.take()
    values = [m["value"] for m in job.received[0] if m.get("key") != "order" and "key" in m]
    assert values == ["first"]
    job.membership.largest(0, 1, "entered", 7, 2)
    job.take()
    assert job.last(0, "key")["key"] == "lost"
    job.membership.largest(1, 1, "entered", 9, 2)
    job.membership.largest(1, 1, "entered", 11, 2)
    job.take()
    assert job.last(0, "key") == job.last(1, "key") == {"round": 1, "key": "entered", "value": "9"}
    job.join_again(0)
    job.membership.put(0, 1, "later", "x")
    assert not job.membership.outbox, "it has left the round"


def test_a_closed_job_sends_away_those_that_wait_and_those_that_come():
    job = Job(1, 1)
    job.add("a", "b")
    job.membership.close()
    job.take()
    assert job.last(1, "closed") and not job.last(0, "closed")
    (late,) = job.add("c")
    assert job.last(late, "closed")
    job.join_again(0)
    assert job.last(0, "closed") and job.ranks() == []


def test_messages_grow_with_the_nodes_and_not_with_their_square():
    """2,048 nodes join one by one, fail together, each reporting it, and return."""
    n = 2048
    job = Job(n - 8, n)
    for i in range(n):
        job.membership.connect(i, f"10.0.{i // 256}.{i % 256}", job.now)
        job.received[i] = []
        job.membership.join(i, True, None)
        if i % 100 == 0:
            job.membership.tick(job.now)
    job.membership.tick(job.now)
    job.take()
    assert job.ranks() == list(range(n))
    job.plan(n)
    assert job.sent <= 4 * n
    job.sent = 0
    job.membership.lose(5, "its agent has exited")
    for member in job.membership.members:
        job.membership.put(member, 1, "lost", f"of node {member}")
    for member in [*job.membership.members]:
        job.membership.join(member, False, member)
        job.membership.tick(job.now)
    job.now += LAST_CALL + 0.1
    job.membership.tick(job.now)
    job.take()
    assert len(job.ranks()) == n - 1 and job.sent <= 5 * n


@pytest.mark.parametrize("seed", range(40))
def test_nodes_that_come_go_pause_and_fail_at_random(seed):
    """Every round has one rank each and a valid size, and in the end all that live and fit are in one."""
    draw = random.Random(seed)
    least = draw.randint(1, 3)
    job = Job(least, least + draw.randint(0, 3))
    rounds = set()
    for _ in range(150):
        members = [*job.membership.members]
        what = draw.choice(["add", "lose", "leave", "pause", "wake", "join", "join", "lost", "tick", "tick"])
        one = draw.choice(members) if members else None
        if what == "add" and len(members) < job.membership.most + 2:
            job.add(f"n{draw.randint(0, 12)}")
        elif one is not None and what == "lose":
            job.membership.lose(one, "gone")
        elif one is not None and what == "leave":
            job.membership.leave(one)
        elif what == "pause" and one is not None:
            job.silent.add(one)
        elif what == "wake":
            job.silent.clear()
        elif one is not None and one not in job.silent and job.membership.members[one].turn is None and what == "join":
            job.membership.join(one, False, job.membership.members[one].rank)
        job.tick(draw.choice([0.1, 1.0, 7.0]))
        begun = Counter((m["round"], m["rank"]) for received in job.received.values() for m in received if "rank" in m)
        assert set(begun.values()) <= {1}
        rounds = {number: sum(of == number for of, _ in begun) for number, _ in begun}
        assert all(job.membership.least <= size <= job.membership.most for size in rounds.values())
    job.silent.clear()
    job.add(*["x"] * least)
    last = max(rounds, default=0)
    for member, one in job.membership.members.items():
        if one.turn is None:
            job.membership.join(member, False, one.rank)
    job.tick()
    job.tick(LAST_CALL + 1)
    assert max(m["round"] for received in job.received.values() for m in received if "rank" in m) > last
    assert len(job.ranks()) == min(len(job.membership.members), job.membership.most)


def together(*calls):
    """Run calls in threads of their own; return their results, which may be errors."""
    results = [None] * len(calls)

    def run(index, call):
        try:
            results[index] = call()
        except (StoreLost, JobEnded, RoundBroken) as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def join(one):
    return lambda: one.join(is_fresh=True)


def agree(one, nodes):
    return lambda: one.agree(
        lambda all_fresh: PLAN.__class__(**vars(PLAN) | {"nodes": nodes, "attempt": int(all_fresh)})
    )


def test_two_nodes_share_a_plan_values_and_the_end():
    endpoint = f"127.0.0.1:{free_port()}"
    with contextlib.closing(node(endpoint)) as first, contextlib.closing(node(endpoint)) as second:
        assert first.hosts_store and not second.hosts_store
        assert sorted(together(join(first), join(second))) == [(0, 2), (1, 2)]
        plans = together(agree(first, 2), agree(second, 2))
        assert plans[0] == plans[1] and plans[0].attempt == 1
        second.send("stop/requeue", "asked")
        wait_for(lambda: first.received("stop/requeue"))
        assert first.maximum("entered", 4, 2) is None
        assert (
            wait_for(lambda: second.maximum("entered", 5, 2)) == wait_for(lambda: first.maximum("entered", 9, 2)) == 5
        )
        assert first.present() == 2 and first.lost_nodes() == {}
        with contextlib.closing(node(endpoint)) as third:
            waits = threading.Thread(target=lambda: ended.append(together(join(third))))
            ended = []
            waits.start()
            wait_for(lambda: first.present() == 3)
            assert first.waiting() == 0, "no place is free"
            Node.__base__.close(first)
            waits.join(60)
            assert [type(error) for (error,) in ended] == [JobEnded]


def test_a_server_that_ends_is_noticed_by_all_calls():
    endpoint = f"127.0.0.1:{free_port()}"
    first = node(endpoint, nodes=(2, 3))
    with contextlib.closing(node(endpoint, nodes=(2, 3))) as second:
        together(join(first), join(second))
        together(agree(first, 2), agree(second, 2))
        first.close()
        wait_for(lambda: second._gone)
        for call in (second.waiting, second.lost_nodes, join(second), lambda: second.send("a", "b")):
            with pytest.raises(StoreLost, match=r"127\.0\.0\.1:"):
                call()


PROGRAM = """
import sys
from rendezvous_nodes import PLAN, node
one = node(sys.argv[1], nodes=(1, 3))
print("connected", flush=True)
while True:
    rank, nodes = one.join(is_fresh=True)
    print("rank", rank, nodes, flush=True)
    if sys.argv[2] == "agree":
        one.agree(lambda all_fresh: PLAN)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def process(endpoint, what="agree"):
    """A node in a process of its own; it joins again for each line that it reads."""
    path = os.pathsep.join([os.path.dirname(__file__) + "/lib", *sys.path])
    command = [sys.executable, "-c", PROGRAM, endpoint, what]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **pipes)
    try:
        assert started.stdout.readline() == "connected\n"
        yield started
    finally:
        started.kill()
        started.wait()
        started.stdin.close()
        started.stdout.close()


def test_a_killed_node_is_known_at_once_and_replaced():
    """No timeout passes for the killed one: keep-alives would be late after minutes."""
    endpoint = f"127.0.0.1:{free_port()}"
    slow = Times(60, 60, last_call_timeout=0.2, keep_alive_interval=100)
    with contextlib.closing(node(endpoint, (2, 3), slow)) as first:
        with process(endpoint) as killed:
            together(join(first))
            together(agree(first, 2))
            assert killed.stdout.readline() in ("rank 1 2\n", "rank 0 2\n")
            killed.kill()
            assert [*wait_for(lambda: first.lost_nodes()).values()] == ["127.0.0.1: its agent has exited"]
        with process(endpoint) as back:
            assert together(join(first))[0][1] == 2
            assert back.stdout.readline().endswith(" 2\n")


def test_a_stopped_node_is_not_waited_for_and_joins_when_it_continues():
    endpoint = f"127.0.0.1:{free_port()}"
    quick = TIMES.__class__(60, 60, last_call_timeout=1.0, keep_alive_interval=0.1)
    with contextlib.closing(node(endpoint, (1, 3), quick)) as first, process(endpoint) as other:
        wait_for(lambda: first.waiting() == 1)
        assert together(join(first)) == [(1, 2)]
        together(agree(first, 2))
        assert other.stdout.readline() == "rank 0 2\n"
        os.kill(other.pid, signal.SIGSTOP)
        wait_for(lambda: first.present() == 1)
        assert first.lost_nodes() == {}, "it may come back"
        assert together(join(first)) == [(0, 1)]
        together(agree(first, 1))
        os.kill(other.pid, signal.SIGCONT)
        other.stdin.write("\n")
        other.stdin.flush()
        wait_for(lambda: first.waiting() == 1)
        assert together(join(first))[0][1] == 2
        assert other.stdout.readline().endswith(" 2\n")


def test_the_node_that_plans_exits_before_its_plan():
    """The other one joins again instead of waiting for ever."""
    endpoint = f"127.0.0.1:{free_port()}"
    with contextlib.closing(node(endpoint, (2, 2))) as first, contextlib.closing(node(endpoint)) as second:
        found = dict(zip(together(join(first), join(second)), (first, second), strict=True))
        planner, other = found[0, 2], found[1, 2]
        waits, ended = [], threading.Thread(target=lambda: waits.extend(together(agree(other, 2))))
        ended.start()
        if planner is first:  # it hosts the server, and gives up its round like a node that was asked to stop
            planner._send(do="leave")
        else:
            planner.leave()
        ended.join(60)
        assert [type(error) for error in waits] == [RoundBroken]


def test_clocks_play_no_part(monkeypatch):
    """The wall clock of every node jumps: nothing is lost."""
    endpoint = f"127.0.0.1:{free_port()}"
    with joined(endpoint) as first:
        monkeypatch.setattr("time.time", lambda: 5.0)
        assert first.present() == 1
        first.send("a", "b")
        assert wait_for(lambda: first.received("a")) == "b"
