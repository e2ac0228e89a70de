"""The agent of a node: starts its ranks, watches them, and starts them again when something has failed.

It is modelled on torch's elastic agent, but does not use it. That agent imports everything again at each start, and
sends SIGTERM and then waits up to half a minute, which a stopped rank, or one inside a collective, uses in full; and
each request of its rendezvous carries the state of all nodes, so that nodes that join cost the square of their number
(benchmarks/rendezvous.py). Exited ranks are detected at once, hung ones by hang_detector.py. In
both cases all ranks are killed, and group rank 0 decides by restart_policy.py whether to make another attempt.

Usage: `python -m megamm.elastic.agent REQUESTS`. The first line of standard input is a plan (launcher_messages.py),
later lines are signals. REQUESTS is the descriptor of the socket on which it asks the launcher for prefork parents.
"""

import logging
import os
import socket
import sys
import time
from typing import Any

from megamm import __version__
from megamm.common import addresses, events, exit_codes, processes
from megamm.common.errors import UserError
from megamm.elastic import hang_detector, heartbeat, restart_policy, run_lock
from megamm.elastic.endpoint import parse_endpoint
from megamm.elastic.launcher_messages import LauncherChannel, LaunchPlan
from megamm.elastic.rendezvous import (
    AttemptPlan,
    Background,
    JobEnded,
    Rendezvous,
    RoundBroken,
    SingleNode,
    StoreLost,
)
from megamm.elastic.rendezvous_client import MultiNode
from megamm.elastic.restart_cycle import CycleOutcome, RestartCycle
from megamm.elastic.workers import PreforkParentLost, Workers

log = logging.getLogger(__name__)
_TICK = 0.1
_REPORT = 30.0
"""Seconds between two lines about nodes that are missing."""
_LINGER = 1.5
"""Seconds for which this process serves its store after the job has ended, so that the others can read how it ended."""
_NEEDED = 10.0
"""After this many seconds without an agent connected to this node's store the job has ended: a restart takes less."""


class Stopped(Exception):
    """A stop was requested while there was nothing to save."""


class NodesMissing(Exception):
    """Too few nodes have come within the limit."""


class Agent:
    """Agent of one node. `run` returns its exit code, which the launcher passes on."""

    def __init__(self, plan: LaunchPlan, launcher: LauncherChannel, requests: socket.socket) -> None:
        self.plan, self.launcher = plan, launcher
        self.workers = Workers(plan.processes, requests)
        # Durations of this launch only: another launch may have used other machines.
        known = {} if plan.is_fresh else heartbeat.longest(plan.run)
        self.detector = hang_detector.HangDetector(plan.limits, plan.run, longest=known)
        self._met: Rendezvous | None = None
        self._host: str | None = None
        """The host of the rendezvous, once this process looks for it."""
        self.is_fresh, self.attempt = plan.is_fresh, -1
        self.failures: list[restart_policy.Failure] = []
        self.teardown = 0.0
        self.listener: socket.socket | None = None
        self._lock: int | None = None

    def run(self) -> int:
        try:
            self.workers.prepare()
            self._met = self._wait_for(self._meet)
            while True:
                outcome = self._next_attempt()
                if outcome.code is not None:
                    return outcome.code
        except JobEnded:
            log.info("the job ended while this node was waiting")
            return exit_codes.DONE
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return exit_codes.USER_ERROR
        except StoreLost as error:
            log.warning("lost the rendezvous: %s", error)
            return exit_codes.CRASHED
        except NodesMissing as error:
            print(f"error: {error}", file=sys.stderr)
            return exit_codes.AGENT_ALONE
        except Stopped:
            return exit_codes.REQUEUE
        finally:
            if self._met is not None:
                self._met.leave()  # so that the others do not take it for lost
            self.workers.close()

    @property
    def rendezvous(self) -> Rendezvous:
        assert self._met is not None
        return self._met

    def _meet(self) -> Rendezvous:
        plan = self.plan
        if plan.endpoint is None:
            return SingleNode()
        self._host = parse_endpoint(plan.endpoint)[0]
        job = {"megamm": __version__, "nproc": plan.processes, "nnodes": plan.nodes, "config": plan.config}
        return MultiNode(plan.endpoint, plan.nodes, plan.times, job)

    def _next_attempt(self) -> CycleOutcome:
        begin = time.monotonic()
        group_rank, nodes = self._wait_for(lambda: self.rendezvous.join(self.is_fresh))
        try:
            attempt_plan: AttemptPlan = self._wait_for(
                lambda: self.rendezvous.agree(lambda all_fresh: self._decide(all_fresh, nodes, begin))
            )
        except RoundBroken as error:
            log.warning("joining again: %s", error)
            return CycleOutcome(None)
        self.is_fresh, self.attempt = False, attempt_plan.attempt
        if attempt_plan.gives_up:
            if group_rank == 0:
                print(f"error: {attempt_plan.gives_up}", file=sys.stderr)
            if self.plan.endpoint is not None:
                self._announce_end(attempt_plan.code, group_rank)
            return CycleOutcome(attempt_plan.code)
        self._pause(attempt_plan.pause)
        if group_rank >= attempt_plan.nodes:
            log.info("spare node: waiting to replace a lost node")
            return self._wait_as_spare(nodes)
        cycle = RestartCycle(self.plan, self.workers, self.detector, self.rendezvous, attempt_plan, group_rank)
        outcome = cycle.run(self.launcher, self.listener)
        self._end_ranks()
        if outcome.failure is not None:
            self.failures.append(outcome.failure)
        if outcome.code == exit_codes.EVICTED:
            self._leave_evicted()
        elif outcome.code is not None and self.plan.endpoint is not None:
            self._announce_end(outcome.code, group_rank)
        return outcome

    def _decide(self, all_fresh: bool, nodes: int, begin: float) -> AttemptPlan:
        """Decide, on group rank 0, about the next attempt for all nodes, and record the decision.

        all_fresh: no agent of the job has made an attempt in this launch. begin: start of this rendezvous.
        """
        run, address = self.plan.run, self.rendezvous.address
        try:
            self._lock = self._lock or run_lock.hold(run, self._job())
        except UserError as error:
            return AttemptPlan(0, nodes, 0.0, address, 0, str(error), exit_codes.USER_ERROR)
        attempt, failure = self._next_after([] if all_fresh else events.read(run))
        # No policy applies after an attempt that did not fail: nodes have joined or left.
        verdict = restart_policy.judge(self.failures, self.plan.rules) if failure else restart_policy.Verdict()
        if verdict.gives_up:
            self._record("gave_up", why=verdict.gives_up, attempt=attempt - 1)
            code = exit_codes.GAVE_UP if self.plan.rules.max_restarts else exit_codes.CRASHED
            why = f"gave up: {verdict.gives_up}; see {run / events.EVENTS}"
            return AttemptPlan(attempt, nodes, 0.0, address, 0, why, code)
        active = max(n for n in self.plan.admissible if n <= nodes)
        attempt_plan = AttemptPlan(attempt, active, verdict.pause, address, self._listen())
        self._record_plan(attempt_plan, failure, spares=nodes - active, seconds=time.monotonic() - begin)
        return attempt_plan

    def _next_after(self, known: list[dict[str, Any]]) -> tuple[int, restart_policy.Failure | None]:
        """Return the number of the next attempt, and the failure of the one before; None if that one did not fail.

        known: the recorded events. The agent that decided before may have been on another node or may have exited, so
        its failures are read from there. This agent's own failures count even if they could not be recorded.
        """
        failures = {f.attempt: f for f in [*restart_policy.from_events(known), *self.failures]}
        self.failures = [failures[attempt] for attempt in sorted(failures)]
        attempt = 1 + max([self.attempt, *failures, *restart_policy.attempts(known)])
        return attempt, failures.get(attempt - 1)

    def _record_plan(
        self, plan: AttemptPlan, failure: restart_policy.Failure | None, spares: int, seconds: float
    ) -> None:
        shape = {
            "attempt": plan.attempt,
            "nodes": plan.nodes,
            "spares": spares,
            "ranks": plan.nodes * self.plan.processes,
        }
        if plan.attempt == 0:
            self._record("launched", restart=0, **shape)
            return
        self._record(
            "restarting",
            restart=len(self.failures),
            reason="failure" if failure else "nodes changed",
            after=failure.step if failure else None,
            backoff=plan.pause,
            teardown=round(self.teardown, 3),
            rendezvous=round(seconds, 3),
            **shape,
        )

    def _job(self) -> str:
        """Name of this job: the same on all its nodes, different for every other job."""
        if self.rendezvous.address != addresses.LOOPBACK:
            return str(self.plan.endpoint)
        return f"{self.plan.endpoint or self.plan.launcher_pid} of {socket.gethostname()}"

    def _listen(self) -> int:
        """Open the socket of the job's store, where the ranks rendezvous."""
        if self.listener is not None:
            self.listener.close()
        self.listener = socket.create_server(
            (addresses.LOOPBACK if self.rendezvous.address == addresses.LOOPBACK else "", 0), backlog=1024
        )
        return self.listener.getsockname()[1]

    def _end_ranks(self) -> None:
        begin = time.monotonic()
        try:
            self.workers.kill()
        except PreforkParentLost:
            log.warning("the ranks' prefork parent has exited; the next attempt starts a new one")
        self.teardown = time.monotonic() - begin

    def _wait_as_spare(self, nodes: int) -> CycleOutcome:
        """Wait until nodes join or leave; then all nodes rendezvous again. nodes: of this round, with the spares."""
        while True:
            self._tick()
            code = self.rendezvous.received("end")
            if code is not None:
                return CycleOutcome(int(code))
            # The nodes that train may all be lost at once, so that none of them reports it.
            is_smaller = self.rendezvous.present() < nodes or bool(self.rendezvous.lost_nodes())
            if is_smaller or self.rendezvous.received("lost") is not None or self.rendezvous.waiting():
                return CycleOutcome(None)

    def _leave_evicted(self) -> None:
        """Leave the job. If this node hosts its store, keep serving it for the other nodes."""
        self.rendezvous.leave()
        needed, signals = time.monotonic(), 0
        # The first signal also reaches the other nodes, which use this store to agree on the step to stop after.
        while self.rendezvous.hosts_store and time.monotonic() - needed < _NEEDED and signals < 2:
            if self.rendezvous.serves_others():
                needed = time.monotonic()
            self.launcher.wait(_LINGER)
            signals += self.launcher.take_signal() is not None

    def _announce_end(self, code: int, group_rank: int) -> None:
        """Tell the other nodes how the job ended, and wait until they know: this process may host the store."""
        try:
            self.rendezvous.send("end", str(code))
            if group_rank == 0:
                self.rendezvous.close()
            deadline = time.monotonic() + _LINGER
            while time.monotonic() < deadline:
                self._tick()
        except StoreLost:
            log.info("the node that hosts the store has already left")

    def _wait_for(self, call: Any) -> Any:
        """Return the call's result; meanwhile read signals from the launcher, and report which nodes are missing.

        Raises NodesMissing after rendezvous.join_timeout; once the job has run, after rendezvous.lost_timeout.
        """
        if self.plan.endpoint is None:
            return call()
        times, background = self.plan.times, Background(call)
        name, limit = ("join", times.join_timeout) if self.is_fresh else ("lost", times.lost_timeout)
        begin = reported = time.monotonic()
        while not background.is_done:
            self._tick()
            now, missing = time.monotonic(), self._missing()
            if missing <= 0:  # complete, or this node is a spare, which waits for as long as the job runs
                begin = now
            elif now - begin > limit:
                why = f"resilience.rendezvous.{name}_timeout = {limit:g} s is over; start the job again"
                raise NodesMissing(f"gave up waiting for {self._described(missing)}: {why}")
            elif now - max(begin, reported) > min(_REPORT, limit / 4):
                reported = now
                until = time.strftime("%H:%M:%S", time.localtime(time.time() + limit - (now - begin)))
                log.warning("waiting for %s, %d s, until %s", self._described(missing), now - begin, until)
        return background.result()

    def _missing(self) -> int:
        """Return how many nodes are missing, as far as this node knows; at most 0 if there are enough."""
        if self._met is None:
            return int(self._host is not None)
        return self.plan.nodes[0] - self._met.present()

    def _described(self, missing: int) -> str:
        if self._met is not None:
            return f"{missing} of {self.plan.nodes[0]} nodes at {self.plan.endpoint}"
        if addresses.resolve(str(self._host)):
            return f"the node at {self.plan.endpoint}"
        return f"{self._host}: the name does not resolve here"

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._tick()

    def _tick(self) -> None:
        self.launcher.wait(_TICK)
        if self.launcher.take_signal():
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
    launcher = LauncherChannel(sys.stdin.fileno())
    plan = LaunchPlan.from_json(launcher.first_line())
    processes.die_with_parent(plan.launcher_pid)
    code = Agent(plan, launcher, socket.socket(fileno=int(sys.argv[1]))).run()
    # Not sys.exit: a thread may still wait for the rendezvous.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
