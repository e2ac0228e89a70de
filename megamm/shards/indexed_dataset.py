"""Megatron's indexed datasets: PREFIX.bin holds the token ids of all documents, PREFIX.idx their boundaries.

    IndexedTokens(PREFIX)          boundaries, memory-mapped and checked
    BinReader().read(...)          ids from PREFIX.bin, in any process
    IndexedTokensWriter(PREFIX)    writes both files, byte for byte as Megatron's IndexedDatasetBuilder

Format (megatron.core.datasets.indexed_dataset, little-endian). PREFIX.idx: `MMIDIDX\\0\\0`, version 1 (u64), code of
the dtype (u8), number of sequences S (u64), number of documents D plus one (u64); then the tokens of each sequence (i32
`[S]`), its first byte in PREFIX.bin (i64 `[S]`), the first sequence of each document and S (i64 `[D + 1]`), and, in
multimodal files only, the mode of each sequence (i8 `[S]`; 0 is text). PREFIX.bin: the ids, without a header.
"""

import errno
import mmap
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megamm.common.errors import UserError
from megamm.common.sample import IntArray

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
"""Code in the file -> dtype of the ids. Megatron also names floating-point types; only whole numbers are ids."""
_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 2**16
"""Sequences that are checked or written at a time; their arrays fit the processor's cache."""
_REMEDY = "create it again, for example with Megatron's tools/preprocess_data.py"


def bin_file(prefix: Path) -> Path:
    """The file of the token ids."""
    return prefix.with_name(f"{prefix.name}.bin")


def idx_file(prefix: Path) -> Path:
    """The file of the boundaries."""
    return prefix.with_name(f"{prefix.name}.idx")


class IndexedTokens:
    """The boundaries of an indexed dataset; documents are numbered from 0, and nothing is copied into memory.

    Opening compares every boundary with its neighbours and with the size of PREFIX.bin. Raises UserError, with the file
    and a remedy, if a file is missing, truncated or in another format, or a sequence is not text.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix, self.bin, idx = prefix, bin_file(prefix), idx_file(prefix)
        self.bytes = _size(self.bin, idx)
        """Size of PREFIX.bin."""
        code, self.sequences, bounds, has_modes = _read_header(idx, _size(idx, self.bin))
        self.dtype = np.dtype(DTYPES[code])
        """Dtype of the stored ids."""
        with open(idx, "rb") as file:
            columns = self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = _HEADER.size

        def column(dtype: str, count: int) -> np.ndarray:
            nonlocal start
            found = np.frombuffer(columns, dtype, count, start)
            start += found.nbytes
            return found

        self.sequence_lengths: npt.NDArray[np.int32] = column("<i4", self.sequences)
        self.sequence_pointers: IntArray = column("<i8", self.sequences)
        self.document_indices: IntArray = column("<i8", bounds)
        self.sequence_modes: npt.NDArray[np.int8] | None = column("<i1", self.sequences) if has_modes else None
        self._check(idx)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    def offsets(self, start: int, stop: int) -> IntArray:
        """The first byte of the documents [start, stop), and the byte after the last of them `[stop - start + 1]`."""
        first_sequences = self.document_indices[start : stop + 1]
        offsets = np.full(len(first_sequences), self.bytes, dtype=np.int64)
        # Documents at the end may be empty: they begin after the last sequence, which has no pointer.
        inside = first_sequences < self.sequences
        offsets[inside] = self.sequence_pointers[first_sequences[inside]]
        return offsets

    def lengths(self, start: int, stop: int) -> IntArray:
        """Tokens of the documents [start, stop), `[stop - start]`."""
        if self._is_one_sequence_each:
            return self.sequence_lengths[start:stop].astype(np.int64)
        # Checked at opening: the sequences of a document, and documents, follow one another without gaps.
        return np.diff(self.offsets(start, stop)) // self.dtype.itemsize

    def release(self) -> None:
        """Unmap the pages read so far: they no longer count as memory of this process, and stay in the page cache."""
        self._mapped.madvise(mmap.MADV_DONTNEED)

    def _check(self, idx: Path) -> None:
        """Raise UserError for the first boundary that is wrong."""

        def wrong(what: str) -> UserError:
            return UserError(f"damaged index: {what}", where=idx, remedy=_REMEDY)

        documents = self.document_indices
        if documents[0] != 0 or documents[-1] != self.sequences:
            raise wrong(f"its documents do not cover its {self.sequences:,} sequences")
        smallest = 1
        for first in range(0, len(self), _CHUNK):
            sequences = np.diff(documents[first : first + _CHUNK + 1])
            smallest = min(smallest, int(sequences.min()))
            if smallest < 0:
                raise wrong(f"document {first + int(sequences.argmin())} ends before it begins")
        self._is_one_sequence_each = smallest == 1 and len(self) == self.sequences
        end = 0
        for first in range(0, self.sequences, _CHUNK):
            lengths = self.sequence_lengths[first : first + _CHUNK].astype(np.int64)
            ends = end + np.cumsum(lengths * self.dtype.itemsize)
            starts = np.concatenate(([end], ends[:-1]))
            is_wrong = (lengths < 0) | (self.sequence_pointers[first : first + _CHUNK] != starts)
            if is_wrong.any():
                raise wrong(f"sequence {first + int(is_wrong.argmax())} does not begin where the one before it ends")
            if self.sequence_modes is not None and (modes := self.sequence_modes[first : first + _CHUNK]).any():
                sequence = first + int((modes != 0).argmax())
                what = f"sequence {sequence} has mode {self.sequence_modes[sequence]}, but only text (mode 0) is read"
                raise UserError(what, where=idx, remedy="give a file of text, or build media with `megamm data build`")
            end = int(ends[-1])
        if end != self.bytes:
            what = f"truncated or not of this index: {end:,} bytes expected, {self.bytes:,} found"
            raise UserError(what, where=self.bin, remedy=f"copy it and {idx.name} together again, or create both again")


def _sync_and_close(file: BufferedWriter) -> None:
    """Force the bytes of a file to disk, before it gets its name."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _size(file: Path, other: Path) -> int:
    """Size of a file in bytes. Raises UserError if it is missing."""
    if not file.is_file():
        raise UserError(f"no such file, although there is {other.name}", where=file, remedy="copy both files")
    return file.stat().st_size


def _read_header(idx: Path, size: int) -> tuple[int, int, int, bool]:
    """Code of the dtype, number of sequences, of document bounds, and whether there are modes. UserError as above."""
    with open(idx, "rb") as file:
        header = file.read(_HEADER.size)
    if not header.startswith(MAGIC):
        what = "this is not an index of Megatron-core (MMIDIDX)"
        if header.startswith(b"TNTIDX"):
            what = "this is an index in the older form of fairseq (TNTIDX)"
        elif header.startswith(b"\x80"):
            what = "this is a pickle, which is never read"
        raise UserError(what, where=idx, remedy=_REMEDY)
    if len(header) < _HEADER.size:
        raise UserError(f"truncated index of {size} bytes", where=idx, remedy=_REMEDY)
    _, version, code, sequences, bounds = _HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"index of version {version}, but only version {VERSION} is read", where=idx, remedy=_REMEDY)
    if code not in DTYPES:
        raise UserError(f"damaged index: unknown dtype {code}", where=idx, remedy=_REMEDY)
    expected = _HEADER.size + sequences * (4 + 8) + bounds * 8
    if size not in (expected, expected + sequences) or bounds < 1:
        what = f"truncated or damaged index: {expected:,} bytes expected for {sequences:,} sequences, {size:,} found"
        raise UserError(what, where=idx, remedy=_REMEDY)
    return code, sequences, bounds, sequences > 0 and size > expected


class BinReader:
    """Reads ids from .bin files, which it opens when they are first read; a copy in another process opens its own."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def read(self, file: str, dtype: str, offset: int, count: int) -> np.ndarray:
        """`count` stored values from byte `offset` on `[count]`. Raises UserError if the file no longer has them."""
        # pread reads only these bytes, and reports a file that was truncated or a broken mount as an error; access to a
        # memory map would kill the process.
        size = count * np.dtype(dtype).itemsize
        try:
            if file not in self._files:
                self._files[file] = os.open(file, os.O_RDONLY)
            data = os.pread(self._files[file], size, offset)
        except OSError as error:
            remedy = "restore it; the same command resumes the run"
            raise UserError(f"can no longer be read: {error.strerror}", where=file, remedy=remedy) from error
        if len(data) < size:
            remedy = "restore it; the same command resumes the run"
            raise UserError("the file was truncated after it was opened", where=file, remedy=remedy)
        return np.frombuffer(data, dtype)

    def __reduce__(self) -> "tuple[type[BinReader], tuple[()]]":
        return BinReader, ()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


class IndexedTokensWriter:
    """Writes PREFIX.bin and PREFIX.idx; they get their names only when they are complete.

    Use it as a context manager. dtype: one of DTYPES. Raises UserError if a file exists or the disk is full.
    """

    def __init__(self, prefix: Path, dtype: str) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.code = next(code for code, name in DTYPES.items() if np.dtype(name) == self.dtype)
        for file in (bin_file(prefix), idx_file(prefix)):
            if file.exists():
                raise UserError("the file already exists", where=file, remedy="delete it, or choose another --out")
        self._partial = prefix.with_name(f".{prefix.name}.partial")
        self._lengths, self._documents, self.tokens = array("i"), array("q", [0]), 0

    def __enter__(self) -> "IndexedTokensWriter":
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = open(bin_file(self._partial), "wb")
        return self

    def add(self, document: Sequence[IntArray]) -> None:
        """Append a document, the ids of its sequences `[T]` each; they must fit the dtype."""
        with self._disk_errors():
            for ids in document:
                assert not ids.size or np.iinfo(self.dtype).max >= ids.max() >= ids.min() >= 0, "ids must fit the dtype"
                self._bin.write(ids.astype(self.dtype).tobytes())
                self._lengths.append(ids.size)
                self.tokens += ids.size
        self._documents.append(len(self._lengths))

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return len(self._documents) - 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._disk_errors():
                if error is None:
                    _sync_and_close(self._bin)
                    with open(idx_file(self._partial), "wb") as index:
                        self._write_index(index)
                        _sync_and_close(index)
                    # The index gets its name last: a reader that sees it sees the whole data set.
                    bin_file(self._partial).rename(bin_file(self.prefix))
                    idx_file(self._partial).rename(idx_file(self.prefix))
        finally:
            with suppress(OSError):  # after an error, the disk may be full: what is buffered is lost
                self._bin.close()
            for file in (bin_file(self._partial), idx_file(self._partial)):
                file.unlink(missing_ok=True)

    def _write_index(self, index: BufferedWriter) -> None:
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.zeros(0, np.int32)
        documents = np.frombuffer(self._documents, np.int64)
        index.write(_HEADER.pack(MAGIC, VERSION, self.code, len(lengths), len(documents)))
        index.write(lengths.astype("<i4").tobytes())
        end = 0
        for first in range(0, len(lengths), _CHUNK):
            sizes = lengths[first : first + _CHUNK].astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(sizes)
            index.write((ends - sizes).astype("<i8").tobytes())
            end = int(ends[-1])
        index.write(documents.astype("<i8").tobytes())

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turn a full disk into a UserError that names the files being written."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            remedy = "free some space and run the command again; incomplete files were removed"
            raise UserError("the disk is full", where=self.prefix, remedy=remedy) from error
