"""No leftovers: temporary files of a session are in its own folder, which must be empty at the end.

Files that the tests leave there or in shared memory fail the session and are named. pytest's own folders and that of
torch.compile are removed with the folder if all tests passed, and kept for inspection otherwise.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

EXPECTED = ("pytest-of-", "torchinductor_")
SHARED_MEMORY = Path("/dev/shm")


class Leftovers:
    """Watches one session, in the process that the user started (not in the workers)."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="megamm-"))
        self.folder.chmod(0o711)  # munge requires search permission for all on the folders above its socket
        self.shared_before = _shared_memory()
        os.environ["TMPDIR"] = str(self.folder)
        tempfile.tempdir = None  # read TMPDIR again

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        """Look after the workers have ended, and before pytest's summary, which stays the last line."""
        yield
        files = [path for path in sorted(self.folder.iterdir()) if not path.name.startswith(EXPECTED)]
        shared = _shared_memory() - self.shared_before
        left = [*files, *sorted(shared - _used(shared))]
        if left:
            print(f"\nThe tests left behind: {', '.join(map(str, left))}")
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
        if session.exitstatus == pytest.ExitCode.OK:
            shutil.rmtree(self.folder)
        else:
            print(f"\nTemporary files of the tests are kept in {self.folder}")


def _shared_memory() -> set[Path]:
    """Return this user's files in shared memory."""
    found = set()
    for path in SHARED_MEMORY.glob("*"):
        with suppress(FileNotFoundError):
            if path.lstat().st_uid == os.getuid():
                found.add(path)
    return found


def _used(paths: set[Path]) -> set[Path]:
    """Return those that a living process has mapped: they belong to other programs of this user."""
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps") if paths else ():
        with suppress(OSError):
            text = maps.read_text()
            used |= {path for path in paths if str(path) in text}
    return used
