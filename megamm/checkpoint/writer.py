"""The writer of a rank: a process that writes staged checkpoints to disk while the rank continues with its steps.

It reads jobs (writer_client.py) and the rank's file in shared memory (staging.py). It answers with a JSON line for each
part of a job: the file is valid in local storage ("saved_locally"), a peer has it ("replicated"), it is in the run's
folder ("written"), and, on rank 0, the checkpoint there has its final name ("published"). While it is working it
sends "alive" twice a second, so that a rank that waits for a slow disk does not count as hung. The writers of a save
communicate only through files, in a folder with a name that is unique to this save:

    checkpoints/.tmp-step_X-ATTEMPT/tensors/__R_0.distcp, rng_R.safetensors     written and synced by rank R's writer
    checkpoints/.tmp-step_X-ATTEMPT.parts/R.json                                then this: sizes, digests, or the error

Rank 0's writer waits for all parts, writes the index and, last, the manifest, syncs, and renames the folder. A failed
save is removed and reported; earlier checkpoints stay. The process does not import torch, so it starts fast and is
small.
"""

import contextlib
import json
import math
import mmap
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megamm.checkpoint import files, folder, manifest, retention, writer_client
from megamm.checkpoint.manifest import ManifestEntry
from megamm.checkpoint.storage import local_files
from megamm.checkpoint.writer_client import Files, Message
from megamm.common import events, processes
from megamm.common.errors import UserError

PART_SECONDS = 600.0
"""Seconds that rank 0's writer waits for the others' parts after its own is written."""
FAILED_SECONDS = 10.0
"""The same if a part of the save has failed: so that no file is removed while another writer writes it."""
EXIT_SECONDS = 3.0
"""Seconds that it still waits after its rank has exited with an error during a save: the other nodes may be lost."""
POLL_SECONDS = (0.002, 0.1)
"""Seconds between checks for parts: initial and maximum."""
ALIVE_SECONDS = 0.5
NICENESS = 10
"""If cores are scarce, the training steps take precedence over the writer."""


class Deadline:
    """The time until which rank 0's writer waits for parts; it becomes earlier if a part fails or the rank exits."""

    def __init__(self, over: threading.Event) -> None:
        """over: set when the rank exits."""
        self.over, self.began, self.exited = over, time.monotonic(), math.inf

    def has_passed(self, has_failed: bool) -> bool:
        """has_failed: whether a part of the save has failed."""
        now = time.monotonic()
        if self.over.is_set():
            self.exited = min(self.exited, now)  # when it was first seen
        limit = self.began + (FAILED_SECONDS if has_failed else PART_SECONDS)
        return now > min(limit, self.exited + EXIT_SECONDS)


class SaveAttempt:
    """One save on one rank. job: run, step, attempt (JOB-NUMBER, unique), rank, world, keep, stall, bytes.

    over: set when the rank exits.
    """

    def __init__(self, job: Message, over: threading.Event | None = None) -> None:
        self.over = over or threading.Event()
        self.job, self.run = job, Path(job["run"])
        self.final = folder.path_of(self.run, job["step"])
        self.temporary = self.final.with_name(f".tmp-{self.final.name}-{job['attempt']}")
        self.parts = self.temporary.with_name(f"{self.temporary.name}.parts")
        self.is_first, self.began, self.problem = job["rank"] == 0, time.monotonic(), ""
        self.why_cached = ""
        """Why this rank's file was written through the page cache; "" if it was not."""

    def write_own(self, staged: memoryview, contents: Files) -> None:
        """Write this rank's files, then its part; an OSError is written there too, and raised."""
        try:
            if self.is_first:
                folder.remove_leftovers(self.run, self.job["attempt"])
            files.make_folder(self.temporary / "tensors")
            files.make_folder(self.parts)
            name = f"tensors/__{self.job['rank']}_0.distcp"
            entry, self.why_cached = files.write_direct(self.temporary / name, staged)
            entries = {name: entry} | {n: files.write(self.temporary / n, [data]) for n, data in contents.items()}
        except OSError as error:
            self.problem = f"rank {self.job['rank']}: {self._described(error)}"
            with contextlib.suppress(OSError):
                # Free space for the part, which notifies the other writers; the rank itself is notified in any case.
                files.remove_file(self.temporary / f"tensors/__{self.job['rank']}_0.distcp")
                self._write_part({"error": self.problem})
            raise
        self._write_part({"files": {name: entry.to_json() for name, entry in entries.items()}})

    def give_up(self, problem: str) -> None:
        """Write the part of a writer that exited before it had written one."""
        if not (self.parts / f"{self.job['rank']}.json").exists():
            self._write_part({"error": f"rank {self.job['rank']}: {problem}"})

    def _described(self, error: OSError) -> str:
        existing = next(p for p in self.temporary.parents if p.exists())
        return f"{error}, {shutil.disk_usage(existing).free:,} bytes free"

    def _write_part(self, part: dict[str, Any]) -> None:
        path = self.parts / f"{self.job['rank']}.json"
        new = path.with_suffix(".new")
        files.make_folder(self.parts)
        try:
            files.write(new, [json.dumps(part).encode()])
        except OSError:
            files.write(new, [])  # a full disk may have space for the name only: an empty part means failure
            files.rename(new, path)
            raise
        files.rename(new, path)

    def gather(self) -> dict[str, ManifestEntry]:
        """Wait for all ranks' parts; return their files. OSError with the first known problem, or for missing parts."""
        parts: dict[int, dict[str, Any]] = {0: {"error": self.problem}} if self.problem else {}
        ranks, deadline, pause = set(range(self.job["world"])), Deadline(self.over), POLL_SECONDS[0]
        while True:
            for rank in ranks - parts.keys():
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    parts[rank] = _parsed(rank, (self.parts / f"{rank}.json").read_bytes())
            missing = sorted(ranks - parts.keys())
            problems = [part["error"] for part in parts.values() if "error" in part]
            # Wait for the others even if one has failed: they may still be writing into the folder.
            if not missing or deadline.has_passed(bool(problems)):
                break
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS[1])
        if problems:
            raise OSError(problems[0])
        if missing:
            waited = time.monotonic() - deadline.began
            raise OSError(f"no answer from the writers of ranks {missing} for {waited:.0f} s")
        return {
            name: ManifestEntry.from_json(entry) for part in parts.values() for name, entry in part["files"].items()
        }

    def publish(self) -> dict[str, Any]:
        """Write the manifest, rename the folder, apply the retention; return the answer. OSError: no checkpoint."""
        try:
            listed = self.gather()
            # Everything is synced before the rename: a folder with the final name is complete, even after a power cut.
            files.write(self.temporary / manifest.NAME, [manifest.render(listed)])
            for path in (self.temporary / "tensors", self.temporary):
                files.sync(path)
            folder.publish(self.temporary, self.final)
        except OSError:
            if not self.over.is_set():  # otherwise the next launch removes them: other writers may still be working
                files.remove_tree(self.temporary)
                files.remove_tree(self.parts)
            raise
        size, seconds = sum(entry.size for entry in listed.values()), time.monotonic() - self.began
        done: dict[str, Any] = {"bytes": size, "seconds": seconds}
        record = partial(events.record, self.run, "saved", step=self.job["step"], stall=self.job["stall"], tier="run")
        for action in (
            partial(record, **done),
            partial(files.remove_tree, self.parts),
            partial(retention.apply, self.run, self.job["keep"], self.job["keep_best"]),
        ):
            try:  # the checkpoint is complete; on a full disk some of these actions may still succeed
                action()
            except OSError as error:
                done["afterwards"] = str(error)
        return done | {"folder": str(self.final), "why_cached": self.why_cached}


def _parsed(rank: int, part: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(part))
    except ValueError:
        return {"error": f"rank {rank}: no space left for an error message"}


class LocalPart:
    """This rank's part in local storage. settings: LocalStorage.writer_settings."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.root = settings, Path(settings["root"])

    def save(self, job: Message, staged: memoryview, contents: Files) -> None:
        """Make a save valid in this node's folder; OSError if it fails."""
        part = local_files.PartRecord(job["rank"], job["world"], self.settings["save"], self.settings["node"], {})
        tensors = f"tensors/__{job['rank']}_0.distcp", Path(job["staged"]), staged
        local_files.write(self.root, job["step"], part, tensors, contents)

    def replicate(self, job: Message) -> None:
        """Copy the save to the peer; UserError if it fails."""
        from megamm.checkpoint.storage import peer  # here: only runs with several nodes need it

        host, port = self.settings["peer"]
        key = bytes.fromhex(self.settings["key"])
        peer.put((host, port), key, self.root, job["step"], job["rank"], job["floor"])


class TaskQueue:
    """A thread that runs functions one after the other, started at the first; errors go to threading.excepthook."""

    def __init__(self) -> None:
        self.tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None

    def add(self, task: Callable[[], None]) -> None:
        """Queue a function."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, daemon=True)
            self.thread.start()
        self.tasks.put(task)

    def _work(self) -> None:
        while (task := self.tasks.get()) is not None:
            task()

    def finish(self) -> None:
        """Wait until all queued functions have run."""
        self.tasks.put(None)
        if self.thread is not None:
            self.thread.join()


class KeepAlive:
    """While entered, a thread calls `send` every ALIVE_SECONDS: the other threads may be blocked in disk I/O."""

    def __init__(self, send: Callable[[], None]) -> None:
        self.send = send
        self.entered, self.lock, self.is_entered = 0, threading.Lock(), threading.Event()
        threading.Thread(target=self._send_alive, daemon=True).start()

    def __enter__(self) -> None:
        with self.lock:
            self.entered += 1
            self.is_entered.set()

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.entered -= 1
            if not self.entered:
                self.is_entered.clear()

    def _send_alive(self) -> None:
        while self.is_entered.wait():
            time.sleep(ALIVE_SECONDS)
            if self.is_entered.is_set():
                self.send()


class Service:
    """The work of the process: local storage in the main thread; run folder and replicas each in a thread of their own.

    So a slow disk or network does not delay the others.
    """

    def __init__(self, first: mmap.mmap) -> None:
        """first: the anonymous shared memory, or the first staged file."""
        self.staged = {"": first}
        self.constant: Files = {}
        self.local: LocalPart | None = None
        self.run_folder, self.replicas, self.over = TaskQueue(), TaskQueue(), threading.Event()
        self.working = KeepAlive(partial(_send, {"kind": "alive"}))

    def serve(self) -> None:
        """Do the jobs on standard input until it closes."""
        for job, contents in writer_client.messages(sys.stdin.buffer):
            if job["kind"] == "constant":
                self.constant = contents
                self.local = LocalPart(job["local"]) if "local" in job else None
            else:
                self._save(job, contents | self.constant)
        self.over.set()
        self.run_folder.finish()

    def _save(self, job: Message, contents: Files) -> None:
        staged = memoryview(self._mapped(job["staged"]))
        if "saved_locally" in job["answers"]:
            assert self.local is not None
            with self.working:
                _answer("saved_locally", job, partial(self.local.save, job, staged, contents))
        if "replicated" in job["answers"]:
            assert self.local is not None
            self.replicas.add(partial(self._replicate, self.local, job))
        if "written" in job["answers"]:
            self.run_folder.add(partial(self._write, job, staged[: job["bytes"]], contents))

    def _replicate(self, local: LocalPart, job: Message) -> None:
        with self.working:
            _answer("replicated", job, partial(local.replicate, job))

    def _mapped(self, path: str) -> mmap.mmap:
        if path not in self.staged:
            with open(path, "rb") as file:
                self.staged[path] = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        return self.staged[path]

    def _write(self, job: Message, staged: memoryview, contents: Files) -> None:
        attempt = SaveAttempt(job, self.over)
        with self.working:
            _answer("written", job, partial(attempt.write_own, staged, contents))
            if "published" in job["answers"]:
                _answer("published", job, attempt.publish)


def _answer(kind: str, job: Message, action: Callable[[], dict[str, Any] | None]) -> None:
    """Run an action and send its result."""
    try:
        result = {"error": None} | (action() or {})
    except (OSError, UserError) as error:
        result = {"error": str(error)}
    _send({"kind": kind, "step": job["step"], "attempt": job["attempt"]} | result)


def _send(line: Message) -> None:
    """Send a line in one write, smaller than PIPE_BUF, so that lines of several threads do not mix."""
    os.write(sys.stdout.fileno(), (json.dumps(line) + "\n").encode())


def _end(error: threading.ExceptHookArgs) -> None:
    """Exit after an unexpected error in a thread, so that the rank notices it."""
    traceback.print_exception(error.exc_type, error.exc_value, error.exc_traceback)
    os._exit(1)


def main() -> None:
    """Run `python -m megamm.checkpoint.writer DESCRIPTOR BYTES PARENT`: the shared memory, and the rank's process."""
    descriptor, size, parent = map(int, sys.argv[1:])
    processes.die_with_parent(parent)
    os.nice(NICENESS)
    # The rank decides when to exit: it may want to save because of the same signal.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.excepthook = _end
    Service(mmap.mmap(descriptor, size, prot=mmap.PROT_READ)).serve()


if __name__ == "__main__":
    main()
