"""Writes one tar of a folder of shards with deterministic bytes, and joins the tars of a folder into its index.

`ShardWriter` (shards/folder.py) writes a folder from first to last; where units write the tars of a folder, each is
written by `write_tar` with a list of its members beside it, and `join_tars` makes the index of all.
"""

import errno
import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megamm.common.errors import UserError
from megamm.common.files import new_file, sync
from megamm.shards.index import INDEX, IndexBuilder, Member
from megamm.shards.tar_reader import BLOCK

_MEMBERS = ".members"
"""Suffix of the list of a tar's members, in the folder beside that of the tars."""


class TarWriter(tarfile.TarFile):
    """A tar to which members are appended, and which keeps where they are."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(fileobj=file, mode="w", format=tarfile.GNU_FORMAT)
        self.written: list[Member] = []

    def append(self, key: str, ext: str, data: bytes, tokens: int | None = None) -> None:
        """Append one member."""
        info = tarfile.TarInfo(f"{key}.{ext}")  # mtime, uid and gid are 0: same input, same bytes
        info.size = len(data)
        # Keys and extensions are short, so a member has one header block, without GNU long-name blocks before it.
        offset = self.offset + BLOCK
        self.addfile(info, io.BytesIO(data))
        # The list that tarfile keeps for reading would hold every header.
        self.members.clear()  # type: ignore[attr-defined]
        self.written.append(Member(key, ext, offset, len(data), tokens))


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk into a UserError that names the folder being written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remedy = "free some space and run the command again; incomplete shards were removed"
        raise UserError("the disk is full", where=folder, remedy=remedy) from error


def write_tar(path: Path, members: Iterable[tuple[str, str, bytes, int | None]]) -> list[Member]:
    """Write a tar of (key, extension, data, tokens) that gets its name when it is complete; returns its members.

    The list of them is written first, so a tar with a name has one. UserError if the disk is full.
    """
    lists = _lists(path.parent)
    for folder in (path.parent, lists):
        folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(path.parent), new_file(path) as file:
        tar = TarWriter(file)
        for member in members:
            tar.append(*member)
        tar.close()
        with new_file(lists / f"{path.name}{_MEMBERS}") as listed:
            listed.write(json.dumps([[m.key, m.ext, m.offset, m.size, m.tokens] for m in tar.written]).encode())
    return tar.written


def join_tars(folder: Path, tars: int, target: Path) -> None:
    """Write the index of `tars` tars that `write_tar` has written to a folder, which then gets the name `target`.

    A target that exists is what an earlier attempt has joined, and stays.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder), tempfile.TemporaryFile(dir=folder.parent) as spool:
        index = IndexBuilder(spool)
        for number in range(tars):
            tar = folder / f"{number:06d}.tar"
            listed = json.loads((_lists(folder) / f"{tar.name}{_MEMBERS}").read_bytes())
            index.append_members([Member(*member) for member in listed], tar.stat().st_size)
        # Everything is on disk before the rename: after a crash the folder is complete or absent.
        with new_file(folder / INDEX) as file:
            index.write(file)
        folder.rename(target)
        sync(target.parent)


def _lists(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{_MEMBERS}")
