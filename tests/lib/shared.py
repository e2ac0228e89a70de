"""Folders that several test files use with the same content: made once per pytest session, by all its workers.

The first worker that needs it makes the folder, the others wait; its content is never changed. A test that wants to
change it, or runs next to it, takes a copy.
"""

import fcntl
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

EVENT = "shared.folder"
"""An audit event (sys.audit) of each use, as the processes that made the folder may belong to another worker."""
_session: Path | None = None
"""The folder of the session, set by conftest.py."""


def begin(own: Path) -> None:
    """Set the temporary folder of this worker's tests; those of pytest-xdist's workers are in one of the session."""
    global _session
    _session = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def shared(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of that name, which `make` creates and fills; after a failure the next caller repeats it."""
    assert _session is not None, "conftest.py must begin the session"
    sys.audit(EVENT)
    folder = _session / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            make(part)
            part.rename(folder)
    return folder


def copy(name: str, make: Callable[[Path], None], to: Path) -> None:
    """Fill `to` from the shared folder; outside a pytest session, `make` fills it directly."""
    if _session is None:
        make(to)
    else:
        shutil.copytree(shared(name, make), to, symlinks=True, dirs_exist_ok=True)
