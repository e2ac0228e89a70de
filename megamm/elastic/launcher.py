"""The launcher of a run: starts this node's agent (agent.py), forwards signals, and restarts the agent if it exits
unexpectedly.

    launcher (this) > agent, fork server, prefork parent > ranks

`megamm train` is the launcher. There is one per node; several nodes find each other at `rendezvous`, a port on one of
them. The agent controls the prefork parent. It requests it from the launcher, which asks the fork server to create it.
When a process exits, the kernel kills its descendants; if the agent exits, the prefork parent exits too. The launcher
then starts them again.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

from megamm.common import events, exit_codes, processes
from megamm.common.errors import UserError
from megamm.common.processes import STOP_SIGNALS, how_it_ended
from megamm.config import RunConfig
from megamm.elastic import heartbeat, restart_policy
from megamm.elastic.fork_server import MAX_DESCRIPTORS, MESSAGE_BYTES, CheckFailed, ForkServer
from megamm.elastic.hang_detector import Limits
from megamm.elastic.launcher_messages import LaunchPlan
from megamm.elastic.rendezvous import Times
from megamm.model import layout

SAME_SIGNAL_SECONDS = 1.0
"""Signals within this time count as one: a scheduler may signal a job's processes both individually and as a group."""
_FINAL = (exit_codes.DONE, exit_codes.USER_ERROR, exit_codes.GAVE_UP, exit_codes.EVICTED, exit_codes.REQUEUE)


@dataclass(frozen=True)
class Nodes:
    """Minimum and maximum number of nodes, and the rendezvous endpoint: "host:port", None for a single node."""

    least: int = 1
    most: int = 1
    rendezvous: str | None = None

    @classmethod
    def parse(cls, nodes: str, rendezvous: str | None) -> "Nodes":
        """Parse "4" or "2:4"; more than one node needs the rendezvous."""
        least, _, most = nodes.partition(":")
        try:
            parsed = cls(int(least), int(most or least), rendezvous)
        except ValueError:
            raise UserError(
                f"invalid --nnodes {nodes}", remedy="give a number (4) or a range (2:4 for two to four nodes)"
            ) from None
        if not 1 <= parsed.least <= parsed.most:
            raise UserError(f"invalid range --nnodes {nodes}", remedy="give the smaller number first, 1 or more")
        if parsed.most > 1 and rendezvous is None:
            raise UserError("--nnodes > 1 requires --rendezvous", remedy="add --rendezvous HOST:PORT, the same on each")
        return parsed


def admissible_nodes(config: RunConfig, ranks: int, nodes: Nodes) -> tuple[int, ...]:
    """Return valid numbers of nodes, of `ranks` each, by layout and batch. UserError if the minimum is not valid."""
    allowed = []
    for number in range(nodes.least, nodes.most + 1):
        try:
            layout.check(config, number * ranks)
        except UserError:
            if number == nodes.least:
                raise
        else:
            allowed.append(number)
    return tuple(allowed)


def supervise(config: RunConfig, ranks: int, nodes: Nodes, module: str) -> int:
    """Run this node's part of the job to its end; return the exit code (common/exit_codes.py).

    module: name of the program that starts ranks (fork_server.py).
    """
    if nodes.most > 1 and _is_complete(config):
        print(f"nothing to do: all steps of {config.output} are done", flush=True)
        return exit_codes.DONE
    # Ranks share the cores; OMP_NUM_THREADS set by the user takes precedence.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    launcher = _Launcher(module, config)
    try:
        launcher.check()
        return _supervise(launcher, config, ranks, nodes)
    except CheckFailed as failed:
        print(f"error: the check of the config before the start failed: {failed}", file=sys.stderr)
        return exit_codes.CRASHED
    finally:
        launcher.close()


def _supervise(launcher: "_Launcher", config: RunConfig, ranks: int, nodes: Nodes) -> int:
    r = config.resilience
    admissible = admissible_nodes(config, ranks, nodes)
    deaths, before = 0, len(events.read(config.output))
    while True:
        plan = LaunchPlan(
            config=config.model_dump(mode="json"),
            processes=ranks,
            nodes=(nodes.least, nodes.most),
            admissible=admissible,
            endpoint=nodes.rendezvous,
            launcher_pid=os.getpid(),
            is_fresh=deaths == 0,
            rules=restart_policy.Rules(r.max_restarts, r.same_step_limit, r.backoff_seconds),
            limits=Limits(r.hang_seconds, r.startup_seconds),
            times=Times(**r.rendezvous.model_dump()),
            grace=r.grace_seconds,
        )
        code = launcher.run_agent(plan)
        if code in _FINAL or launcher.signalled_at or not r.max_restarts:
            return code if code >= 0 else exit_codes.CRASHED
        # The job may be done although this node's agent failed afterwards.
        if any(event["kind"] == "finished" for event in events.read(config.output)[before:]):
            return exit_codes.DONE  # the agent only had to leave the job
        if code == exit_codes.AGENT_ALONE:
            return exit_codes.CRASHED
        deaths += 1
        if code != exit_codes.CRASHED:  # with CRASHED it has exited in order, for example because the store is lost
            _record_death(plan, code)
        launcher.end_all()
        if deaths > r.max_restarts:
            print(f"error: gave up: the agent exited {deaths} times ({how_it_ended(code)})", file=sys.stderr)
            return exit_codes.GAVE_UP
        print(f"agent exited with {how_it_ended(code)}; restarting it", file=sys.stderr, flush=True)


def _is_complete(config: RunConfig) -> bool:
    """Whether the last launch has done all steps: a node restarted after that would wait for other nodes in vain."""
    last = [event for event in events.read(config.output) if event["kind"] in ("launched", "finished")][-1:]
    steps = min(config.train.steps, config.train.stop_after or config.train.steps)
    return any(event["kind"] == "finished" and event["step"] >= steps for event in last)


def _record_death(plan: LaunchPlan, code: int) -> None:
    """Record the agent's exit as a failure of the current attempt, unless the agent had recorded one."""
    failed = {f.attempt for f in restart_policy.from_events(events.read(plan.run))}
    beats = heartbeat.read(plan.run)
    last = max(restart_policy.attempts(events.read(plan.run)), default=0)
    current = [beat for beat in beats if beat.attempt == last]
    if last not in failed:
        step = max((beat.step for beat in current if beat.phase not in ("start", "resume")), default=None)
        phase = current[0].phase if current else "start"
        cause = f"the agent exited with {how_it_ended(code)}"
        events.record(plan.run, "failed", attempt=last, step=step, phase=phase, rank=None, cause=cause)


class _Launcher:
    """This process: the root of the tree, which receives the signals of users and schedulers."""

    def __init__(self, module: str, config: RunConfig) -> None:
        self.signalled_at = 0.0
        self._undelivered: list[str] = []
        self._stdin: IO[bytes] | None = None
        """Standard input of an agent that has received its plan."""
        processes.adopt_orphans()
        # Children that other code in this process has started: they are never killed here.
        self._others = processes.children(os.getpid())
        self._server = ForkServer(module, config.model_dump(mode="json"), has_check=True)

    def check(self) -> None:
        """Wait for the check of the config, and receive signals from then on. UserError if it is refused."""
        self._server.check()
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive_signal)

    def run_agent(self, plan: LaunchPlan) -> int:
        """Start an agent and serve it until it exits; return its exit code, or the negative number of the signal."""
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A session of its own: only this process receives a terminal's Ctrl-C, and forwards it to the agent.
        agent = processes.start_module(
            "megamm.elastic.agent",
            str(its.fileno()),
            pass_fds=[its.fileno()],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        its.close()
        assert agent.stdin is not None
        with ours, contextlib.suppress(BrokenPipeError), agent.stdin as stdin:
            stdin.write(f"{plan.to_json()}\n".encode())
            stdin.flush()
            self._stdin, undelivered, self._undelivered = stdin, self._undelivered, []
            for name in undelivered:
                self._send_signal(name)
            self._serve(agent.pid, ours)
            self._stdin = None
        return agent.wait()

    def _serve(self, agent: int, requests: socket.socket) -> None:
        """Serve requests until the agent has exited and its end of the socket is closed."""
        while True:
            watched: list[Any] = [requests, *self._server.descriptors]
            readable, _, _ = select.select(watched, [], [], 1.0)
            self._server.attend()
            if requests in readable:
                request, descriptors, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, MAX_DESCRIPTORS)
                if not request:
                    return
                # First kill what an earlier prefork parent has left: its ranks would use the same GPUs and files.
                self._sweep(agent)
                self._server.fork(request, descriptors)

    def end_all(self) -> None:
        """Kill what the agent has left."""
        self._sweep()

    def close(self) -> None:
        self._server.close()
        self._sweep()

    def _sweep(self, agent: int | None = None) -> None:
        kept = {*self._others, self._server.pid, agent}
        processes.sweep([process for process in kept if process is not None])

    def _receive_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signalled_at and now - self.signalled_at < SAME_SIGNAL_SECONDS:
            return
        self.signalled_at = now
        self._send_signal(signal.Signals(number).name)

    def _send_signal(self, name: str) -> None:
        """Forward a signal to the agent; if none is running, to the next one."""
        try:
            if self._stdin is None:
                raise BrokenPipeError
            os.write(self._stdin.fileno(), f"{name}\n".encode())
        except BrokenPipeError:
            self._undelivered.append(name)
