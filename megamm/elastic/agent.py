"""The agent of a node: starts its ranks, watches them, and starts them again when something has failed.

It is modelled on torch's elastic agent and uses its rendezvous (rendezvous.py), but not its process handling: torch's
agent imports everything again at each start, and sends SIGTERM and then waits up to half a minute, which a stopped
rank, or one inside a collective, uses in full. Exited ranks are detected at once, hung ones by hang_detector.py. In
both cases all ranks are killed, and group rank 0 decides by restart_policy.py whether to make another attempt.

Usage: `python -m megamm.elastic.agent REQUESTS`. The first line of standard input is a plan (launcher_messages.py),
later lines are commands. REQUESTS is the descriptor of the socket on which it asks the command for templates.
"""

import logging
import os
import socket
import sys
import time
from dataclasses import replace
from typing import Any

from megamm import __version__
from megamm.common import events, exit_codes, processes
from megamm.common.errors import UserError
from megamm.elastic import hang_detector, heartbeat, restart_policy, run_lock
from megamm.elastic.launcher_messages import Commands, Plan
from megamm.elastic.rendezvous import Alone, Background, Ended, Membership, Order, Rendezvous, StoreLost
from megamm.elastic.restart_cycle import Attempt, Outcome
from megamm.elastic.workers import TemplateLost, Workers

log = logging.getLogger(__name__)
_TICK, _LINGER = 0.1, 1.5
_NEEDED = 10.0
"""After this many seconds without an agent connected to this node's store the job has ended: a restart takes less."""


class Stopped(Exception):
    """A stop was requested while there was nothing to save."""


class Agent:
    """Agent of one node. `run` returns the command's exit code."""

    def __init__(self, plan: Plan, commands: Commands, requests: socket.socket) -> None:
        self.plan, self.commands = plan, commands
        self.workers = Workers(plan.processes, requests)
        # Durations of this launch only: another launch may have used other machines.
        known = {} if plan.is_fresh else heartbeat.longest(plan.run)
        self.watch = hang_detector.Watch(plan.limits, plan.run, longest=known)
        self.membership: Membership
        self.is_fresh, self.attempt = plan.is_fresh, -1
        self.failures: list[restart_policy.Failure] = []
        self.teardown = 0.0
        self.listener: socket.socket | None = None
        self._lock: int | None = None

    def run(self) -> int:
        try:
            self.workers.prepare()
            self.membership = self._wait_for(self._meet)
            while True:
                outcome = self._next_attempt()
                if outcome.code is not None:
                    return outcome.code
        except Ended:
            log.info("the job ended while this node was waiting")
            return exit_codes.DONE
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return exit_codes.USER_ERROR
        except StoreLost as error:
            log.warning("lost the rendezvous store: %s", error)
            return exit_codes.CRASHED
        except Stopped:
            return exit_codes.REQUEUE
        finally:
            self.workers.close()

    def _meet(self) -> Membership:
        plan = self.plan
        if plan.rendezvous is None:
            return Alone()
        job = {"megamm": __version__, "nproc": plan.processes, "nnodes": plan.nodes, "config": plan.config}
        return Rendezvous(plan.rendezvous, plan.nodes, plan.times, job)

    def _next_attempt(self) -> Outcome:
        begin = time.monotonic()
        group_rank, nodes = self._wait_for(self.membership.join)
        order: Order = self._wait_for(
            lambda: self.membership.agree(self.is_fresh, lambda all_fresh: self._decide(all_fresh, nodes, begin))
        )
        self.is_fresh, self.attempt = False, order.attempt
        if order.gives_up:
            if group_rank == 0:
                print(f"error: {order.gives_up}", file=sys.stderr)
            if self.plan.rendezvous is not None:
                self._leave(order.code, group_rank)
            return Outcome(order.code)
        self._pause(order.pause)
        if group_rank >= order.nodes:
            log.info("spare node: waiting to replace a lost node")
            return self._spare()
        attempt = Attempt(self.plan, self.workers, self.watch, self.membership, order, group_rank)
        outcome = attempt.run(self.commands, self.listener)
        self._end_ranks()
        if outcome.failure is not None:
            self.failures.append(outcome.failure)
        if outcome.code == exit_codes.EVICTED:
            self._part()
        elif outcome.code is not None and self.plan.rendezvous is not None:
            self._leave(outcome.code, group_rank)
        return outcome

    def _decide(self, all_fresh: bool, nodes: int, begin: float) -> Order:
        """Decide, on group rank 0, for all nodes."""
        record, run = self._record, self.plan.run
        try:
            self._lock = self._lock or run_lock.hold(run, self._job())
        except UserError as error:
            return Order(0, nodes, 0.0, self.membership.address, 0, str(error), exit_codes.USER_ERROR)
        known = [] if all_fresh else events.read(run)
        seen = {f.attempt: f for f in [*restart_policy.from_events(known), *self.failures]}
        self.failures = [seen[attempt] for attempt in sorted(seen)]
        attempt = 1 + max([self.attempt, *seen, *restart_policy.attempts(known)])
        failed = bool(self.failures) and self.failures[-1].attempt == attempt - 1
        verdict = restart_policy.judge(self.failures, self.plan.rules) if failed else restart_policy.Verdict()
        active = max(n for n in self.plan.admissible if n <= nodes)
        port = self._listen()
        order = Order(attempt, active, verdict.pause, self.membership.address, port)
        shape = {"attempt": attempt, "nodes": active, "spares": nodes - active, "ranks": active * self.plan.processes}
        if verdict.gives_up:
            record("gave_up", why=verdict.gives_up, attempt=attempt - 1)
            code = exit_codes.GAVE_UP if self.plan.rules.max_restarts else exit_codes.CRASHED
            why = f"gave up: {verdict.gives_up}; see {run / events.EVENTS}"
            return replace(order, gives_up=why, code=code)
        if attempt == 0:
            record("launched", restart=0, **shape)
        else:
            last = self.failures[-1] if failed else None
            record(
                "restarting",
                restart=len(self.failures),
                reason="failure" if last else "nodes changed",
                after=last.step if last else None,
                backoff=verdict.pause,
                teardown=round(self.teardown, 3),
                rendezvous=round(time.monotonic() - begin, 3),
                **shape,
            )
        return order

    def _job(self) -> str:
        """Name of this job: the same on all its nodes, different for every other job."""
        if self.membership.address != "127.0.0.1":
            return str(self.plan.rendezvous)
        return f"{self.plan.rendezvous or self.plan.command} of {socket.gethostname()}"

    def _listen(self) -> int:
        """Open the socket of the job's store, where the ranks rendezvous."""
        if self.listener is not None:
            self.listener.close()
        self.listener = socket.create_server(
            ("127.0.0.1" if self.membership.address == "127.0.0.1" else "", 0), backlog=1024
        )
        return self.listener.getsockname()[1]

    def _end_ranks(self) -> None:
        begin = time.monotonic()
        try:
            self.workers.kill()
        except TemplateLost:
            log.warning("the ranks' template process has exited; the next attempt starts a new one")
        self.teardown = time.monotonic() - begin

    def _spare(self) -> Outcome:
        """Wait until nodes join or leave; then all nodes rendezvous again."""
        while True:
            self._tick()
            code = self.membership.told("end")
            if code is not None:
                return Outcome(int(code))
            if self.membership.told("lost") is not None or self.membership.waiting():
                return Outcome(None)

    def _part(self) -> None:
        """Leave the job. If this node hosts its store, keep serving it for the other nodes."""
        self.membership.part()
        needed, signals = time.monotonic(), 0
        # The first signal also reaches the other nodes, which use this store to agree on the step to stop after.
        while self.membership.hosts_store and time.monotonic() - needed < _NEEDED and signals < 2:
            if self.membership.serves():
                needed = time.monotonic()
            self.commands.wait(_LINGER)
            signals += self.commands.take() is not None

    def _leave(self, code: int, group_rank: int) -> None:
        """Tell the other nodes how the job ended, and wait until they know: this process may host the store."""
        try:
            self.membership.tell("end", str(code))
            if group_rank == 0:
                self.membership.close()
            deadline = time.monotonic() + _LINGER
            while time.monotonic() < deadline:
                self._tick()
        except StoreLost:
            log.info("the node that hosts the store has already left")

    def _wait_for(self, call: Any) -> Any:
        """Return the call's result; read commands while it runs."""
        if self.plan.rendezvous is None:
            return call()
        background = Background(call)
        while not background.is_done:
            self._tick()
        return background.result()

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._tick()

    def _tick(self) -> None:
        self.commands.wait(_TICK)
        if self.commands.take():
            raise Stopped

    def _record(self, kind: str, **fields: Any) -> None:
        try:
            events.record(self.plan.run, kind, **fields)
        except OSError as error:  # a full disk must not end a run that can still write a checkpoint
            log.warning("cannot record the event %s: %s", kind, error)


def main() -> None:
    """Run the agent as a process."""
    processes.ignore_stop_signals()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    commands = Commands(sys.stdin.fileno())
    plan = Plan.from_json(commands.first_line())
    processes.die_with_parent(plan.command)
    code = Agent(plan, commands, socket.socket(fileno=int(sys.argv[1]))).run()
    # Not sys.exit: threads of the rendezvous may be inside the store's C++ code, where interpreter shutdown calls
    # std::terminate, and a clean exit would become SIGABRT.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
