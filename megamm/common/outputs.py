"""Checks of output paths before any work: a folder that cannot be written to is one line, not a traceback hours later.

Every `OSError` that a user can fix has the same form: `user_error` turns it into a UserError, also for `cli.main`.
"""

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megamm.common.errors import UserError

_REMEDIES = {
    errno.EACCES: "choose another path, or change its permissions",
    errno.EPERM: "choose another path, or change its permissions",
    errno.EROFS: "choose a path on a file system that is not mounted read-only",
    errno.ENOTDIR: "choose a path whose parents are folders",
    errno.EEXIST: "choose another path, or remove what is there",
    errno.EISDIR: "give a file, not a folder",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "fix the symbolic links of this path",
    errno.ENOSPC: "free some space, or choose a path on another file system",
    errno.EDQUOT: "free some space, or choose a path on another file system",
}
"""What a user can do, by error number. A missing file is not among them: commands check their inputs themselves."""


def user_error(error: OSError, what: str | None = None) -> UserError | None:
    """Return an error of the operating system about a path as a UserError; None if a user cannot fix it."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None or error.filename is None:
        return None
    reason = os.strerror(error.errno or 0)
    return UserError(f"{what}: {reason}" if what else reason, where=os.fsdecode(error.filename), remedy=remedy)


def check_folder(folder: Path, name: str) -> None:
    """Raise UserError if the folder cannot be created or no file can be created in it; creates nothing.

    name: the option or config key that set it. The check creates a file without a name in the folder, or in the nearest
    parent that exists: permissions alone do not show read-only file systems and NFS without root's rights.
    """
    existing = folder.absolute()
    try:
        while not _exists(existing) and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        error.filename = str(existing)
        raise _unwritable(folder, name, error) from None


def check_file(file: Path, name: str) -> None:
    """Raise UserError if the file exists but cannot be changed, or cannot be created; creates nothing."""
    try:
        if not _exists(file):
            check_folder(file.absolute().parent, name)
        elif file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
        else:
            file.open("ab").close()
    except OSError as error:
        raise _unwritable(file, name, error) from None


def check_inside(folder: Path, key: str, files: Sequence[str], folders: Sequence[str]) -> None:
    """Raise UserError if one of these files or folders exists in the folder and cannot be written to."""
    for name in files:
        if _exists(folder / name):
            check_file(folder / name, key)
    for name in folders:
        check_folder(folder / name, key)


def _exists(path: Path) -> bool:
    """Whether there is anything, also a dangling link; unlike `Path.exists`, an OSError other than absence shows."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _unwritable(path: Path, name: str, error: OSError) -> UserError:
    known = user_error(error, f"cannot write to {name}")
    remedy = f"set {name} to a folder that can be written to"
    where = path if error.filename in (None, str(path)) else f"{path}: {error.filename}"
    if known is not None:
        return UserError(known.what, where=where, remedy=known.remedy)
    return UserError(f"cannot write to {name}: {error.strerror}", where=where, remedy=remedy)
