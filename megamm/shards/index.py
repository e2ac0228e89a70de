"""The index of a folder of shards: where each member of its tars is, in columns that are mapped and not read.

    FOLDER/index.safetensors      see shards/columns.py

    first [shards + 1]        the first member of every tar, then the number of members
    tar_bytes [shards]        size of every tar, which finds one that has changed
    offset, size [members]    start and size of a member's data in its tar, in bytes
    tokens [members]          length in tokens; only of token caches
    most_tokens [zones]       the largest of the lengths of each ZONE members; only of token caches
    part [members]            1 + the part's number, 0 without one; only if a member has a number
    checksum [members]        XXH3-64 of a member's data; absent if the index was made without reading the data
    form [members]            which of the forms of member names; only if there are several
    key [members, width]      the key, padded with zero bytes

A column has the narrowest type that holds its numbers. Opening reads the header and the columns by shard; finding a
member reads one number of each column. Keys are a column like the others: nothing loads them all.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from megamm.common.errors import UserError
from megamm.common.sample import IntArray
from megamm.shards.columns import Column, MappedColumns, map_columns, narrowest, write_columns

INDEX = "index.safetensors"
ZONE = 1 << 16
"""Members of a zone: of each, the index has the largest length."""
UNNUMBERED = -1
"""Part number of a member without a number."""
_FORMAT = {"format": "megamm shard index", "version": "1"}
_AT_ONCE = 1 << 20
"""Members whose keys are compared in one go."""


@dataclass(frozen=True)
class Member:
    """One tar member: key, extension ("png", or "3.png" for part 3 of a document), offset and size of its data (bytes).

    `tokens` is its length in tokens, if it has one; `checksum` is that of its data, if it was read.
    """

    key: str
    ext: str
    offset: int
    size: int
    tokens: int | None = None
    checksum: int | None = None


def checksum_of(data: bytes | memoryview) -> int:
    """The checksum of a member's data: XXH3-64."""
    return xxhash.xxh3_64_intdigest(data)


@lru_cache(maxsize=4096)
def parse_extension(ext: str) -> tuple[str, int]:
    """The form of "png", "3.png" or "003.png" ("png", "%01d.png", "%03d.png"), and the part's number."""
    number, _, extension = ext.rpartition(".")
    if not number:
        return extension, UNNUMBERED
    digits = len(number) if number.startswith("0") else 1
    return f"%0{digits}d.{extension}", int(number)


class ShardIndex:
    """The members of a folder, numbered through all its tars. Raises ValueError if the columns do not fit together."""

    def __init__(self, columns: MappedColumns) -> None:
        self._columns, arrays, metadata = columns, columns.arrays, columns.metadata
        if any(metadata.get(name) != value for name, value in _FORMAT.items()):
            raise ValueError(f"not a shard index of version {_FORMAT['version']}")
        try:
            self.first, self.tar_bytes = arrays["first"].astype(np.int64), arrays["tar_bytes"]
            self.offset, self.size = arrays["offset"], arrays["size"]
            key = arrays["key"]
            self.forms: list[str] = json.loads(metadata["forms"])
            """Forms of the member names after the key, see parse_extension."""
            self.digest, self.keys_digest = metadata["digest"], metadata["keys_digest"]
            """Digests of everything that an order depends on (keys, numbers, lengths), and of the keys."""
            self.total_tokens = int(metadata["total_tokens"])
        except KeyError as error:
            raise ValueError(f"{error} is missing") from error
        self.tokens, self.most_tokens = arrays.get("tokens"), arrays.get("most_tokens")
        self.part, self.form = arrays.get("part"), arrays.get("form")
        self.checksum = arrays.get("checksum")
        """1 + number of each member's part `[members]`, and its form; None if all have none, and the first form."""
        by_member = (self.offset, self.size, key, self.tokens, self.part, self.form, self.checksum)
        if {len(column) for column in by_member if column is not None} != {len(key)} or key.ndim != 2:
            raise ValueError("its columns have different lengths")
        steps = np.diff(self.first)
        if len(steps) != len(self.tar_bytes) or self.first[0] or self.first[-1] != len(key) or (steps < 0).any():
            raise ValueError("the members of its tars do not add up")
        self.key = key.view(f"S{key.shape[1]}")[:, 0]
        """The keys as bytes `[members]`."""

    def __len__(self) -> int:
        return len(self.key)

    @property
    def shards(self) -> int:
        """Number of tars."""
        return len(self.tar_bytes)

    def shard_of(self, i: int) -> int:
        """The number of the tar of member i."""
        return int(self.first.searchsorted(i, side="right")) - 1

    def key_of(self, i: int) -> str:
        """The key of member i."""
        return self.key[i].decode()

    def form_of(self, i: int) -> str:
        """The form of member i's name after the key."""
        return self.forms[0 if self.form is None else int(self.form[i])]

    def number_of(self, i: int) -> int:
        """The number of member i's part, or UNNUMBERED."""
        return UNNUMBERED if self.part is None else int(self.part[i]) - 1

    def name_of(self, i: int) -> str:
        """The name of member i in its tar."""
        form, number = self.form_of(i), self.number_of(i)
        return f"{self.key_of(i)}.{form if number == UNNUMBERED else form % number}"

    def release(self) -> None:
        """Unmap the pages read so far, see MappedColumns."""
        self._columns.release()

    def has_duplicates(self) -> bool:
        """Whether two members have the same key and number. Reads all keys; in key order it needs no memory."""
        number = np.zeros(len(self), dtype=np.uint8) if self.part is None else self.part
        for start in range(0, len(self) - 1, _AT_ONCE):
            here = slice(start, min(start + _AT_ONCE, len(self) - 1))
            after = slice(here.start + 1, here.stop + 1)
            rises = self.key[here] < self.key[after]
            rises |= (self.key[here] == self.key[after]) & (number[here] < number[after])
            if not rises.all():
                break
        else:
            return False
        order = np.lexsort((number, self.key))
        key, number = self.key[order], number[order]
        return bool(((key[1:] == key[:-1]) & (number[1:] == number[:-1])).any())


def map_index(folder: Path) -> ShardIndex:
    """Map the index of a folder. Raises UserError if it is damaged, FileNotFoundError if there is none."""
    try:
        return ShardIndex(map_columns(folder / INDEX))
    except ValueError as error:
        remedy = f"rebuild the index with `megamm data index {folder}`"
        raise UserError(f"unreadable index: {error}", where=folder / INDEX, remedy=remedy) from error


class IndexBuilder:
    """Collects the members tar by tar in a spool file, and writes the index: memory does not grow with the members."""

    def __init__(self, spool: BinaryIO) -> None:
        self._spool = spool
        self._chunks: list[dict[str, tuple[int, np.dtype[Any], int]]] = []
        """Of every tar and column: place in the spool, type, numbers."""
        self._maxima = dict.fromkeys(("offset", "size", "tokens", "part", "form"), 0)
        self._width, self._total, self._has_tokens = 1, 0, True
        self._has_checksums = True
        self._forms: dict[str, int] = {}
        self._first, self._tar_bytes = [0], list[int]()
        self._most = list[int]()
        self._digests = {name: xxhash.xxh3_128() for name in ("keys", "numbers", "tokens")}

    def append(
        self,
        keys: Sequence[str] | np.ndarray,
        exts: Sequence[str] | str,
        numbers: IntArray,
        tar_bytes: int,
        checksums: np.ndarray | None = None,
    ) -> None:
        """Add the members of the next tar; checksums: those of their data `[members]`, if it was read.

        keys: text or bytes `[members]`; exts: one for all, or one each; numbers: offset, size and tokens (-1: none)
        `[3, members]`. Raises ValueError for a key that is not ASCII.
        """
        key = np.asarray(keys, dtype=np.bytes_)
        offset, size, tokens = numbers
        form, part = self._parse(exts, len(key))
        self._has_tokens &= bool((tokens >= 0).all())
        tokens = np.maximum(tokens, 0)
        self._note_most(tokens)
        columns = {"offset": offset, "size": size, "tokens": tokens, "part": part, "form": form}
        chunk = {}
        for name, column in columns.items():
            maximum = int(column.max()) if len(column) else 0
            self._maxima[name] = max(self._maxima[name], maximum)
            chunk[name] = self._spooled(column.astype(narrowest(maximum)))
        self._has_checksums &= checksums is not None
        if checksums is not None:
            chunk["checksum"] = self._spooled(checksums.astype("<u8"))
        if len(key):
            self._width = max(self._width, key.itemsize)
        chunk["key"] = self._spooled(key)
        self._chunks.append(chunk)
        self._digests["keys"].update(_lines(key))
        self._digests["numbers"].update(part.astype("<i8").tobytes())
        self._digests["tokens"].update(tokens.astype("<i8").tobytes())
        self._total += int(tokens.sum())
        self._first.append(self._first[-1] + len(key))
        self._tar_bytes.append(tar_bytes)

    def append_members(self, members: Sequence[Member], tar_bytes: int) -> None:
        """Add the members of the next tar."""
        numbers = [(m.offset, m.size, -1 if m.tokens is None else m.tokens) for m in members]
        columns = np.array(numbers, dtype=np.int64).reshape(-1, 3).T
        checksums = [m.checksum for m in members if m.checksum is not None]
        known = np.array(checksums, dtype=np.uint64) if len(checksums) == len(members) else None
        self.append([m.key for m in members], [m.ext for m in members], columns, tar_bytes, known)

    def _parse(self, exts: Sequence[str] | str, members: int) -> tuple[IntArray, IntArray]:
        """Code of the form, and 1 + number of the part, of every member."""
        if isinstance(exts, str):
            form, number = parse_extension(exts)
            code = self._forms.setdefault(form, len(self._forms)) if members else 0
            return np.full(members, code, dtype=np.int64), np.full(members, number + 1, dtype=np.int64)
        parsed = [parse_extension(ext) for ext in exts]
        codes = [self._forms.setdefault(form, len(self._forms)) for form, _ in parsed]
        return np.array(codes, dtype=np.int64), np.array([number + 1 for _, number in parsed], dtype=np.int64)

    def _note_most(self, tokens: IntArray) -> None:
        """Update the largest length of every zone that these members are in."""
        at, count = 0, self._first[-1]
        while at < len(tokens):
            zone, inside = divmod(count + at, ZONE)
            stop = min(len(tokens), at + ZONE - inside)
            most = int(tokens[at:stop].max())
            if inside:
                self._most[zone] = max(self._most[zone], most)
            else:
                self._most.append(most)
            at = stop

    def _spooled(self, column: np.ndarray) -> tuple[int, np.dtype[Any], int]:
        begin = self._spool.tell()
        self._spool.write(column.tobytes())
        return begin, column.dtype, len(column)

    def write(self, file: BinaryIO) -> None:
        """Write the index to an empty file."""
        members = self._first[-1]
        columns = [
            Column.of("first", np.array(self._first, dtype=np.int64)),
            Column.of("tar_bytes", np.array(self._tar_bytes, dtype=np.int64)),
            *(self._column(name) for name in ("offset", "size")),
            Column("key", np.dtype("<u1"), (members, self._width), self._padded_keys()),
        ]
        has_tokens = self._has_tokens and members > 0
        if has_tokens:
            columns += [self._column("tokens"), Column.of("most_tokens", np.array(self._most, dtype=np.int64))]
        if self._maxima["part"]:
            columns.append(self._column("part"))
        if len(self._forms) > 1:
            columns.append(self._column("form"))
        if self._has_checksums:
            chunks = (np.asarray(self._read(*chunk["checksum"])) for chunk in self._chunks)
            columns.append(Column("checksum", np.dtype("<u8"), (members,), chunks))
        keys, numbers, tokens = (self._digests[name].hexdigest() for name in ("keys", "numbers", "tokens"))
        metadata = {
            "forms": json.dumps(list(self._forms)),
            "total_tokens": str(self._total if has_tokens else 0),
            "keys_digest": keys,
            "digest": xxhash.xxh3_128(f"{members} {keys} {numbers} {tokens}".encode()).hexdigest(),
        }
        write_columns(file, columns, _FORMAT | metadata)

    def _column(self, name: str) -> Column:
        chunks = (np.asarray(self._read(*chunk[name])) for chunk in self._chunks)
        return Column(name, narrowest(self._maxima[name]), (self._first[-1],), chunks)

    def _padded_keys(self) -> Iterator[np.ndarray]:
        for chunk in self._chunks:
            yield self._read(*chunk["key"]).astype(f"S{self._width}").view(np.uint8)

    def _read(self, begin: int, dtype: np.dtype[Any], count: int) -> np.ndarray:
        self._spool.seek(begin)
        return np.frombuffer(bytearray(self._spool.read(dtype.itemsize * count)), dtype)


def _lines(key: np.ndarray) -> bytes:
    """The keys as lines, whatever the width that they are padded to."""
    ends = np.full((len(key), 1), ord("\n"), dtype=np.uint8)
    padded = np.hstack((key.view(np.uint8).reshape(len(key), key.itemsize), ends))
    return padded[padded != 0].tobytes()
