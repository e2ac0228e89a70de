"""A process beside rank 0 that uploads finished checkpoints to remote storage, so that no step waits for uploads.

It looks for finished folders and uploads the newest that is not there yet (if saves are faster than uploads, those in
between are skipped). It retries with growing pauses without limit, and applies the retention there. It exits with the
process that started it; an unfinished upload does not count and is continued by the next process.

    python -m megamm.checkpoint.storage.uploader RUN URL KEEP KEEP_BEST PARENT     (started by `Uploader`)
"""

import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from megamm.checkpoint import manifest, retention
from megamm.checkpoint.storage.remote import RemoteCheckpoints, RemoteError
from megamm.common import events
from megamm.common.errors import UserError

log = logging.getLogger(__name__)
POLL, FIRST_PAUSE, LONGEST_PAUSE = 0.5, 0.5, 60.0
"""Seconds: between checks for a new checkpoint; pause after the first failure; maximum pause, after doubling."""
_DRAIN = b"drain\n"


class Uploader:
    """Rank 0's side of the process."""

    def __init__(self, run: Path, url: str, keep: int, keep_best: bool) -> None:
        """Start the process. UserError unless the URL is writable."""
        RemoteCheckpoints(url).check_writable()
        self._command = [sys.executable, "-m", __name__, str(run), url, str(keep), str(int(keep_best))]
        self._command.append(str(os.getpid()))
        self.start()

    def start(self) -> None:
        """Start the process (again, after `stop`)."""
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, start_new_session=True)

    @property
    def pid(self) -> int:
        """Process id of the uploader."""
        return self._process.pid

    def check(self) -> None:
        """Restart the process if it has died; call it from time to time."""
        if self._process.poll() is not None:
            log.warning("the uploader exited with %s; restarting it", self._process.returncode)
            self.start()

    def finish(self, seconds: float) -> bool:
        """Wait up to `seconds` for the upload of finished checkpoints; return whether the newest is uploaded."""
        self.check()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(_DRAIN)
            self._process.stdin.close()
            return self._process.wait(seconds) == 0
        except (subprocess.TimeoutExpired, BrokenPipeError):
            log.warning("the newest checkpoint is not yet in remote storage; the next start of this run continues")
            return False
        finally:
            self.stop()

    def stop(self) -> None:
        """Kill the process at once; an unfinished upload does not count."""
        self._process.kill()
        self._process.wait()


class _Loop:
    """The loop of the process."""

    def __init__(self, run: Path, remote: RemoteCheckpoints, keep: int, keep_best: bool) -> None:
        self.run, self.remote, self.keep, self.keep_best = run, remote, keep, keep_best
        self.draining = threading.Event()
        self._settled: tuple[str, int, int] | None = None
        """The newest checkpoint once it is done: its name, and its manifest's inode and time (ns)."""

    def forever(self) -> None:
        """Upload until drained; retry failures."""
        failures = 0
        while True:
            # Read before looking for checkpoints: all that were finished when the order came are seen.
            last_round = self.draining.is_set()
            folder = self._newest_open()
            if folder is None:
                failures = 0
                if last_round:
                    return
                self.draining.wait(POLL)
                continue
            try:
                self._copy(folder)
                failures = 0
            except RemoteError as error:
                failures += 1
                pause = min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE)
                log.warning("upload of %s, attempt %d: %s; retry in %.1f s", folder.name, failures, error, pause)
                step = manifest.step_of(folder.name)
                events.record(self.run, "upload_failed", step=step, tries=failures, why=error.what, retry_in=pause)
                time.sleep(pause)

    def _newest_open(self) -> Path | None:
        """Return the newest finished checkpoint, unless it is already done."""
        names = retention.complete(self.run)
        if not names:
            return None
        folder = self.run / "checkpoints" / names[-1]
        try:
            return None if self._settled == _identity(folder) else folder
        except FileNotFoundError:
            return None

    def _copy(self, folder: Path) -> None:
        start, step = time.monotonic(), manifest.step_of(folder.name)
        retention.set_uploading(self.run, folder.name)  # first: from now on the retention keeps it
        try:
            identity = _identity(folder)
            copied = self.remote.upload(folder, self.run / "uploads" / f"{folder.name}.jsonl")
        except FileNotFoundError:
            return  # it was removed before it was marked as being uploaded
        except RemoteError:
            raise
        except UserError as error:
            log.warning("not uploaded: %s", error)
            events.record(self.run, "skipped_checkpoint", folder=str(folder), why=error.what, tier="remote")
            self._settled = identity
            return
        finally:
            retention.set_uploading(self.run, "")
        self._settled = identity
        if copied.files:
            seconds = time.monotonic() - start
            events.record(
                self.run,
                "saved",
                step=step,
                tier="remote",
                seconds=seconds,
                bytes=copied.bytes,
                kept_files=copied.kept,
            )
        self.remote.apply_retention(self.keep, self.keep_best)


def _identity(folder: Path) -> tuple[str, int, int]:
    """Return an identity of the folder, which changes when the same step is saved again."""
    status = (folder / manifest.NAME).stat()
    return folder.name, status.st_ino, status.st_mtime_ns


def _obey(loop: _Loop, parent: int) -> None:
    """Watch for the order to drain, and exit when the process that started this one exits."""
    ordered = False
    while True:
        if os.getppid() != parent:
            os._exit(1)
        if ordered:
            time.sleep(POLL)
        elif select.select([sys.stdin], [], [], POLL)[0]:
            if os.read(sys.stdin.fileno(), len(_DRAIN)) != _DRAIN:
                os._exit(1)  # end of file: the process that started this one has exited
            ordered = True
            loop.draining.set()


def main(arguments: Sequence[str]) -> int:
    """Run as a process; exit code 0 when drained."""
    run, url, keep, keep_best, parent = arguments
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    loop = _Loop(Path(run), RemoteCheckpoints(url), int(keep), keep_best == "1")
    threading.Thread(target=_obey, args=(loop, int(parent)), daemon=True).start()
    loop.forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
