"""A process beside rank 0 that copies finished checkpoints to the durable tier, so that no step waits for it.

It looks for finished folders, copies the newest that is not there yet (if saves are faster than the line, those in
between are left out), tries again with growing pauses for as long as it takes, and applies the retention there. It ends
with the process that started it; what was not finished does not count and is taken up by the next one.

    python -m megamm.tiers.uploader RUN URL KEEP KEEP_BEST PARENT     (started by `Uploader`)
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

from megamm.checkpoint import manifest
from megamm.errors import UserError
from megamm.resilience import events
from megamm.tiers import retention
from megamm.tiers.durable import DurableTier
from megamm.tiers.remote import RemoteError

log = logging.getLogger(__name__)
POLL, FIRST_PAUSE, LONGEST_PAUSE = 0.5, 0.5, 60.0
"""Seconds: between looks for a new checkpoint; after the first failure; at most, doubling."""
_DRAIN = b"drain\n"


class Uploader:
    """The process, seen from rank 0."""

    def __init__(self, run: Path, url: str, keep: int, keep_best: bool) -> None:
        """UserError unless the URL can be written to."""
        DurableTier(url).check_writable()
        self._command = [sys.executable, "-m", __name__, str(run), url, str(keep), str(int(keep_best))]
        self._command.append(str(os.getpid()))
        self.start()

    def start(self) -> None:
        """Once more, after `stop`."""
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, start_new_session=True)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def check(self) -> None:
        """Start it anew if it has died; to be called now and then."""
        if self._process.poll() is not None:
            log.warning("the uploader ended with %s: started again", self._process.returncode)
            self.start()

    def finish(self, seconds: float) -> bool:
        """Let it copy what is finished by now, for so long at most; whether the newest checkpoint is there."""
        self.check()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(_DRAIN)
            self._process.stdin.close()
            return self._process.wait(seconds) == 0
        except (subprocess.TimeoutExpired, BrokenPipeError):
            log.warning("the newest checkpoint is not yet in the durable tier; the next start of this run goes on")
            return False
        finally:
            self.stop()

    def stop(self) -> None:
        """End it at once; a copy that is not finished does not count."""
        self._process.kill()
        self._process.wait()


class _Loop:
    """What the process does."""

    def __init__(self, run: Path, tier: DurableTier, keep: int, keep_best: bool) -> None:
        self.run, self.tier, self.keep, self.keep_best = run, tier, keep, keep_best
        self.draining = threading.Event()
        self._settled: tuple[str, int, int] | None = None
        """The newest checkpoint, once it needs nothing more: its name, its manifest's inode and time (ns)."""

    def forever(self) -> None:
        """Copy until drained; what fails is tried again."""
        failures = 0
        while True:
            # Asked before looking: whatever was finished when the order came is then seen.
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
                log.warning("upload of %s, try %d: %s; again in %.1f s", folder.name, failures, error, pause)
                step = manifest.step_of(folder.name)
                events.record(self.run, "upload_failed", step=step, tries=failures, why=error.what, retry_in=pause)
                time.sleep(pause)

    def _newest_open(self) -> Path | None:
        """The newest finished checkpoint, unless it is settled."""
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
        retention.set_uploading(self.run, folder.name)
        try:
            identity = _identity(folder)
            copied = self.tier.upload(folder, self.run / "uploads" / f"{folder.name}.jsonl")
        except FileNotFoundError:
            return  # removed before it was marked as being copied
        except RemoteError:
            raise
        except UserError as error:
            log.warning("not uploaded: %s", error)
            events.record(self.run, "skipped_checkpoint", folder=str(folder), why=error.what, tier="durable")
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
                tier="durable",
                seconds=seconds,
                bytes=copied.bytes,
                kept_files=copied.kept,
            )
        self.tier.apply_retention(self.keep, self.keep_best)


def _identity(folder: Path) -> tuple[str, int, int]:
    """Changes when the same step is saved again."""
    status = (folder / manifest.NAME).stat()
    return folder.name, status.st_ino, status.st_mtime_ns


def _obey(loop: _Loop, parent: int) -> None:
    """Watch for the order to drain, and for the end of the process that started this one."""
    ordered = False
    while True:
        if os.getppid() != parent:
            os._exit(1)
        if ordered:
            time.sleep(POLL)
        elif select.select([sys.stdin], [], [], POLL)[0]:
            if os.read(sys.stdin.fileno(), len(_DRAIN)) != _DRAIN:
                os._exit(1)
            ordered = True
            loop.draining.set()


def main(arguments: Sequence[str]) -> int:
    """Run as a process; exit code 0 when drained."""
    run, url, keep, keep_best, parent = arguments
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    loop = _Loop(Path(run), DurableTier(url), int(keep), keep_best == "1")
    threading.Thread(target=_obey, args=(loop, int(parent)), daemon=True).start()
    loop.forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
