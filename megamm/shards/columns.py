"""Named columns of numbers in one file, which is mapped and not read: all processes of a node share its pages.

    with new_file(path) as file:                              megamm/common/files.py
        write_columns(file, [Column(...)], {"key": "text"})
    mapped = map_columns(path)
    mapped.arrays["tokens"]                                   a numpy array on the mapped file

The format is safetensors: a header in JSON with type, shape and position of every column, then their bytes. It runs no
code, and `safetensors.numpy.load_file` reads it. Only unsigned integers are stored, in little-endian order. The
metadata begins with a digest of the file, which `verify_columns` compares after a download; mapping does not read it.
"""

import json
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

_TYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("<u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_MAXIMUM_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
_DIGEST = "content"
"""Metadata: XXH3-128 of the file, with zeros in the place of this digest."""
_NO_DIGEST = "0" * 32


def narrowest(maximum: int) -> np.dtype[Any]:
    """The smallest stored type that holds every number of 0 to `maximum`."""
    return next(dtype for dtype in _TYPES.values() if maximum < 1 << 8 * dtype.itemsize)


@dataclass(frozen=True)
class Column:
    """A column to write: its rows come in chunks, so that it never has to be in memory as a whole."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunks: Iterable[np.ndarray]

    @classmethod
    def of(cls, name: str, values: np.ndarray) -> "Column":
        """The column of an array that is in memory; its numbers are >= 0."""
        narrow = values.astype(narrowest(int(values.max()) if values.size else 0))
        return cls(name, narrow.dtype, narrow.shape, [narrow])


def write_columns(file: BinaryIO, columns: Sequence[Column], metadata: dict[str, str]) -> None:
    """Write the columns to an empty file, which must be seekable: the digest is known at the end."""
    header: dict[str, Any] = {"__metadata__": {_DIGEST: _NO_DIGEST} | metadata}
    # Wider types come first, so that every column starts at a multiple of its type's size.
    ordered = sorted(columns, key=lambda column: -column.dtype.itemsize)
    start = 0
    for column in ordered:
        stop = start + column.dtype.itemsize * int(np.prod(column.shape, dtype=np.int64))
        entry = {"dtype": _NAMES[column.dtype], "shape": list(column.shape), "data_offsets": [start, stop]}
        header[column.name], start = entry, stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin_of_file, text = file.tell(), len(text).to_bytes(8, "little") + text
    digest = xxhash.xxh3_128(text)
    file.write(text)
    for column in ordered:
        written = 0
        for chunk in column.chunks:
            content = np.ascontiguousarray(chunk, dtype=column.dtype).data.cast("B") if chunk.size else b""
            digest.update(content)
            written += file.write(content)
        begin, end = header[column.name]["data_offsets"]
        assert written == end - begin, f"column {column.name} has another size than announced"
    file.seek(begin_of_file + _digest_position(text))
    file.write(digest.hexdigest().encode())
    file.seek(0, os.SEEK_END)


def _digest_position(header: bytes) -> int:
    """Where the digest is in a file that begins with this header. Raises ValueError if there is none."""
    mark = f'"{_DIGEST}":"'.encode()
    found = header.find(mark)
    if found < 0:
        raise ValueError("the file has no digest of its content")
    return found + len(mark)


def verify_columns(path: Path) -> None:
    """Raise ValueError unless the whole file has the digest that its header states."""
    with open(path, "rb") as file:
        begin = file.read(8)
        size = int.from_bytes(begin, "little")
        if size > _MAXIMUM_HEADER:
            raise ValueError("the header is damaged")
        header = begin + file.read(size)
        at = _digest_position(header)
        end = at + len(_NO_DIGEST)
        digest = xxhash.xxh3_128(header[:at] + _NO_DIGEST.encode() + header[end:])
        while content := file.read(1 << 24):
            digest.update(content)
    if digest.hexdigest().encode() != header[at:end]:
        raise ValueError("the content does not match its digest")


@dataclass(frozen=True)
class MappedColumns:
    """The columns of a file, and its metadata. The arrays cannot be written to."""

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]
    mapped: mmap.mmap | None = None

    def release(self) -> None:
        """Unmap the pages read so far: they no longer count as memory of this process, and stay in the page cache."""
        if self.mapped is not None:
            self.mapped.madvise(mmap.MADV_DONTNEED)


def map_columns(path: Path) -> MappedColumns:
    """Map a file of columns. Raises ValueError if it is not one, or truncated."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < 8:
            raise ValueError("the file is truncated")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    columns = columns_of(mapped)
    return MappedColumns(columns.arrays, columns.metadata, mapped)


def columns_of(buffer: bytes | memoryview | mmap.mmap) -> MappedColumns:
    """The columns in the bytes of such a file, without a copy. Raises ValueError as `map_columns` does."""
    size = int.from_bytes(buffer[:8], "little")
    if size > min(_MAXIMUM_HEADER, len(buffer) - 8):
        raise ValueError("the header is damaged")
    header = json.loads(bytes(buffer[8 : 8 + size]))
    arrays: dict[str, np.ndarray] = {}
    try:
        metadata = {str(name): str(value) for name, value in header.pop("__metadata__", {}).items()}
        end = 0
        for name, entry in header.items():
            dtype, shape, (start, stop) = _TYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if min(shape, default=0) < 0 or stop - start != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
                raise ValueError(f"column {name} has a wrong size")
            if start < 0 or stop > len(buffer) - 8 - size:
                raise ValueError("the file is truncated")
            arrays[name] = np.ndarray(shape, dtype, buffer, 8 + size + start)
            end = max(end, stop)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the header is damaged: {error!r}") from error
    if end != len(buffer) - 8 - size:
        raise ValueError("the file has more bytes than its columns")
    return MappedColumns(arrays, metadata)
