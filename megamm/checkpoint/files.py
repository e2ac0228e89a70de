"""All changes that a save makes to a file system go through these few functions, so that a test can stop at each.

Data is synced before a file is renamed: if a rename has survived a crash, the contents have too.
"""

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

from megamm.checkpoint import manifest
from megamm.checkpoint.manifest import ManifestEntry

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Arguments of renameat2(2), which Python lacks; some network file systems do not support an exchange."""
renameat2 = getattr(ctypes.CDLL(None), "renameat2", lambda *_: -1)
PIECE = 1 << 20
"""Bytes hashed and written at a time: when they are written, they are still in the processor's cache."""
DIRECT_PIECE = 16 << 20
"""The same with O_DIRECT, where a call costs more than copying the bytes."""


def write(path: Path, pieces: Iterable[bytes | memoryview]) -> ManifestEntry:
    """Write a new file and sync it; return its manifest entry. OSError if it fails."""
    digest, size = manifest.hasher(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            left = memoryview(piece)  # write(2) may write less than asked
            while left:
                left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return ManifestEntry(size, digest.hexdigest())


def write_direct(path: Path, data: memoryview) -> tuple[ManifestEntry, str]:
    """Write page-aligned memory with O_DIRECT (open(2)), like `write` otherwise.

    The copy into the page cache takes most of a write's processor time. Also return why the page cache was used, or ""
    if it was not.
    """
    digest, flags, direct, why = manifest.hasher(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, True, ""
    try:
        descriptor = os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        # open(2): EINVAL if the file system does not support O_DIRECT.
        if error.errno != errno.EINVAL:
            raise
        direct, why = False, "the file system does not support O_DIRECT"
        descriptor = os.open(path, flags, 0o644)
    try:
        for left in in_pieces(data, DIRECT_PIECE):
            digest.update(left)
            while left:
                # O_DIRECT takes whole pages only; what is left after them goes through the cache.
                whole = len(left) - len(left) % mmap.PAGESIZE
                if direct and not whole:  # the end, less than a page
                    direct = _use_cache(descriptor)
                try:
                    left = left[os.write(descriptor, left[:whole] if direct else left) :]
                except OSError as error:
                    if not direct or error.errno != errno.EINVAL:
                        raise
                    direct, why = _use_cache(descriptor), "the file system rejects page-aligned writes with O_DIRECT"
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return ManifestEntry(len(data), digest.hexdigest()), why


def _use_cache(descriptor: int) -> bool:
    """Switch a descriptor to the page cache; return False, the new value of `direct`."""
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
    return False


def entry_of(pieces: Iterable[bytes | memoryview]) -> ManifestEntry:
    """Return the manifest entry of a file with these contents."""
    digest, size = manifest.hasher(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
    return ManifestEntry(size, digest.hexdigest())


def in_pieces(data: bytes | memoryview, length: int = PIECE) -> Iterable[memoryview]:
    """Return the same bytes in pieces of `length`."""
    view = memoryview(data)
    return (view[i : i + length] for i in range(0, len(view), length))


def make_folder(path: Path) -> None:
    """Create a folder and its parents; it may exist already."""
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            try:
                os.mkdir(folder)
            except FileExistsError:  # another rank's writer was faster
                continue


def rename(old: Path, new: Path) -> None:
    """Rename within a folder, atomically; a file of the new name is replaced."""
    os.rename(old, new)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically, so that both always exist; return False if that is not supported."""
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    # fsync(2): a new or renamed file survives a power cut only after its folder has been synced too.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(path: Path) -> None:
    """Remove a file; it may be missing."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def remove_tree(path: Path) -> None:
    """Remove a folder with its contents, without following links; it may be missing."""
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            remove_tree(Path(entry.path))
        else:
            remove_file(Path(entry.path))
    os.rmdir(path)
