"""Files that are complete or absent, whatever happens while they are written.

Checkpoints have functions of their own for this (checkpoint/files.py), at each of which a test stops a save.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that gets its name, and replaces an earlier one, only when it is complete and on disk.

    Several processes, also of several machines, may write the same one at a time: the last one stays. OSError if it
    cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.uname().nodename[:16]}-{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    # fsync(2): a new or renamed file survives a power cut only after its folder has been synced too.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
