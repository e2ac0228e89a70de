"""Removes the folder of the data workers' sockets when their fork server (loader.py), which imports it, exits.

Python creates that folder for the process that starts the server, and removes it when that process exits. A killed
rank cannot do so, but the server notices the kill and exits normally. A fork server runs no other code than its
preloaded modules, so this module takes effect on import. It is separate from loader.py, which other processes import.
"""

import atexit
import os
import shutil
import time

from megamm.common.processes import WORKERS_FOLDER

_SECONDS = 1.0
"""Seconds within which the kernel assigns a new parent to the children of an exiting process."""


def _end(folder: str, starter: int) -> None:
    """Remove the folder at exit, unless the starter only stopped its server: it continues to use the folder."""
    deadline = time.monotonic() + _SECONDS
    while os.getppid() == starter and time.monotonic() < deadline:
        time.sleep(0.001)
    if os.getppid() != starter:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # with torch, a normal interpreter exit takes tenths of a second


if WORKERS_FOLDER in os.environ:
    atexit.register(_end, os.environ[WORKERS_FOLDER], os.getppid())
