"""Shards: aligned WebDataset tar files with an index, and token caches (also stored as shards).

    SHARDS/<source>/<train|heldout>/<modality>/000000.tar, 000001.tar, ..., index.safetensors
    SHARDS/<source>/<train|heldout>/<modality>.tokens-<codec_id>/000000.tar, ..., index.safetensors

A tar member is `<key>.<ext>`; the folders of a split hold the same keys in the same order. A document with several
parts in a fixed order (a page with pictures) has members `<key>.<number>.<ext>`: parts 0, 1, 2 ... over all
folders, in reading order. The index (shards/index.py) says where every member is; that of a token cache also has its
length. The members of a token cache are `.npy` arrays of token ids, `[T]`.
Format: WebDataset (Aizman et al. 2019, "High Performance I/O For Large Scale Deep Learning"), plain ustar/GNU tar.
"""

import io
import operator
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np

from megamm.common.errors import UserError
from megamm.common.files import new_file, sync
from megamm.common.sample import IntArray
from megamm.shards.index import INDEX, UNNUMBERED, IndexBuilder, ShardIndex, map_index, parse_extension
from megamm.shards.jsonl_index import read_jsonl_index
from megamm.shards.tar_checks import member_of, require_tars
from megamm.shards.tar_reader import StoredMember, TarReader
from megamm.shards.tar_writer import TarWriter
from megamm.shards.tar_writer import disk_errors as _disk_errors

SPLITS = ("train", "heldout")
KEY = re.compile(r"[A-Za-z0-9_\-]{1,80}")
"""A sample's key: no dot (WebDataset ends the key at the first one), short enough for a plain tar header."""
EXTENSION = re.compile(r"(?:(\d{1,6})\.)?([A-Za-z0-9]{1,8})")
"""The part after the key: the part's number, if the sample's parts have an order, and the file's extension."""


class ShardWriter:
    """Writes a folder of shards with deterministic bytes; the folder gets its name only when it is complete.

    Use it as a context manager. Raises UserError if the folder exists, a key is invalid or the disk is full.
    """

    def __init__(self, folder: Path, *, samples_per_shard: int = 1000) -> None:
        if folder.exists():
            raise UserError("the shards already exist", where=folder, remedy="delete that folder to create them again")
        self.folder, self.samples_per_shard = folder, samples_per_shard
        self.partial = folder.with_name(f".{folder.name}.partial")
        self.count = self._shards = 0
        self._names: set[tuple[str, int]] = set()
        self._file: BinaryIO | None = None
        """The current tar."""
        self._tar: TarWriter | None = None

    def __enter__(self) -> "ShardWriter":
        # A hidden name beside the final one: the rename at the end stays within one file system.
        if self.partial.exists():  # left by a killed run
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)
        self._spool = cast(BinaryIO, tempfile.TemporaryFile(dir=self.partial))
        self._index = IndexBuilder(self._spool)
        self._open_shard()
        return self

    def add(self, key: str, ext: str, data: bytes, tokens: int | None = None) -> None:
        """Append one member `<key>.<ext>`; ext includes the part's number, if any; tokens: length in a token cache."""
        if not KEY.fullmatch(key) or not EXTENSION.fullmatch(ext):
            remedy = "use 1 to 80 letters, digits, `_` or `-`, and an extension like png or 3.png"
            raise UserError(f"invalid sample name {f'{key}.{ext}'[:100]!r}", where=self.folder, remedy=remedy)
        name = (key, parse_extension(ext)[1])
        if name in self._names:
            raise UserError(f"duplicate sample key {key!r}", where=self.folder, remedy="make the keys unique")
        with _disk_errors(self.folder):
            assert self._tar is not None
            members = self._tar.written
            # All members of a key stay in one tar, as WebDataset's readers require, so a shard can exceed the limit.
            if len(members) >= self.samples_per_shard and members[-1].key != key:
                self._close_shard()
                self._open_shard()
            self._tar.append(key, ext, data, tokens)
        self._names.add(name)
        self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with _disk_errors(self.folder):
                if error is None:
                    self._close_shard()
                    # Everything is on disk before the rename: after a crash the folder is complete or absent.
                    with new_file(self.partial / INDEX) as file:
                        self._index.write(file)
                    self.partial.rename(self.folder)
                    sync(self.folder.parent)
        finally:
            with suppress(OSError):  # it writes its buffer, perhaps to a full disk
                self._spool.close()
            # After an error, close only the file: closing the tar would write to a disk that may be full.
            if self._file is not None:
                with suppress(OSError):
                    self._file.close()
            shutil.rmtree(self.partial, ignore_errors=True)

    def _open_shard(self) -> None:
        path = self.partial / f"{self._shards:06d}.tar"
        self._shards += 1
        self._file = path.open("wb")
        self._tar = TarWriter(self._file)

    def _close_shard(self) -> None:
        """Finish the current tar, and add its members to the index."""
        assert self._tar is not None and self._file is not None
        path = self.partial / f"{self._shards - 1:06d}.tar"
        self._tar.close()
        self._file.close()
        sync(path)
        self._index.append_members(self._tar.written, path.stat().st_size)
        self._tar = self._file = None


class MemberTexts(Sequence[str]):
    """A text of every member, such as its key, that is made when it is asked for."""

    def __init__(self, count: int, text_of: Callable[[int], str]) -> None:
        self._numbers, self._text_of = range(count), text_of

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: Any) -> Any:
        found = self._numbers[i]
        return [self._text_of(n) for n in found] if isinstance(found, range) else self._text_of(found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]


class ShardFolder:
    """Random access to one folder of shards; members are numbered through all its tars.

    Opening maps the index, and checks tars as `require_tars` does; `read` checks the header of the member it reads.
    Raises UserError, with the file and a remedy, if a shard is missing, truncated or mismatched. Nothing that it keeps
    grows with the number of members, except for indexes of earlier versions (shards/jsonl_index.py).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = _open_index(folder)
        self.keys, self.extensions = (MemberTexts(len(self), of) for of in (self.index.key_of, self._extension_of))
        """Key of each member, and its extension without the part's number."""
        self._reader = TarReader()

    def __len__(self) -> int:
        return len(self.index)

    @property
    def tokens(self) -> np.ndarray | None:
        """Length in tokens of each member `[members]`, of a narrow type; None if this is not a token cache."""
        return self.index.tokens

    @property
    def parts(self) -> IntArray:
        """Number of each member's part `[members]`, UNNUMBERED where it has none."""
        if self.index.part is None:
            return np.broadcast_to(np.int64(UNNUMBERED), (len(self),))
        return self.index.part.astype(np.int64) - 1

    def _extension_of(self, i: int) -> str:
        return self.index.form_of(i).rpartition(".")[2]

    def stored(self, i: int) -> StoredMember:
        """Member i with its tar, for a TarReader, also in another process."""
        return member_of(self.folder, self.index, i)

    def read(self, i: int) -> bytes:
        """The data of member i. Raises UserError if the tar's header there does not match this member."""
        return self._reader.read(self.stored(i))


def _open_index(folder: Path) -> ShardIndex:
    """The index of a folder, of today's form or of earlier versions, checked against its tars."""
    try:
        index = map_index(folder)
    except FileNotFoundError:
        return read_jsonl_index(folder)
    require_tars(folder, index)
    return index


_PLAIN = re.compile(
    rb"\x93NUMPY\x01\x00\x76\x00\{'descr': '<u([24])', 'fortran_order': False, 'shape': \((\d+),\), \} *\n"
)
"""The header that numpy writes for such an array; numpy's general parser takes ten times as long as all the rest."""


def tokens_to_bytes(ids: IntArray, vocabulary_size: int) -> bytes:
    """Token ids `[T]` in [0, vocabulary_size) as `.npy` bytes, uint16 if they fit, else uint32."""
    assert ids.ndim == 1 and (ids.size == 0 or 0 <= ids.min() <= ids.max() < vocabulary_size), "token id out of range"
    file = io.BytesIO()
    np.save(file, ids.astype(np.uint16 if vocabulary_size <= 2**16 else np.uint32), allow_pickle=False)
    return file.getvalue()


def tokens_from_bytes(data: bytes) -> IntArray:
    """The inverse of tokens_to_bytes: int64 `[T]`. Raises ValueError if the bytes are not such an array."""
    # The fast path must also match the length; anything unusual goes to numpy, which gives the error.
    plain = _PLAIN.match(data)
    if plain and len(data) == plain.end() + int(plain[1]) * int(plain[2]):
        return np.frombuffer(data, f"<u{int(plain[1])}", offset=plain.end()).astype(np.int64)
    ids = np.load(io.BytesIO(data), allow_pickle=False)
    if ids.ndim != 1 or ids.dtype not in (np.uint16, np.uint32):
        raise ValueError(f"not token ids: {ids.dtype} {list(ids.shape)}")
    return ids.astype(np.int64)
