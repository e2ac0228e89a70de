"""One attempt of a node's ranks, from their start until all are done, one has failed, or the attempt is cancelled."""

import logging
import os
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

from megamm.common import events, exit_codes, processes
from megamm.elastic import hang_detector, node_fault, restart_policy
from megamm.elastic.graceful_stop import Stop
from megamm.elastic.heartbeat import ATTEMPT
from megamm.elastic.launcher_messages import Commands, Plan
from megamm.elastic.rendezvous import Membership, Order, StoreLost
from megamm.elastic.workers import TemplateLost, Workers

log = logging.getLogger(__name__)
_TICK, _REMOTE = 0.1, 0.5
_GOOD = (exit_codes.RANK_DONE, exit_codes.RANK_REGROUP, exit_codes.RANK_EVICTED, exit_codes.REQUEUE)


@dataclass(frozen=True)
class Outcome:
    """Result of an attempt. code: the command's exit code, None for a new rendezvous; failure: of this node's ranks."""

    code: int | None
    failure: restart_policy.Failure | None = None


class Attempt:
    """Runs one attempt. At its end it leaves the ranks running: the agent kills them."""

    def __init__(
        self,
        plan: Plan,
        workers: Workers,
        watch: hang_detector.Watch,
        membership: Membership,
        order: Order,
        group_rank: int,
    ) -> None:
        self.plan, self.workers, self.watch, self.membership = plan, workers, watch, membership
        self.order, self.group_rank = order, group_rank
        self.stop = Stop(workers.slots, membership, group_rank, order.nodes)
        first = group_rank * plan.processes
        self.ranks = list(range(first, first + plan.processes))
        self._asked_others, self.began = 0.0, 0.0
        self._signalled = False

    def run(self, commands: Commands, listener: socket.socket | None) -> Outcome:
        """Start the ranks and watch them; listener: this node's socket for the job's store, if it hosts it."""
        try:
            self.began = time.monotonic()
            self.workers.start([self._environment(i) for i in range(len(self.ranks))], listener)
            while True:
                watched = [self.workers.channel] if self.workers.channel is not None else []
                commands.wait(_TICK, watched)
                outcome = self._heed(commands) or self._look() or self._ask_others()
                if outcome is not None:
                    return outcome
                self.stop.advance()
        except TemplateLost:
            return self._failed(None, "the ranks' template process exited", self.workers.slots.ranks[0].phase)

    def _environment(self, index: int) -> dict[str, str]:
        """Return a rank's environment, as torchrun sets it for torch.distributed and others (SLOTS: prefork.py)."""
        world = self.order.nodes * self.plan.processes
        return {
            "RANK": str(self.ranks[index]),
            "LOCAL_RANK": str(index),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(self.plan.processes),
            "GROUP_RANK": str(self.group_rank),
            "GROUP_WORLD_SIZE": str(self.order.nodes),
            "MASTER_ADDR": self.order.address,
            "MASTER_PORT": str(self.order.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 serves it from the start (rank.py)
            "TORCHELASTIC_RESTART_COUNT": str(self.order.attempt),
            ATTEMPT: str(self.order.attempt),
        }

    def _heed(self, commands: Commands) -> Outcome | None:
        """Handle signals that the command received: the first requests a checkpoint, a second one exits.

        A signal on another node does not count as this node's first: schedulers signal all nodes, one after the other.
        """
        while (name := commands.take()) is not None:
            self._record("signal", signal=name, attempt=self.order.attempt)
            if self._signalled:
                return self._called_off(f"a second signal ({name}) before the checkpoint was complete")
            self._signalled = True
            if not self.workers.pids:
                return Outcome(exit_codes.REQUEUE)  # there is nothing to save
            log.warning("%s: writing a checkpoint after this step, then exiting", name)
            self.stop.ask("requeue", tell_others=True)
        if self.stop.why == "requeue" and time.monotonic() - self.stop.since > self.plan.grace:
            return self._called_off(f"no checkpoint within resilience.grace_seconds = {self.plan.grace:g}")
        return None

    def _look(self) -> Outcome | None:
        """Check the local ranks: which have exited, and which have been silent for too long."""
        had_ranks = bool(self.workers.pids)
        self.workers.poll()
        if not self.workers.pids:  # there is no template yet
            slow = time.monotonic() - self.began > self.plan.limits.startup
            return (
                self._failed(None, "no rank was started within resilience.startup_seconds", "start") if slow else None
            )
        if not had_ranks:
            self.watch.begin()
        ended, slots = self.workers.ended, self.workers.slots.ranks
        if mistaken := [index for index, slot in enumerate(slots) if slot.verdict == exit_codes.USER_ERROR]:
            return self._ended_badly(mistaken[0], exit_codes.USER_ERROR)
        for index, code in ended.items():
            if code not in _GOOD:
                return self._ended_badly(index, code)
        if len(ended) == len(self.ranks):
            if len(set(ended.values())) > 1:
                return self._failed(None, f"ranks ended differently: {sorted(set(ended.values()))}", "end")
            return self._all_ended(ended[0])
        if overdue := [i for i in self.watch.overdue(slots) if i not in ended]:
            return self._hung(overdue)
        return None

    def _ended_badly(self, index: int, code: int) -> Outcome:
        slot, rank = self.workers.slots.ranks[index], self.ranks[index]
        if code == exit_codes.USER_ERROR:
            print(slot.cause, file=sys.stderr, flush=True)
            self._tell("end", str(code))
            self._record_failure(rank, slot.cause, slot.phase, self._entered())
            if self.order.nodes > 1:
                time.sleep(3 * _REMOTE)  # so that other nodes end their ranks before those see these ones end
            return Outcome(code)
        how = (
            f"ended early ({slot.cause or 'exit code 0'})" if code == 0 else slot.cause or processes.how_it_ended(code)
        )
        return self._failed(rank, how, slot.phase)

    def _all_ended(self, code: int) -> Outcome:
        if code == exit_codes.REQUEUE:
            return Outcome(code)
        if code == exit_codes.RANK_REGROUP:
            return Outcome(None)
        if code == exit_codes.RANK_EVICTED:
            slot = self.workers.slots.ranks[0]
            node_fault.tell(self.plan.run, slot.cause, slot.step, self.order.attempt)
            return Outcome(exit_codes.EVICTED)
        if self.order.nodes > 1 and not self._all_nodes_done():
            return Outcome(None)
        if self.group_rank == 0:
            self._record("finished", step=self.workers.slots.ranks[0].step)
        return Outcome(exit_codes.DONE)

    def _all_nodes_done(self) -> bool:
        """Wait for the other nodes' ranks, which have also passed the last barrier."""
        try:
            self.membership.add("done")
            while int(self.membership.told("done") or 0) < self.order.nodes:
                if self.membership.told("lost") is not None:
                    return False
                time.sleep(_TICK)
        except StoreLost:
            log.info("the node that hosts the store has left: all nodes are done")
        return True

    def _hung(self, overdue: list[int]) -> Outcome:
        limit = self.watch.limit(self.workers.slots.ranks[overdue[0]])
        entered = self._entered()
        folder = self.plan.run / hang_detector.HANGS / f"attempt_{self.order.attempt:04d}"
        reports = hang_detector.examine(self.workers, self.ranks, self.watch, folder)
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
            attempt=self.order.attempt,
        )
        others = f", others wait in {', '.join(waiting)}" if waiting else ""
        who = f"in {os.path.basename(chosen.innermost)}" if guilty else "of another node's rank"
        return self._failed(
            chosen.rank if guilty else None, f"hang {who}{others}; stacks in {folder}", chosen.phase, entered
        )

    def _ask_others(self) -> Outcome | None:
        """Check, with several nodes, whether one has lost its ranks, wants to stop, or is waiting to join."""
        now = time.monotonic()
        if self.plan.rendezvous is None or now - self._asked_others < _REMOTE:
            return None
        self._asked_others = now
        if (code := self.membership.told("end")) is not None and int(code) != exit_codes.DONE:
            return Outcome(int(code))
        if self.membership.told("lost") is not None:
            log.warning("another node has lost its ranks")
            return Outcome(None)
        self.stop.follow()
        if self.group_rank == 0 and self.stop.why is None and (waiting := self.membership.waiting()):
            best = max(n for n in self.plan.admissible if n <= self.order.nodes + waiting)
            if best > self.order.nodes:
                log.info("%d nodes are waiting to join: writing a checkpoint, then all nodes restart", waiting)
                self.stop.ask("regroup", tell_others=True)
        return None

    def _called_off(self, why: str) -> Outcome:
        self._record_failure(None, why, self.workers.slots.ranks[0].phase, self._entered())
        print(f"error: {why}", file=sys.stderr)
        return Outcome(exit_codes.CRASHED)

    def _failed(self, rank: int | None, cause: str, phase: str, entered: int | None = None) -> Outcome:
        """Record a failure; another attempt may follow, but not after a signal."""
        failure = self._record_failure(rank, cause, phase, entered if entered is not None else self._entered())
        self._tell("lost", cause)
        log.warning("attempt %d failed: %s", self.order.attempt, failure.describe())
        return Outcome(exit_codes.CRASHED if self.stop.why == "requeue" else None, failure)

    def _entered(self) -> int:
        """Return the step that the ranks have begun, 0 before the first."""
        return max(0, *(slot.entered for slot in self.workers.slots.ranks))

    def _record_failure(self, rank: int | None, cause: str, phase: str, entered: int) -> restart_policy.Failure:
        failure = restart_policy.Failure(self.order.attempt, entered or None, phase, rank, cause)
        self._record("failed", **vars(failure))
        return failure

    def _tell(self, key: str, value: str) -> None:
        try:
            self.membership.tell(key, value)
        except StoreLost:
            log.warning("cannot notify the other nodes: the rendezvous store is lost")

    def _record(self, kind: str, **fields: Any) -> None:
        try:
            events.record(self.plan.run, kind, **fields)
        except OSError as error:  # a full disk must not end a run that can still write a checkpoint
            log.warning("cannot record the event %s: %s", kind, error)
