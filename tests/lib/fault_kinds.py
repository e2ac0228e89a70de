"""The faults: OUTSIDE ones are done to a rank's process from any process; INSIDE ones by the rank itself."""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

SLOW_SECONDS, SLOW_ON, SLOW_OFF = 3.0, 0.05, 0.2
CLOCK_JUMP = 7200.0
LARGEST_DISK = 1 << 30
FILLER = "filler"


class InjectedError(RuntimeError):
    """The error that "exception" raises."""


def parent(process):
    """Return its parent's process id."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def command_line(process):
    return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def below(process):
    """Return all processes below it."""
    from megamm.common.processes import children

    found = children(process)
    return found + [deeper for child in found for deeper in below(child)]


def only(found, what):
    if not found:
        raise LookupError(f"there is no {what} to hurt")
    return found[0]


def writer(rank):
    """Return the rank's process that writes checkpoints."""
    return only([p for p in below(rank) if "megamm.checkpoint.writer" in command_line(p)], "checkpoint writer")


def loader_worker(rank):
    """Return a loader worker of the rank: it is forked by a fork server, and has the same command line."""
    server = "multiprocessing.forkserver"
    found = [p for p in below(rank) if server in command_line(p) and server in command_line(parent(p))]
    return only(found, "loader worker")


def kill(process):
    """Kill it; if this process is below it, wait for the effect."""
    os.kill(process, signal.SIGKILL)


def kill_above(levels):
    """Kill an ancestor of the rank: 1 the prefork parent, 2 the launcher."""

    def act(run, pid):
        above = pid
        for _ in range(levels):
            above = parent(above)
        kill(above)
        wait_for_the_end(pid)

    return act


def kill_agent(run, pid):
    kill(beside_prefork_parent(pid, "megamm.elastic.agent"))
    wait_for_the_end(pid)


def wait_for_the_end(pid):
    """Wait until this process, if it is `pid`, ends because another process did."""
    if pid == os.getpid():
        threading.Event().wait()


def beside_prefork_parent(rank, module):
    """Return the launcher's child that runs this module.

    The prefork parent is skipped: it looks like the fork server that forked it.
    """
    from megamm.common.processes import children

    above = parent(rank)
    return only([p for p in children(parent(above)) if p != above and module in command_line(p)], module)


def slow(run, pid):
    """Let the rank run a fifth of the time for a while, controlled by another process."""
    code = (
        "import os, signal, sys, time\n"
        "pid, seconds, on, off = int(sys.argv[1]), *map(float, sys.argv[2:])\n"
        "end = time.monotonic() + seconds\n"
        "while time.monotonic() < end:\n"
        "    os.kill(pid, signal.SIGSTOP); time.sleep(off)\n"
        "    os.kill(pid, signal.SIGCONT); time.sleep(on)\n"
    )
    times = map(str, (SLOW_SECONDS, SLOW_ON, SLOW_OFF))
    subprocess.Popen([sys.executable, "-S", "-c", code, str(pid), *times], start_new_session=True)


def newest_checkpoint(run, seconds=2.0):
    """Return the newest complete checkpoint once there are two, so that one remains; saves overlap with steps."""
    end = time.monotonic() + seconds
    while len(found := _whole(run)) < 2:
        if time.monotonic() > end:
            raise LookupError("there is no second checkpoint to resume from")
        time.sleep(0.01)
    return found[-1]


def settled_checkpoint(run):
    """Return the newest checkpoint after a save that is under way, which would otherwise be newer a moment later."""
    end = time.monotonic() + 1.0  # a save that waits for the calling rank does not end
    while any((run / "checkpoints").glob(".tmp-*")) and time.monotonic() < end:
        time.sleep(0.01)
    return newest_checkpoint(run)


def once_saved(act):
    """Act once two checkpoints exist: a save that a kill interrupts might leave only one."""

    def wait(run, pid):
        newest_checkpoint(run, seconds=30)
        act(run, pid)

    return wait


def _whole(run):
    from megamm import checkpoint
    from megamm.common.errors import UserError

    found = []
    for folder in sorted((run / "checkpoints").glob("step_????????")):
        with contextlib.suppress(UserError):
            checkpoint.verify(folder)
            found.append(folder)
    return found


def newest_in_local_tier(run):
    """Return the newest step of which all parts are valid."""
    from megamm.checkpoint.storage import local_files
    from megamm.common import events

    root = Path(next(event["folder"] for event in events.read(run) if event["kind"] == "local_tier"))
    folders = [local_files.folder_of(root, step) for step in local_files.steps_in(root)]
    return only(
        [folder for folder in folders if local_files.whole(local_files.parts_in(folder))][::-1],
        "step in local storage",
    )


def damage(change, newest=settled_checkpoint):
    """Change the largest file of the newest checkpoint, then kill the rank so that the run has to resume."""

    def act(run, pid):
        files = [path for path in newest(run).rglob("*") if path.is_file()]
        path = max(files, key=lambda file: file.stat().st_size)
        with path.open("r+b") as file:
            change(file, path.stat().st_size)
        kill(pid)

    return act


def _truncate(file, size):
    file.truncate(size // 2)


def _flip_bit(file, size):
    file.seek(size // 2)
    byte = file.read(1)[0]
    file.seek(size // 2)
    file.write(bytes([byte ^ 4]))


def fill_disk(run, pid):
    """Fill the file system of the checkpoints, if it is a small one made for this."""
    folder = run / "checkpoints"
    if shutil.disk_usage(folder).total > LARGEST_DISK:
        raise ValueError(f"{folder} is not on a small file system: not filled")
    with (folder / FILLER).open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(bytes(size)):
                    continue
            except OSError:
                continue


def empty_disk(run):
    """Free the space after a save has failed for lack of it."""
    if (run / "checkpoints" / FILLER).exists():
        from megamm.common import events

        if any(event["kind"] == "save_failed" for event in events.read(run)):
            (run / "checkpoints" / FILLER).unlink(missing_ok=True)


OUTSIDE = {
    "sigkill": lambda run, pid: kill(pid),
    "sigkill_once_saved": once_saved(lambda run, pid: kill(pid)),
    "sigstop": lambda run, pid: os.kill(pid, signal.SIGSTOP),
    "slow": slow,
    "kill_template": kill_above(1),
    "kill_agent": kill_agent,
    "kill_fork_server": lambda run, pid: kill(beside_prefork_parent(pid, "megamm.train.ranks")),
    "stop_fork_server": lambda run, pid: os.kill(beside_prefork_parent(pid, "megamm.train.ranks"), signal.SIGSTOP),
    "kill_command": kill_above(2),
    "kill_command_once_saved": once_saved(kill_above(2)),
    "own_signal": lambda run, pid: os.kill(pid, signal.SIGUSR1),
    "sigterm": lambda run, pid: os.kill(parent(parent(pid)), signal.SIGTERM),
    "kill_loader": lambda run, pid: kill(loader_worker(pid)),
    "stop_loader": lambda run, pid: os.kill(loader_worker(pid), signal.SIGSTOP),
    "kill_writer": lambda run, pid: kill(writer(pid)),
    "stop_writer": lambda run, pid: os.kill(writer(pid), signal.SIGSTOP),
    "truncate": damage(_truncate),
    "bit_flip": damage(_flip_bit),
    "local_bit_flip": damage(_flip_bit, newest_in_local_tier),
    "fill_disk": fill_disk,
}


def _exception(heart):
    raise InjectedError("injected")


def _user_error(heart):
    from megamm.common.errors import UserError

    raise UserError("an injected mistake", remedy="fix it")


def _deadlock(heart):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def _until_asked(heart):
    """Inject no fault: wait until the agent requests a stop."""
    while struct.unpack_from("q", heart.status.memory, 0)[0] == 0:
        time.sleep(0.01)


def _pause(heart):
    """Let another process act at this moment: it sees folder/paused, and removes it to end the pause."""
    (heart.folder / "paused").touch()
    while (heart.folder / "paused").exists():
        time.sleep(0.01)


def _nan(heart):
    """Make the next gradient of one parameter NaN on this rank, once."""
    left = [float("nan")]
    parameter = next(heart.engine.chunks[0].parameters())
    parameter.register_hook(lambda gradient: gradient * (left.pop() if left else 1.0))


def _clock(heart):
    """Change the time of day for all processes of the run that have the hook: hours later, or back again."""
    path = heart.folder / "clock"
    now = float(path.read_text()) if path.exists() else 0.0
    path.with_suffix(".new").write_text(str(0.0 if now else CLOCK_JUMP))
    path.with_suffix(".new").rename(path)


INSIDE = {
    "sigsegv": lambda heart: ctypes.string_at(0),
    "abort": lambda heart: os.abort(),
    "exception": _exception,
    "user_error": _user_error,
    "exit0": lambda heart: sys.exit(0),
    "_exit0": lambda heart: os._exit(0),
    "deadlock": _deadlock,
    "hold_gil": lambda heart: sum(range(10**15)),  # one long call that neither releases the GIL nor handles signals
    "nan": _nan,
    "clock": _clock,
    "pause": _pause,
    "until_asked": _until_asked,
}


def follow_clock(folder):
    """Make time.time() of this process the true time plus the seconds in folder/clock."""
    true_time, path = time.time, folder / "clock"

    def shifted():
        try:
            return true_time() + float(path.read_text())
        except FileNotFoundError:
            return true_time()

    time.time = shifted


def remember_engine(heart):
    """Remember, for "nan", the engine that this process is about to build."""
    from megamm.engine.native import NativeEngine

    plain = NativeEngine.__init__

    def init(self, *arguments, **named):
        plain(self, *arguments, **named)
        heart.engine = self

    NativeEngine.__init__ = init


def record_rows(heart):
    """Write folder/rows_RANK.jsonl: for every step that this process reads, the rows' end and a digest of each own row.

    Each line has its attempt, too: how many launches there have been, and the attempt's number in the last one.
    """
    from megamm.common import events
    from megamm.data.pipeline.loader import Loader

    plain, path = Loader.step, heart.folder / f"rows_{heart.rank}.jsonl"
    attempt = (sum(event["kind"] == "launched" for event in events.read(heart.run)), heart.attempt)

    def step(self):
        batches = plain(self)
        rows = [_digest(batch, i) for batch in batches for i in range(len(batch.input_ids))]
        line = {"attempt": attempt, "end": self.consumed_rows, "rows": rows}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return batches

    Loader.step = step


def _digest(batch, i):
    local_files = (batch.input_ids[i], batch.labels[i], batch.segment[i])
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in local_files)).hexdigest()[:16]
