"""One attempt of a node's ranks, from their start until all are done, one has failed, or the attempt is cancelled."""

import logging
import os
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

from megamm.common import events, exit_codes, processes
from megamm.elastic import hang_detector, restart_policy
from megamm.elastic.graceful_stop import GracefulStop
from megamm.elastic.heartbeat import ATTEMPT
from megamm.elastic.launcher_messages import LauncherChannel, LaunchPlan
from megamm.elastic.rank import report_eviction
from megamm.elastic.rendezvous import AttemptPlan, Rendezvous, StoreLost
from megamm.elastic.workers import PreforkParentLost, Workers

log = logging.getLogger(__name__)
_TICK, _REMOTE = 0.1, 0.5
"""Seconds between two looks at the local ranks, and between two looks at what other nodes have sent."""
_GOOD = (exit_codes.RANK_DONE, exit_codes.RANK_REGROUP, exit_codes.RANK_EVICTED, exit_codes.REQUEUE)
"""Exit codes of ranks that have not failed."""


@dataclass(frozen=True)
class CycleOutcome:
    """Result of an attempt. code: exit code of the agent, None for a new rendezvous; failure: of this node's ranks."""

    code: int | None
    failure: restart_policy.Failure | None = None


class RestartCycle:
    """Runs one attempt. At its end it leaves the ranks running: the agent kills them."""

    def __init__(
        self,
        plan: LaunchPlan,
        workers: Workers,
        detector: hang_detector.HangDetector,
        rendezvous: Rendezvous,
        attempt_plan: AttemptPlan,
        group_rank: int,
    ) -> None:
        self.plan, self.workers, self.detector, self.rendezvous = plan, workers, detector, rendezvous
        self.attempt_plan, self.group_rank = attempt_plan, group_rank
        self.stop = GracefulStop(workers.page, rendezvous, attempt_plan.nodes)
        first = group_rank * plan.processes
        self.ranks = list(range(first, first + plan.processes))
        self._asked_others, self.began = 0.0, 0.0
        self._signalled = False

    def run(self, launcher: LauncherChannel, listener: socket.socket | None) -> CycleOutcome:
        """Start the ranks and watch them; listener: this node's socket for the job's store, if it hosts it."""
        try:
            self.began = time.monotonic()
            self.workers.start([self._environment(i) for i in range(len(self.ranks))], listener)
            while True:
                watched = [self.workers.channel] if self.workers.channel is not None else []
                launcher.wait(_TICK, watched)
                outcome = self._take_signals(launcher) or self._look() or self._ask_others()
                if outcome is not None:
                    return outcome
                self.stop.advance()
        except PreforkParentLost:
            return self._failed(None, "the ranks' prefork parent exited", self.workers.page.ranks[0].phase)

    def _environment(self, index: int) -> dict[str, str]:
        """Return a rank's environment, as torchrun sets it; prefork.py adds HEARTBEAT_PAGE."""
        world = self.attempt_plan.nodes * self.plan.processes
        name, interface = "GLOO_SOCKET_IFNAME", self.rendezvous.interface
        return ({name: interface} if interface and name not in os.environ else {}) | {
            "RANK": str(self.ranks[index]),
            "LOCAL_RANK": str(index),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(self.plan.processes),
            "GROUP_RANK": str(self.group_rank),
            "GROUP_WORLD_SIZE": str(self.attempt_plan.nodes),
            "MASTER_ADDR": self.attempt_plan.address,
            "MASTER_PORT": str(self.attempt_plan.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 serves it from the start (rank.py)
            "TORCHELASTIC_RESTART_COUNT": str(self.attempt_plan.attempt),
            ATTEMPT: str(self.attempt_plan.attempt),
        }

    def _take_signals(self, launcher: LauncherChannel) -> CycleOutcome | None:
        """Handle signals that the launcher received: the first requests a checkpoint, a second one exits.

        A signal on another node does not count as this node's first: schedulers signal all nodes, one after the other.
        """
        while (name := launcher.take_signal()) is not None:
            self._record("signal", signal=name, attempt=self.attempt_plan.attempt)
            if self._signalled:
                return self._cancelled(f"a second signal ({name}) before the checkpoint was complete")
            self._signalled = True
            if not self.workers.pids:
                return CycleOutcome(exit_codes.REQUEUE)  # there is nothing to save
            log.warning("%s: writing a checkpoint after this step, then exiting", name)
            self.stop.ask("requeue", tell_others=True)
        if self.stop.why == "requeue" and time.monotonic() - self.stop.since > self.plan.grace:
            return self._cancelled(f"no checkpoint within resilience.grace_seconds = {self.plan.grace:g}")
        return None

    def _look(self) -> CycleOutcome | None:
        """Check the local ranks: which have exited, and which have been silent for too long."""
        had_ranks = bool(self.workers.pids)
        self.workers.poll()
        if not self.workers.pids:  # there is no prefork parent yet
            slow = time.monotonic() - self.began > self.plan.limits.startup
            return (
                self._failed(None, "no rank was started within resilience.startup_seconds", "start") if slow else None
            )
        if not had_ranks:  # they have just been forked
            self.detector.begin()
        ended, statuses = self.workers.ended, self.workers.page.ranks
        # User errors first: a rank that has one waits to be killed, so it has not exited, but others may have.
        if mistaken := [index for index, status in enumerate(statuses) if status.verdict == exit_codes.USER_ERROR]:
            return self._rank_failed(mistaken[0], exit_codes.USER_ERROR)
        for index, code in ended.items():
            if code not in _GOOD:
                return self._rank_failed(index, code)
        if len(ended) == len(self.ranks):
            if len(set(ended.values())) > 1:
                return self._failed(None, f"ranks ended differently: {sorted(set(ended.values()))}", "end")
            return self._all_exited(ended[0])
        if overdue := [i for i in self.detector.overdue(statuses) if i not in ended]:
            return self._hung(overdue)
        return None

    def _rank_failed(self, index: int, code: int) -> CycleOutcome:
        status, rank = self.workers.page.ranks[index], self.ranks[index]
        if code == exit_codes.USER_ERROR:
            print(status.cause, file=sys.stderr, flush=True)
            self._notify("end", str(code))
            self._record_failure(rank, status.cause, status.phase, self._entered())
            if self.attempt_plan.nodes > 1:
                time.sleep(3 * _REMOTE)  # so that other nodes end their ranks before those see these ones end
            return CycleOutcome(code)
        how = (
            f"ended early ({status.cause or 'exit code 0'})"
            if code == 0
            else status.cause or processes.how_it_ended(code)
        )
        return self._failed(rank, how, status.phase)

    def _all_exited(self, code: int) -> CycleOutcome:
        if code == exit_codes.REQUEUE:
            return CycleOutcome(code)
        if code == exit_codes.RANK_REGROUP:  # after a checkpoint, from which the next attempt resumes
            return CycleOutcome(None)
        if code == exit_codes.RANK_EVICTED:
            status = self.workers.page.ranks[0]
            report_eviction(self.plan.run, status.cause, status.step, self.attempt_plan.attempt)
            return CycleOutcome(exit_codes.EVICTED)
        if self.attempt_plan.nodes > 1 and not self._all_nodes_done():
            return CycleOutcome(None)
        if self.group_rank == 0:
            self._record("finished", step=self.workers.page.ranks[0].step)
        return CycleOutcome(exit_codes.DONE)

    def _all_nodes_done(self) -> bool:
        """Wait for the other nodes' ranks, which have also passed the last barrier."""
        try:
            while self.rendezvous.maximum("done", 0, self.attempt_plan.nodes) is None:
                if self.rendezvous.received("lost") is not None or self._lost_nodes():  # failed after the last step
                    return False
                time.sleep(_TICK)
        except StoreLost:
            log.info("the node that hosts the store has left: all nodes are done")
        return True

    def _hung(self, overdue: list[int]) -> CycleOutcome:
        limit = self.detector.limit(self.workers.page.ranks[overdue[0]])
        entered = self._entered()  # before `examine`, which wakes stopped ranks: they could enter another step
        folder = self.plan.run / hang_detector.HANGS / f"attempt_{self.attempt_plan.attempt:04d}"
        reports = hang_detector.examine(self.workers, self.ranks, self.detector, folder)
        guilty = hang_detector.culprits(reports)
        waiting = sorted({r.collective for r in reports if r.collective})
        chosen = next((r for r in reports if r.rank in guilty), reports[overdue[0]])
        self._record(
            "hang",
            ranks=guilty,
            silent=max(r.silent for r in reports),
            limit=round(limit, 2),
            step=chosen.step,
            phase=chosen.phase,
            collective=waiting,
            dump=str(folder),
            reports=[r.to_json() for r in reports],
            attempt=self.attempt_plan.attempt,
        )
        others = f", others wait in {', '.join(waiting)}" if waiting else ""
        who = f"in {os.path.basename(chosen.innermost)}" if guilty else "of another node's rank"
        return self._failed(
            chosen.rank if guilty else None, f"hang {who}{others}; stacks in {folder}", chosen.phase, entered
        )

    def _ask_others(self) -> CycleOutcome | None:
        """Check, with several nodes, whether one has lost its ranks, wants to stop, or is waiting to join."""
        now = time.monotonic()
        if self.plan.endpoint is None or now - self._asked_others < _REMOTE:
            return None
        self._asked_others = now
        # DONE is not taken over: this node's ranks also exit with their own result.
        if (code := self.rendezvous.received("end")) is not None and int(code) != exit_codes.DONE:
            return CycleOutcome(int(code))
        if self.rendezvous.received("lost") is not None:
            log.warning("another node has lost its ranks")
            return CycleOutcome(None)
        if lost := self._lost_nodes():
            # One node records it for all.
            if self.group_rank != min({*range(self.attempt_plan.nodes)} - {*lost}):
                return CycleOutcome(None)
            return self._failed(None, f"lost node {min(lost)}, {lost[min(lost)]}", self.workers.page.ranks[0].phase)
        self.stop.follow()
        if self.group_rank == 0 and self.stop.why is None and (waiting := self.rendezvous.waiting()):
            best = max(n for n in self.plan.admissible if n <= self.attempt_plan.nodes + waiting)
            if best > self.attempt_plan.nodes:
                log.info("%d nodes are waiting to join: writing a checkpoint, then all nodes restart", waiting)
                self.stop.ask("regroup", tell_others=True)
        return None

    def _lost_nodes(self) -> dict[int, str]:
        """Return the lost nodes of this attempt; spare nodes do not matter to it."""
        return {node: why for node, why in self.rendezvous.lost_nodes().items() if node < self.attempt_plan.nodes}

    def _cancelled(self, why: str) -> CycleOutcome:
        self._record_failure(None, why, self.workers.page.ranks[0].phase, self._entered())
        print(f"error: {why}", file=sys.stderr)
        return CycleOutcome(exit_codes.CRASHED)

    def _failed(self, rank: int | None, cause: str, phase: str, entered: int | None = None) -> CycleOutcome:
        """Record a failure; another attempt may follow, but not after a signal."""
        failure = self._record_failure(rank, cause, phase, entered if entered is not None else self._entered())
        self._notify("lost", cause)
        log.warning("attempt %d failed: %s", self.attempt_plan.attempt, failure.describe())
        return CycleOutcome(exit_codes.CRASHED if self.stop.why == "requeue" else None, failure)

    def _entered(self) -> int:
        """Return the step that the ranks have begun, 0 before the first."""
        return max(0, *(status.entered for status in self.workers.page.ranks))

    def _record_failure(self, rank: int | None, cause: str, phase: str, entered: int) -> restart_policy.Failure:
        failure = restart_policy.Failure(self.attempt_plan.attempt, entered or None, phase, rank, cause)
        self._record("failed", **vars(failure))
        return failure

    def _notify(self, key: str, value: str) -> None:
        try:
            self.rendezvous.send(key, value)
        except StoreLost:
            log.warning("cannot notify the other nodes: the rendezvous is lost")

    def _record(self, kind: str, **fields: Any) -> None:
        try:
            events.record(self.plan.run, kind, **fields)
        except OSError as error:  # a full disk must not end a run that can still write a checkpoint
            log.warning("cannot record the event %s: %s", kind, error)
