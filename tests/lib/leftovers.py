"""Nothing is left behind: temporary files of a session lie in a folder of its own, which must be empty at the end.

What the tests leave there, or in shared memory, fails the session and is named. pytest's own folders and the one that
torch.compile makes are removed with the folder if all tests passed, and kept to look at otherwise.
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
        self.folder.chmod(0o711)  # munge wants the folders above its socket to be passable for all
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
    """This user's files in shared memory."""
    found = set()
    for path in SHARED_MEMORY.glob("*"):
        with suppress(FileNotFoundError):
            if path.lstat().st_uid == os.getuid():
                found.add(path)
    return found


def _used(paths: set[Path]) -> set[Path]:
    """Those that a living process has mapped: they belong to other programs of this user."""
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps") if paths else ():
        with suppress(OSError):
            text = maps.read_text()
            used |= {path for path in paths if str(path) in text}
    return used
