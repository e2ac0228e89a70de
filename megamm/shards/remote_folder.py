"""A folder of shards at a URL: its index is downloaded, verified and mapped; its members are read through the cache.

    URL/000000.tar, 000001.tar, ..., index.safetensors       uploaded as `megamm data` wrote them

The cached index is used if it has the digest that the index at the URL begins with, so a changed one is noticed at the
next start. Indexes without checksums, of earlier versions, are refused: nothing could be verified.
"""

import fcntl
import json
import os
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash

from megamm.common.errors import UserError
from megamm.shards.cache_space import IN_USE
from megamm.shards.columns import verify_columns
from megamm.shards.folder import MemberTexts, ShardFolder
from megamm.shards.index import INDEX, map_index
from megamm.shards.shard_cache import (
    MISMATCHES,
    PIECE,
    CacheOptions,
    RemoteFolder,
    RemoteMember,
    ShardCache,
    Wanted,
    cache_of,
)
from megamm.shards.tar_reader import TarReader

_BEGIN = re.compile(rb'.{8}\{"__metadata__":\{"content":"([0-9a-f]{32})"', re.DOTALL)
"""How an index with a digest begins (columns.py)."""
_BEGIN_BYTES = 69


class RemoteShardFolder(ShardFolder):
    """Random access to a folder of shards at a URL.

    Raises MissingFile for a missing index, StoreError if the store fails, UserError if the index cannot be used.
    """

    def __init__(self, url: str, options: CacheOptions) -> None:
        cache = cache_of(options)
        digest = _digest_at(url, cache)
        name = xxhash.xxh3_128_hexdigest(f"{url} {digest}".encode())
        local = cache.folder / name
        self._in_use = _locked_folder(local)
        if not (local / INDEX).exists():
            with open(local / "download", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not (local / INDEX).exists():
                    _download_index(url, local, cache)
        self.folder, self.url = local, url
        self.index = map_index(local)
        if self.index.checksum is None:
            remedy = "run `megamm data index FOLDER` on the local folder and upload its index again"
            raise UserError("the index has no checksums", where=f"{url}/{INDEX}", remedy=remedy)
        self.keys, self.extensions = (MemberTexts(len(self), of) for of in (self.index.key_of, self._extension_of))
        self._remote = RemoteFolder(url, str(local), options)
        self._reader = TarReader()

    def stored(self, i: int) -> RemoteMember:
        """Member i with its tar, for a TarReader, also in another process."""
        index = self.index
        assert index.checksum is not None
        numbers = int(index.offset[i]), int(index.size[i]), int(index.checksum[i])
        return RemoteMember(self._remote, index.shard_of(i), index.name_of(i), *numbers)

    @property
    def tar_bytes(self) -> int:
        """Size of all tars."""
        return int(self.index.tar_bytes.sum(dtype=np.int64))

    def piece(self, member: RemoteMember) -> tuple[int, Wanted]:
        """The piece of its tar that a member begins in, and the members that begin there."""
        number = member.offset // PIECE
        first, stop = (int(self.index.first[shard]) for shard in (member.shard, member.shard + 1))
        offset = self.index.offset[first:stop]
        inside = slice(*(first + int(n) for n in offset.searchsorted([number * PIECE, (number + 1) * PIECE])))
        columns = (self.index.offset[inside].astype(np.int64), self.index.size[inside].astype(np.int64))
        assert self.index.checksum is not None
        return number, Wanted(self._remote, member.shard, *columns, self.index.checksum[inside])

    def __del__(self) -> None:
        if hasattr(self, "_in_use"):
            os.close(self._in_use)


def _locked_folder(local: Path) -> int:
    """Create a folder of the cache; while any process has this descriptor open, the folder is not removed."""
    while True:
        local.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another process has removed the folder again
            marker = os.open(local / IN_USE, os.O_RDWR | os.O_CREAT)
            fcntl.flock(marker, fcntl.LOCK_SH)
            if os.fstat(marker).st_nlink:
                return marker
            os.close(marker)


def _digest_at(url: str, cache: ShardCache) -> str:
    """The digest that the index at the URL states for itself. UserError if it has none."""
    begin = cache.store(url).read(INDEX, 0, _BEGIN_BYTES, may_end=True)
    found = _BEGIN.match(begin)
    if found is None:
        remedy = "run `megamm data index FOLDER` on the local folder and upload its index again"
        raise UserError("damaged, or an index of an earlier version", where=f"{url}/{INDEX}", remedy=remedy)
    return found[1].decode()


def _download_index(url: str, local: Path, cache: ShardCache) -> None:
    """Download and verify the index; the file is complete or absent. A damaged answer is asked for again."""
    partial = local / f"{INDEX}.partial"
    for attempt in range(1, MISMATCHES + 1):
        try:
            _write_index(url, partial, cache)
            verify_columns(partial)
        except ValueError as error:
            cache.count(failures=1)
            partial.unlink(missing_ok=True)
            if attempt == MISMATCHES:
                remedy = "upload the index again; `megamm data index FOLDER` makes it from the tars"
                raise UserError(f"the index is damaged: {error}", where=f"{url}/{INDEX}", remedy=remedy) from error
        else:
            partial.replace(local / INDEX)
            return


def _write_index(url: str, target: Path, cache: ShardCache) -> None:
    """Download the index into a file. Raises ValueError if its header is damaged."""
    store = cache.store(url)
    size = int.from_bytes(store.read(INDEX, 0, 8), "little")
    try:
        header = json.loads(store.read(INDEX, 8, 8 + size, may_end=True))
        stop = 8 + size + max(int(entry["data_offsets"][1]) for name, entry in header.items() if name[0] != "_")
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"the header is damaged: {error!r}") from error
    cache.reserve_file(stop)
    with open(target, "wb") as file:
        for start in range(0, stop, PIECE):
            data = store.read(INDEX, start, min(start + PIECE, stop))
            file.write(data)
            cache.count(downloaded=len(data), requests=1)
