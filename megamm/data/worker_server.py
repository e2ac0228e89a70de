"""Imported by the server that forks the data workers (loader.py): it removes the folder of their sockets at its end.

Python makes that folder for the process that starts the server, and removes it at that process's own end. A rank that
is killed never comes to it, while the server sees the kill and ends in order. What a server preloads is all that it
does beside its forks, so this module works when it is imported.
"""

import atexit
import os
import shutil
import time

FOLDER = "MEGAMM_WORKERS_FOLDER"
"""The variable that names it."""
_SECONDS = 1.0
"""Within which the kernel, which has closed the files of a process that ends, gives its children another parent."""


def _end(folder: str, starter: int) -> None:
    """A starter that has only stopped its server goes on to use the folder, and Python removes it."""
    deadline = time.monotonic() + _SECONDS
    while os.getppid() == starter and time.monotonic() < deadline:
        time.sleep(0.001)
    if os.getppid() != starter:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # the interpreter's own end takes tenths of a second with torch


if FOLDER in os.environ:
    atexit.register(_end, os.environ[FOLDER], os.getppid())
