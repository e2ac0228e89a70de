"""Shards: aligned WebDataset tar files, each with an index beside it, and token caches (also stored as shards).

    SHARDS/<source>/<train|heldout>/<modality>/000000.tar, 000000.jsonl, 000001.tar, ...
    SHARDS/<source>/<train|heldout>/<modality>.tokens-<codec_id>/000000.tar, 000000.jsonl, ...

A tar member is `<key>.<ext>`; the folders of a split hold the same keys in the same order. A document with several
parts in a fixed order (a page with pictures) has members `<key>.<number>.<ext>`: parts 0, 1, 2 ... over all
folders, in reading order. An index has one JSON line per member: {"key", "ext", "offset", "size"}: ext includes the
number, offset and size (bytes) are those of the member's data in the tar; token caches add "tokens" (length).
`shards.json` holds the number of shards. The members of a token cache are `.npy` arrays of token ids, `[T]`.
Format: WebDataset (Aizman et al. 2019, "High Performance I/O For Large Scale Deep Learning"), plain ustar/GNU tar.
"""

import errno
import io
import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from megamm.common.errors import UserError
from megamm.common.sample import IntArray
from megamm.shards.tar_reader import BLOCK, StoredMember, TarReader

SPLITS = ("train", "heldout")
KEY = re.compile(r"[A-Za-z0-9_\-]{1,80}")
"""A sample's key: no dot (WebDataset ends the key at the first one), short enough for a plain tar header."""
EXTENSION = re.compile(r"(?:(\d{1,6})\.)?([A-Za-z0-9]{1,8})")
"""The part after the key: the part's number, if the sample's parts have an order, and the file's extension."""
UNNUMBERED = -1
"""Part number of a member without a number."""


@dataclass(frozen=True)
class Member:
    """One tar member: key, extension ("png", or "3.png" for part 3 of a document), offset and size of its data (bytes).

    `tokens` is its length in tokens, if it has one.
    """

    key: str
    ext: str
    offset: int
    size: int
    tokens: int | None = None

    @property
    def part(self) -> int:
        """Number of the part, UNNUMBERED if it has none."""
        number, _, _ = self.ext.rpartition(".")
        return int(number) if number else UNNUMBERED

    @property
    def extension(self) -> str:
        """The file's extension, without the part's number."""
        return self.ext.rpartition(".")[2]

    def to_line(self) -> str:
        """The member's line of an index."""
        entry = {name: value for name, value in self.__dict__.items() if value is not None}
        return json.dumps(entry, separators=(",", ":")) + "\n"


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
        self._members: list[Member] = []
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> "ShardWriter":
        # A hidden name beside the final one: the rename at the end stays within one file system.
        if self.partial.exists():  # left by a killed run
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)
        self._open_shard()
        return self

    def add(self, key: str, ext: str, data: bytes, tokens: int | None = None) -> None:
        """Append one member `<key>.<ext>`; ext includes the part's number, if any; tokens: length in a token cache."""
        if not KEY.fullmatch(key) or not EXTENSION.fullmatch(ext):
            remedy = "use 1 to 80 letters, digits, `_` or `-`, and an extension like png or 3.png"
            raise UserError(f"invalid sample name {f'{key}.{ext}'[:100]!r}", where=self.folder, remedy=remedy)
        name = (key, Member(key, ext, 0, 0).part)
        if name in self._names:
            raise UserError(f"duplicate sample key {key!r}", where=self.folder, remedy="make the keys unique")
        with _disk_errors(self.folder):
            # All members of a key stay in one tar, as WebDataset's readers require, so a shard can exceed the limit.
            if len(self._members) >= self.samples_per_shard and self._members[-1].key != key:
                self._close_shard()
                self._open_shard()
            assert self._tar is not None
            info = tarfile.TarInfo(f"{key}.{ext}")  # mtime, uid and gid are 0: same input, same bytes
            info.size = len(data)
            # Keys and extensions are short, so a member has one header block, without GNU long-name blocks before it.
            offset = self._tar.offset + BLOCK
            self._tar.addfile(info, io.BytesIO(data))
        self._names.add(name)
        self._members.append(Member(key, ext, offset, len(data), tokens))
        self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with _disk_errors(self.folder):
                if error is None:
                    self._close_shard()
                    # Everything is on disk before the rename: after a crash the folder is complete or absent.
                    write_counts(self.partial, self._shards)
                    _sync(self.partial)
                    self.partial.rename(self.folder)
                    _sync(self.folder.parent)
        finally:
            # After an error, close only the file: closing the tar would write to a disk that may be full.
            if self._tar is not None:
                self._tar.fileobj.close()  # type: ignore[union-attr]
            shutil.rmtree(self.partial, ignore_errors=True)

    def _open_shard(self) -> None:
        path = self.partial / f"{self._shards:06d}.tar"
        self._shards += 1
        self._tar = tarfile.TarFile(path, "w", format=tarfile.GNU_FORMAT)
        self._members = []

    def _close_shard(self) -> None:
        """Finish the current tar, and write its index beside it."""
        assert self._tar is not None and self._tar.name is not None
        path = Path(os.fsdecode(self._tar.name))
        self._tar.close()
        path.with_suffix(".jsonl").write_text("".join(member.to_line() for member in self._members))
        _sync(path)
        _sync(path.with_suffix(".jsonl"))
        self._tar = None


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk into a UserError that names the folder being written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remedy = "free some space and run the command again; incomplete shards were removed"
        raise UserError("the disk is full", where=folder, remedy=remedy) from error


def _sync(path: Path) -> None:
    """Force a file's bytes or a folder's names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardFolder:
    """Random access to one folder of shards; members are numbered through all its tars.

    Opening reads the indexes and checks them against the tars' sizes and first headers; `read` checks the header of
    the member it reads. Raises UserError, with the file and a remedy, if a shard is missing, truncated or mismatched.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tars = [str(tar) for tar in _numbered_tars(folder)]
        self.keys: list[str] = []
        self._exts: list[str] = []
        columns = []
        for number, tar in enumerate(self._tars):
            keys, exts, numbers = _read_index(Path(tar))
            # Offset plus size of the last member is where the tar's end must follow.
            check_tar_end(Path(tar), int(numbers[:2, -1].sum()) if keys else 0)
            self.keys += keys
            self._exts += exts
            columns.append(np.vstack((numbers, np.full((1, len(keys)), number))))
        self._offset, self._size, lengths, self._shard = np.concatenate(columns, axis=1)
        # Parse each distinct extension once; millions of members share a few.
        forms = {ext: Member("", ext, 0, 0) for ext in set(self._exts)}
        self.parts: IntArray = np.array([forms[ext].part for ext in self._exts], dtype=np.int64)
        """Number of each member's part `[members]`, UNNUMBERED where it has none."""
        self.extensions = [forms[ext].extension for ext in self._exts]
        """Extension of each member without the part's number."""
        self.tokens: IntArray | None = lengths if lengths.size and lengths.min() >= 0 else None
        """Length in tokens of each member `[members]`; None if this is not a token cache."""
        self._reader = TarReader()
        # One read per tar finds an index that belongs to another tar, without reading all headers.
        for first in np.unique(self._shard, return_index=True)[1].tolist():
            self.read(first)
        # Without numbers, keys alone are compared: a set of strings needs less memory than one of pairs.
        numbered = bool((self.parts != UNNUMBERED).any())
        names = set(zip(self.keys, self.parts.tolist(), strict=True)) if numbered else set(self.keys)
        if len(names) < len(self.keys):
            remedy = "store one modality per folder, with one member per sample or numbered parts"
            raise UserError("a key has more than one member", where=folder, remedy=remedy)

    def __len__(self) -> int:
        return len(self.keys)

    def stored(self, i: int) -> StoredMember:
        """Member i with its tar, for a TarReader, also in another process."""
        tar, name = self._tars[self._shard[i]], f"{self.keys[i]}.{self._exts[i]}"
        return StoredMember(tar, name, int(self._offset[i]), int(self._size[i]))

    def read(self, i: int) -> bytes:
        """The data of member i. Raises UserError if the tar's header there does not match this member."""
        return self._reader.read(self.stored(i))


def _numbered_tars(folder: Path) -> list[Path]:
    """000000.tar, 000001.tar, ... Raises UserError for a missing shard, or a tar or index without its counterpart."""
    if not folder.is_dir():
        raise UserError("no such folder of shards", where=folder, remedy=rebuild_command(folder))
    tars, indexes = ({file.stem for file in folder.glob(f"*.{ext}")} for ext in ("tar", "jsonl"))
    if not tars | indexes:
        raise UserError("no shards in this folder", where=folder, remedy=rebuild_command(folder))
    try:
        count = json.loads((folder / "shards.json").read_text())["shards"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = f"create it with `megamm data index {folder}`"
        raise UserError("missing or damaged shards.json", where=folder, remedy=remedy) from error
    # The recorded count finds a missing last shard; the names found, a gap.
    expected = [f"{number:06d}" for number in range(max(count, len(tars | indexes)))]
    for stem in expected:
        if stem not in tars:
            raise UserError(f"missing shard {stem}.tar", where=folder, remedy=rebuild_command(folder))
        if stem not in indexes:
            remedy = f"rebuild the indexes with `megamm data index {folder}`"
            raise UserError(f"missing index {stem}.jsonl", where=folder, remedy=remedy)
    return [folder / f"{stem}.tar" for stem in expected]


def _read_index(tar: Path) -> tuple[list[str], list[str], IntArray]:
    """Keys and extensions, and offset, size and tokens (-1: none) as `[3, members]`, of one shard."""
    index = tar.with_suffix(".jsonl")
    try:
        # One list of all lines is five times as fast as line by line. JSON values contain no bare line breaks.
        entries = json.loads("[" + ",".join(index.read_text(encoding="utf-8").splitlines()) + "]")
        numbers = [(e["offset"], e["size"], e.get("tokens", -1)) for e in entries]
        columns = np.array(numbers, dtype=np.int64).reshape(-1, 3).T
        return [e["key"] for e in entries], [sys.intern(e["ext"]) for e in entries], columns
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        remedy = f"rebuild the index with `megamm data index {tar.parent}`"
        raise UserError(f"unreadable index: {error}", where=index, remedy=remedy) from error


def write_counts(folder: Path, shards: int) -> None:
    """Write `shards.json`: without it, a missing last shard could not be detected."""
    partial = folder / ".shards.json.partial"
    partial.write_text(json.dumps({"shards": shards}) + "\n")
    _sync(partial)
    partial.replace(folder / "shards.json")


def check_tar_end(tar: Path, data_end: int) -> None:
    """Raise UserError unless the tar covers its last member and ends with two zero blocks."""
    end = -(-data_end // BLOCK) * BLOCK
    with open(tar, "rb") as file:
        file.seek(end)
        # Writers may add more zero blocks, which are not checked.
        tail = file.read(2 * BLOCK)
    if len(tail) < 2 * BLOCK:
        raise UserError("truncated tar", where=tar, remedy=rebuild_command(tar.parent))
    if tail != bytes(2 * BLOCK):
        remedy = f"rebuild the index with `megamm data index {tar.parent}`"
        raise UserError("the tar has data after the last member in its index", where=tar, remedy=remedy)


def rebuild_command(folder: Path) -> str:
    """The command that rebuilds a folder of shards."""
    if ".tokens-" in folder.name:
        return f"delete {folder} and run `megamm data tokenize` again"
    return f"delete {folder.parent.parent} and run `megamm data build` again"


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


def index_tar(tar: Path) -> list[Member]:
    """The members of any WebDataset tar, in order. Raises UserError if it is damaged or has other members."""
    members = []
    try:
        with tarfile.open(tar, "r:") as file:
            for info in file:
                key, _, ext = info.name.partition(".")
                if not info.isreg() or not KEY.fullmatch(key) or not EXTENSION.fullmatch(ext):
                    what = f"{info.name!r} is neither `<key>.<ext>` nor `<key>.<number>.<ext>`"
                    raise UserError(what, where=tar, remedy="repack the tar with such member names")
                tokens = None
                # Only token caches contain .npy; their index has lengths, which require reading the data.
                if ext.endswith("npy"):
                    tokens = tokens_from_bytes(_read_exactly(file, info)).size
                members.append(Member(key, ext, info.offset_data, info.size, tokens))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"unreadable tar: {error}", where=tar, remedy=f"rebuild {tar.parent}") from error
    check_tar_end(tar, members[-1].offset + members[-1].size if members else 0)
    return members


def _read_exactly(file: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    """The data of a member. Raises ReadError if the tar ends inside it."""
    stream = file.extractfile(info)
    data = stream.read() if stream is not None else b""
    if len(data) != info.size:
        raise tarfile.ReadError(f"{info.name} is truncated")
    return data


def write_index(folder: Path) -> int:
    """(Re)build the index of every tar of a folder; returns the number of members."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError("no tar files", where=folder, remedy="give a folder with 000000.tar, 000001.tar, ...")
    if [tar.stem for tar in tars] != [f"{number:06d}" for number in range(len(tars))]:
        raise UserError("the tar numbers have a gap", where=folder, remedy="rename them to 000000.tar, 000001.tar, ...")
    # Read all tars before writing anything, so that a damaged one leaves the old indexes unchanged.
    indexes = {tar: index_tar(tar) for tar in tars}
    for tar, members in indexes.items():
        partial = tar.with_suffix(".jsonl.partial")
        partial.write_text("".join(member.to_line() for member in members))
        partial.replace(tar.with_suffix(".jsonl"))
    write_counts(folder, len(tars))
    return sum(len(members) for members in indexes.values())
