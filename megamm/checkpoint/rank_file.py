"""The file that a rank writes, in torch's distributed checkpoint format: one zip archive per shard, as torch.save's.

Everything except the elements is the same at every save: it is written once, and a save copies only elements.

An archive stores its elements uncompressed and little-endian, so they can be copied in and out at a known offset.
If the description in an archive differs by a single byte from what torch.save writes for such a tensor, the archive is
read by torch.load(weights_only=True) instead. Nothing here unpickles.
"""

import functools
import io
import mmap
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from megamm.checkpoint.index import StoredShard
from megamm.checkpoint.tensor_shards import Shape, TensorShard

ALIGNMENT = 64
"""Bytes to which archives are aligned in the file, as torch.save aligns elements in them."""
_LOCAL_HEADER = 30
"""Bytes before the name in a zip record; the last four are the lengths of the name and of the extra field."""


@dataclass(frozen=True)
class Frame:
    """Bytes of an archive before and after the elements; description: the record with dtype, size and strides."""

    head: bytes
    tail: bytes
    description: bytes


class _Sparse:
    """A file for torch.save that skips the elements: it keeps what is written, and where."""

    def __init__(self) -> None:
        self.position, self.written = 0, list[tuple[int, bytes]]()

    def write(self, data: bytes) -> int:
        self.written.append((self.position, bytes(data)))
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence in (0, 1), "torch.save does not know the end"
        self.position = offset + (self.position if whence else 0)
        return self.position

    def tell(self) -> int:
        return self.position

    def flush(self) -> None: ...


class _Window(io.RawIOBase):
    """A read-only file over bytes in memory, which are not copied."""

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self.view, self.position = view, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, len(self.view))[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        part = self.view[self.position : self.position + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)


@functools.cache
def frame(dtype: torch.dtype, size: Shape) -> Frame:
    """Return the frame of a contiguous CPU tensor, created by torch.save of a tensor without elements."""
    # Neither the elements nor the file exist: torch.save writes around a gap of the right length.
    with FakeTensorMode():
        tensor = torch.empty(size, dtype=dtype)
    sparse = _Sparse()
    with skip_data(materialize_fake_tensors=True):
        torch.save(tensor, sparse)  # type: ignore[arg-type]
    space = mmap.mmap(-1, sparse.position)  # pages that are never written take no memory
    for position, data in sparse.written:
        space[position : position + len(data)] = data
    start, length, description = _parse(memoryview(space))
    assert length == dtype.itemsize * torch.Size(size).numel()
    return Frame(space[:start], space[start + length :], description)


def _parse(archive: memoryview) -> tuple[int, int, bytes]:
    """Return the elements' first byte and number of bytes, and the description; zipfile.BadZipFile or KeyError."""
    window = _Window(archive)
    with zipfile.ZipFile(window) as read:
        names = {name.partition("/")[2]: name for name in read.namelist()}
        elements, description = read.getinfo(names["data/0"]), read.read(names["data.pkl"])
        if elements.compress_type != zipfile.ZIP_STORED or read.read(names["byteorder"]) != b"little":
            raise KeyError("plain elements")
    # The directory at the archive's end has the offset of the local header; the elements follow that header, a name and
    # an extra field, whose lengths only the local header has (APPNOTE.TXT 4.3.7).
    window.seek(elements.header_offset)
    header = window.read(_LOCAL_HEADER) or b""
    start = elements.header_offset + _LOCAL_HEADER
    start += int.from_bytes(header[-4:-2], "little") + int.from_bytes(header[-2:], "little")
    if start + elements.file_size > len(archive):
        raise zipfile.BadZipFile("elements beyond the end")
    return start, elements.file_size, description


def elements_at(archive: memoryview, dtype: torch.dtype, size: Shape) -> int | None:
    """Return the first byte of the elements of the stored tensor, which has this dtype and size.

    Return None if the archive holds another tensor or something else; torch.load decides about those. The elements are
    not checked.
    """
    try:
        start, length, description = _parse(archive)
    except (zipfile.BadZipFile, KeyError):
        return None
    fits = description == frame(dtype, size).description and length == dtype.itemsize * torch.Size(size).numel()
    return start if fits else None


def tensor_in(archive: memoryview, dtype: torch.dtype, size: Shape) -> torch.Tensor:
    """Return the tensor stored in an archive, with this dtype and size; it shares the memory if possible.

    ValueError if the archive holds another tensor; any error of torch.load if it holds something else. Never UserError.
    """
    start = elements_at(archive, dtype, size)
    if start is not None:
        length = dtype.itemsize * torch.Size(size).numel()
        return torch.frombuffer(archive[start : start + length], dtype=dtype).view(size)
    tensor = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tensor.numel() != torch.Size(size).numel():
        raise ValueError(f"not a tensor {size} of {dtype}")
    return tensor.reshape(size)


@dataclass(frozen=True)
class ShardOffset:
    """Position of a shard's elements in the file. shard: its index in the list; start: first byte."""

    shard: int
    start: int


@dataclass(frozen=True)
class RankFile:
    """Layout of the file, `size` bytes. entries: one per shard, for the index.

    Shards that share memory (in float32 a weight is its own main copy) are stored once: `offsets` has one of them, and
    the entries of both name the same archive.
    """

    size: int
    offsets: tuple[ShardOffset, ...]
    entries: tuple[StoredShard, ...]
    fixed: tuple[tuple[int, bytes], ...]
    """(position, bytes) of everything around the elements."""

    @classmethod
    def of(cls, shards: Sequence[TensorShard], file: str) -> "RankFile":
        """Lay out the file of these shards. file: its name in the entries."""
        end, offsets, entries, fixed = 0, [], [], []
        archives: dict[tuple[object, ...], tuple[int, int]] = {}
        for number, shard in enumerate(shards):
            data = shard.data
            assert data.is_contiguous() and data.numel() == torch.Size(shard.size).numel() > 0, shard.key
            same = (data.data_ptr(), data.device, data.dtype, shard.size)
            if same not in archives:
                around = frame(data.dtype, shard.size)
                start = end + len(around.head)
                length = len(around.head) + data.nbytes + len(around.tail)
                fixed += [(end, around.head), (start + data.nbytes, around.tail)]
                offsets.append(ShardOffset(number, start))
                archives[same] = end, length
                end = -(-(end + length) // ALIGNMENT) * ALIGNMENT
            entries.append(
                StoredShard(shard.key, shard.shape, shard.offset, shard.size, data.dtype, file, *archives[same])
            )
        return cls(end, tuple(offsets), tuple(entries), tuple(fixed))

    def lay_out(self, memory: memoryview) -> None:
        """Write everything but the elements."""
        for start, data in self.fixed:
            memory[start : start + len(data)] = data
