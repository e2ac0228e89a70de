"""The cases of the fault matrix (fault_matrix.py): kinds of faults, phases of a run, and which of them apply."""

from dataclasses import dataclass

PLACES = {
    "start-up": "start:0:1",
    "first step": "step:1:1",
    "steady state": "step:5:1",
    "before a save": "save:6:1",
    "restart": "resume:0:1",
    "evaluation": "evaluate:8:0",
    "during a save": "write:8:0",
}
"""Phase, step and rank, in the order of a run; see faults.py. "restart" follows a kill -9 at step 7, when there are
two complete checkpoints. A save is written while steps continue, perhaps to the last: nothing can follow it."""
ALL = list(PLACES)


@dataclass(frozen=True)
class Kind:
    """The fault, the phases it applies to, why not to others, and whether the run is expected to restart.

    local_tier: the run has one. fault: its name in fault_kinds.py, if it differs from the kind's.
    """

    what: str
    phases: list[str]
    elsewhere: str = ""
    restarts: bool = True
    data_workers: int = 0
    small_disk: bool = False
    local_tier: bool = False
    fault: str = ""


_OWN = [p for p in ALL if p != "during a save"]
_THREAD = "it acts in the rank's main thread, which runs a step while a save is written"
_WORKERS = "there is no loader worker before the first step, and saves do not use them"
_WRITER = "there is no writer before the first save"
_FORKED = "running ranks do not need it in any phase"
_FOLDER = "there is no checkpoint yet, or (during a save) only the last one, which the evaluation case covers"
_SAME = "; before a save it is idle as in the steady state"
_WRITES = ["steady state", "evaluation", "during a save"]
_KILLED = ["steady state", "during a save"]
_ALIKE = "; other phases equal the steady state, and three failed saves in a row stop a run"
_RUNNING = ["start-up", "steady state", "restart"]
_STEPS = ["first step", "steady state"]
_LOADER = [*_STEPS, "evaluation"]
_FOLDERS = ["steady state", "before a save", "restart", "evaluation"]
_KEPT = "it is still empty, or (during a save) contains only older steps"
KINDS = {
    "sigkill": Kind("kill -9 of a rank", ALL),
    "sigstop": Kind("SIGSTOP of a rank", ALL),
    "sigsegv": Kind("SIGSEGV in a rank", ALL),
    "abort": Kind("os.abort in a rank", ALL),
    "exception": Kind("exception in a rank", _OWN, _THREAD),
    "exit0": Kind("sys.exit(0) of a rank", _OWN, _THREAD),
    "deadlock": Kind("deadlock in a rank", _OWN, _THREAD),
    "hold_gil": Kind("GIL held in a rank", _OWN, _THREAD),
    "slow": Kind("slow rank: a fifth of the time for 3 s", _OWN, _THREAD, restarts=False),
    "kill_template": Kind("kill -9 of the ranks' parent", ALL),
    "kill_agent": Kind("kill -9 of the agent", ALL),
    "kill_fork_server": Kind("kill -9 of the fork server", _RUNNING, _FORKED, restarts=False),
    "kill_loader": Kind("kill -9 of a loader worker", _LOADER, _WORKERS, data_workers=1),
    "stop_loader": Kind("SIGSTOP of a loader worker", _LOADER, _WORKERS, data_workers=1),
    "kill_writer": Kind("kill -9 of a checkpoint writer", _KILLED, _WRITER + _ALIKE, restarts=False),
    "stop_writer": Kind("SIGSTOP of a checkpoint writer", _WRITES, _WRITER + _SAME),
    "truncate": Kind("newest checkpoint truncated, kill -9", _FOLDERS, _FOLDER),
    "bit_flip": Kind("bit flipped in the newest checkpoint, kill -9", _FOLDERS, _FOLDER),
    "fill_disk": Kind("full disk", ["before a save"], "only a save writes large files", False, small_disk=True),
    "nan": Kind("NaN in one rank's gradient", _STEPS, "only steps have gradients", restarts=False),
    "clock": Kind("time of day jumps by 2 h", _OWN, _THREAD, restarts=False),
    "local_sigkill": Kind("kill -9 of a rank, with local storage", ALL, local_tier=True, fault="sigkill"),
    "local_kill_agent": Kind("kill -9 of the agent, with local storage", ALL, local_tier=True, fault="kill_agent"),
    "local_kill_writer": Kind(
        "kill -9 of a checkpoint writer, with local storage",
        _KILLED,
        _WRITER + _ALIKE,
        restarts=False,
        local_tier=True,
        fault="kill_writer",
    ),
    "local_bit_flip": Kind("bit flipped in the newest of local storage, kill -9", _FOLDERS, _KEPT, local_tier=True),
}


NODES = {
    "lost_store": "kill -9 of the agent that hosts the rendezvous store, two nodes",
    "network_cut": "the network between two nodes is cut until it is detected",
}
"""Injected by fault_nodes.py, in the steady state."""

Faults = list[tuple[str, str]]
"""Kind and phase of each, in order."""


def fault_of(kind: str) -> str:
    """Return its name in fault_kinds.py."""
    return KINDS[kind].fault or kind if kind in KINDS else kind


def plan(faults: Faults) -> str:
    """Return the faults of a run, in order, for the environment."""
    chain = ""
    for kind, phase in faults:
        if phase == "restart":
            chain += ">sigkill_once_saved@step:7:1:*>"
        # A fault that brings the attempt down may do so much later.
        chain += f">{fault_of(kind)}@{PLACES[phase]}:*" + (">" if KINDS[kind].restarts else "")
    return chain.rstrip(">")
