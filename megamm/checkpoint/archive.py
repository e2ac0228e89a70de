"""One tensor as `torch.save` stores it: a zip archive with the elements uncompressed and little-endian.

`frame` returns the bytes around the elements, which depend only on dtype and size; `elements_at` finds the elements in
an archive. Neither unpickles anything: if the description differs from what torch.save writes for such a tensor by a
single byte, torch.load(weights_only=True) reads the archive.
"""

import functools
import io
import mmap
import zipfile
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from megamm.checkpoint.tensor_shards import Shape

_LOCAL_HEADER = 30
"""Bytes before the name in a zip record; the last four are the lengths of the name and of the extra field."""


@dataclass(frozen=True)
class Frame:
    """Bytes before and after the elements; description: the record with dtype, size and strides."""

    head: bytes
    tail: bytes
    description: bytes


class _Sparse:
    """A file for torch.save that skips the elements: it keeps what is written, and where."""

    def __init__(self) -> None:
        self.place, self.written = 0, list[tuple[int, bytes]]()

    def write(self, data: bytes) -> int:
        self.written.append((self.place, bytes(data)))
        self.place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence in (0, 1), "torch.save does not know the end"
        self.place = offset + (self.place if whence else 0)
        return self.place

    def tell(self) -> int:
        return self.place

    def flush(self) -> None: ...


class _Window(io.RawIOBase):
    """A read-only file over bytes in memory, which are not copied."""

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self.view, self.place = view, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = offset + (0, self.place, len(self.view))[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        part = self.view[self.place : self.place + len(buffer)]
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)


@functools.cache
def frame(dtype: torch.dtype, size: Shape) -> Frame:
    """Return the frame of a contiguous CPU tensor, created by torch.save of a tensor without elements."""
    with FakeTensorMode():
        tensor = torch.empty(size, dtype=dtype)
    sparse = _Sparse()
    with skip_data(materialize_fake_tensors=True):
        torch.save(tensor, sparse)  # type: ignore[arg-type]
    space = mmap.mmap(-1, sparse.place)  # pages that are never written take no memory
    for place, data in sparse.written:
        space[place : place + len(data)] = data
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
