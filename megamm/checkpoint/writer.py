"""The writer of a rank: a process that writes staged checkpoints to disk while the rank continues with its steps.

It reads jobs (messages.py) and the image of the rank's file in shared memory (rank_file.py). It answers with a JSON
line when the image is valid in the local tier ("kept"), when a peer has it ("replicated"), when it is in the run's
folder ("written"), and, on rank 0, when the checkpoint there has its final name ("published"). While it is working it
sends "alive" twice a second, so that a rank that waits for a slow disk does not count as hung. The writers of a save
communicate only through files, in a folder with a name that is unique to this save:

    checkpoints/.tmp-step_X-ATTEMPT/tensors/__R_0.distcp, rng_R.safetensors     written and synced by rank R's writer
    checkpoints/.tmp-step_X-ATTEMPT.parts/R.json                                then this: sizes, digests, or the error

Rank 0's writer waits for all parts, writes the index and, last, the manifest, syncs, and renames the folder. A failed
save is removed and reported; earlier checkpoints stay. The process does not import torch, so it starts fast and is
small.
"""

import contextlib
import ctypes
import json
import math
import mmap
import os
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

from megamm.checkpoint import files, folder, manifest, messages, retention
from megamm.checkpoint.manifest import ManifestEntry
from megamm.checkpoint.storage import local_files
from megamm.checkpoint.task_queue import KeepAlive, TaskQueue
from megamm.common import events
from megamm.common.errors import UserError

PART_SECONDS = 600.0
"""Seconds that rank 0's writer waits for the others' parts after its own is written."""
DOOMED_SECONDS = 10.0
"""The same after a part of the save has failed: so that no file is removed while another writer writes it."""
LONE_SECONDS = 3.0
"""The same after this rank has exited with an error during a save: the other nodes may be lost."""
POLL_SECONDS = (0.002, 0.1)
"""Seconds between checks for parts: initial and maximum."""
NICENESS = 10
"""If cores are scarce, the training steps take precedence over the writer."""
DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


class SaveAttempt:
    """One save on one rank. job: run, step, attempt (JOB-NUMBER, unique), rank, world, keep, stall, bytes.

    over: set when the rank exits.
    """

    def __init__(self, job: dict[str, Any], over: threading.Event | None = None) -> None:
        self.over = over or threading.Event()
        self.job, self.run = job, Path(job["run"])
        self.final = folder.path_of(self.run, job["step"])
        self.temporary = self.final.with_name(f".tmp-{self.final.name}-{job['attempt']}")
        self.parts = self.temporary.with_name(f"{self.temporary.name}.parts")
        self.is_first, self.began, self.problem = job["rank"] == 0, time.monotonic(), ""
        self.why_cached = ""
        """Why this rank's image was written through the page cache."""

    def write_own(self, image: memoryview, contents: messages.Files) -> None:
        """Write this rank's files, then its part; an OSError is written there too, and raised."""
        try:
            if self.is_first:
                folder.remove_leftovers(self.run, self.job["attempt"])
            files.make_folder(self.temporary / "tensors")
            files.make_folder(self.parts)
            name = f"tensors/__{self.job['rank']}_0.distcp"
            entry, self.why_cached = files.write_direct(self.temporary / name, image)
            entries = {name: entry} | {n: files.write(self.temporary / n, [data]) for n, data in contents.items()}
        except OSError as error:
            self.problem = f"rank {self.job['rank']}: {self._said(error)}"
            with contextlib.suppress(OSError):
                # Free space for the part, which notifies the other writers; the rank itself is notified in any case.
                files.remove_file(self.temporary / f"tensors/__{self.job['rank']}_0.distcp")
                self._tell({"error": self.problem})
            raise
        self._tell({"files": {name: entry.to_json() for name, entry in entries.items()}})

    def give_up(self, problem: str) -> None:
        """Write the part of a writer that exited before it had written one."""
        if not (self.parts / f"{self.job['rank']}.json").exists():
            self._tell({"error": f"rank {self.job['rank']}: {problem}"})

    def _said(self, error: OSError) -> str:
        place = next(p for p in self.temporary.parents if p.exists())
        return f"{error}, {shutil.disk_usage(place).free:,} bytes free"

    def _tell(self, part: dict[str, Any]) -> None:
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
        told: dict[int, dict[str, Any]] = {0: {"error": self.problem}} if self.problem else {}
        pause, began, over = POLL_SECONDS[0], time.monotonic(), math.inf
        while missing := set(range(self.job["world"])) - told.keys():
            for rank in missing:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    told[rank] = _parsed(rank, (self.parts / f"{rank}.json").read_bytes())
            patience = DOOMED_SECONDS if any("error" in part for part in told.values()) else PART_SECONDS
            if self.over.is_set():
                over = min(over, time.monotonic())
            if time.monotonic() > min(began + patience, over + LONE_SECONDS):
                break
            if len(told) < self.job["world"]:
                time.sleep(pause)
                pause = min(2 * pause, POLL_SECONDS[1])
        problem = next((part["error"] for part in told.values() if "error" in part), None)
        if missing and problem is None:
            problem = f"no answer from the writers of ranks {sorted(missing)} for {time.monotonic() - began:.0f} s"
        if problem is not None:
            raise OSError(problem)
        return {name: ManifestEntry.from_json(entry) for part in told.values() for name, entry in part["files"].items()}

    def publish(self) -> dict[str, Any]:
        """Write the manifest, rename the folder, apply the retention; return the answer. OSError: no checkpoint."""
        try:
            listed = self.gather()
            files.write(self.temporary / manifest.NAME, [manifest.render(listed)])
            for place in (self.temporary / "tensors", self.temporary):
                files.sync(place)
            folder.publish(self.temporary, self.final)
        except OSError:
            if not self.over.is_set():  # otherwise the next launch removes them: other writers may still be working
                files.remove_tree(self.temporary)
                files.remove_tree(self.parts)
            raise
        size, seconds = sum(entry.size for entry in listed.values()), time.monotonic() - self.began
        done: dict[str, Any] = {"bytes": size, "seconds": seconds}
        told = partial(events.record, self.run, "saved", step=self.job["step"], stall=self.job["stall"], tier="run")
        for action in (
            partial(told, **done),
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
    """This rank's part in the local tier. told: LocalStorage.told_to_writers."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.told, self.root = told, Path(told["root"])

    def keep(self, job: dict[str, Any], image: memoryview, contents: messages.Files) -> None:
        """Make a save valid in this node's folder; OSError if it fails."""
        part = local_files.PartRecord(job["rank"], job["world"], self.told["save"], self.told["node"], {})
        placed = f"tensors/__{job['rank']}_0.distcp", Path(job["image"]), image
        local_files.write(self.root, job["step"], part, placed, contents)

    def replicate(self, job: dict[str, Any]) -> None:
        """Copy the save to the peer; UserError if it fails."""
        from megamm.checkpoint.storage import transfer

        host, port = self.told["peer"]
        key = bytes.fromhex(self.told["key"])
        transfer.put((host, port), key, self.root, job["step"], job["rank"], job["floor"])


class Service:
    """The work of the process: local tier in the main thread; run folder and replicas each in a thread of their own.

    So a slow disk or network does not delay the others.
    """

    def __init__(self, first: mmap.mmap) -> None:
        """first: the anonymous image."""
        self.images = {"": first}
        self.constant: messages.Files = {}
        self.local: LocalPart | None = None
        self.run_folder, self.replicas, self.over = TaskQueue(), TaskQueue(), threading.Event()
        self.working = KeepAlive(partial(_say, {"kind": "alive"}))

    def serve(self) -> None:
        """Do the jobs on standard input until it closes."""
        for job, contents in messages.read(sys.stdin.buffer):
            if job["kind"] == "constant":
                self.constant = contents
                self.local = LocalPart(job["local"]) if "local" in job else None
            else:
                self._save(job, contents | self.constant)
        self.over.set()
        self.run_folder.finish()

    def _save(self, job: dict[str, Any], contents: messages.Files) -> None:
        image = memoryview(self._image(job["image"]))
        if "kept" in job["answers"]:
            assert self.local is not None
            with self.working:
                _answer("kept", job, partial(self.local.keep, job, image, contents))
        if "replicated" in job["answers"]:
            assert self.local is not None
            self.replicas.do(partial(self._replicate, self.local, job))
        if "written" in job["answers"]:
            self.run_folder.do(partial(self._write, job, image[: job["bytes"]], contents))

    def _replicate(self, local: Local, job: dict[str, Any]) -> None:
        with self.working:
            _answer("replicated", job, partial(local.replicate, job))

    def _image(self, path: str) -> mmap.mmap:
        if path not in self.images:
            with open(path, "rb") as file:
                self.images[path] = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        return self.images[path]

    def _write(self, job: dict[str, Any], image: memoryview, contents: messages.Files) -> None:
        attempt = SaveAttempt(job, self.over)
        with self.working:
            _answer("written", job, partial(attempt.write_own, image, contents))
            if "published" in job["answers"]:
                _answer("published", job, attempt.publish)


def _answer(kind: str, job: dict[str, Any], action: Callable[[], dict[str, Any] | None]) -> None:
    """Run an action and send its result."""
    try:
        said = {"error": None} | (action() or {})
    except (OSError, UserError) as error:
        said = {"error": str(error)}
    _say({"kind": kind, "step": job["step"], "attempt": job["attempt"]} | said)


def _say(line: dict[str, Any]) -> None:
    """Send a line in one write, smaller than PIPE_BUF, so that lines of several threads do not mix."""
    os.write(sys.stdout.fileno(), (json.dumps(line) + "\n").encode())


def _end(error: threading.ExceptHookArgs) -> None:
    """Exit after an unexpected error in a thread, so that the rank notices it."""
    traceback.print_exception(error.exc_type, error.exc_value, error.exc_traceback)
    os._exit(1)


def main() -> None:
    """Run `python -m megamm.checkpoint.writer DESCRIPTOR BYTES PARENT`: the shared memory, and the rank's process."""
    descriptor, size, parent = map(int, sys.argv[1:])
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it exited before the call to prctl
        return
    os.nice(NICENESS)
    # The rank decides when to exit: it may want to save because of the same signal.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.excepthook = _end
    Service(mmap.mmap(descriptor, size, prot=mmap.PROT_READ)).serve()


if __name__ == "__main__":
    main()
