"""Reads tensors of safetensors files one at a time (with pread, so that file pages do not count as process memory),
and makes the header of a file to be written.

Format: 8 bytes with the length of the header, little-endian; the header, JSON: name -> dtype, shape, first and last
byte after it; the elements without gaps. Source: github.com/huggingface/safetensors, README.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megamm.checkpoint.reader import read_into
from megamm.checkpoint.tensor_shards import Shape
from megamm.common.errors import UserError
from megamm.tokenizers.io import WEIGHTS, weight_files

DTYPES = {
    code: getattr(torch, name)
    for code, name in (
        *(("F64", "float64"), ("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")),
        *(("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2")),
        *(("I64", "int64"), ("I32", "int32"), ("I16", "int16"), ("I8", "int8"), ("U8", "uint8"), ("BOOL", "bool")),
    )
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_LENGTH = 8
"""Bytes of the header's length field; the header is padded to a multiple of it."""


@dataclass(frozen=True)
class Place:
    """A tensor in a file: `start` is its first byte there."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: Shape


class Weights(Mapping[str, torch.Tensor]):
    """Tensors of a folder by name, read on demand. `places`: shapes, dtypes and offsets, known without reading."""

    def __init__(self, folder: Path) -> None:
        """Read the headers. Raises UserError if there are no weights, or files are damaged."""
        self.folder = folder
        self.files = weight_files(folder)
        if not self.files:
            raise UserError(f"no {WEIGHTS}", where=folder, remedy="give a folder with its weights as safetensors")
        self.places: dict[str, Place] = {}
        for file in self.files:
            self.places |= read_header(file)
        self.descriptors: dict[Path, int] = {}

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *_: Any) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()

    def read(self, name: str, target: torch.Tensor, row: int = 0) -> None:
        """Fill a contiguous tensor from the named one, starting at one of its rows. Raises KeyError if missing."""
        place = self.places[name]
        assert target.dtype == place.dtype
        start = place.start + row * torch.Size(place.shape[1:]).numel() * place.dtype.itemsize
        if place.file not in self.descriptors:
            self.descriptors[place.file] = os.open(place.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            read_into(self.descriptors[place.file], start, [target])
        except (OSError, EOFError) as error:
            what, remedy = f"{name} cannot be read: {error}", "download or copy the file again"
            raise UserError(what, where=place.file, remedy=remedy) from None

    def __getitem__(self, name: str) -> torch.Tensor:
        place = self.places[name]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        self.read(name, tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def described(self) -> dict[str, torch.Tensor]:
        """The tensors without their values."""
        return {n: torch.empty(p.shape, dtype=p.dtype, device="meta") for n, p in self.places.items()}


def read_header(file: Path) -> dict[str, Place]:
    """The places of a file's tensors. Raises UserError if it is damaged or has an unsupported dtype."""
    try:
        with safe_open(file, framework="pt"):  # it checks lengths and offsets
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH), "little")
            header = json.loads(opened.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        what, remedy = f"unreadable weights: {error}", "download or copy the file again"
        raise UserError(what, where=file, remedy=remedy) from None
    header.pop("__metadata__", None)
    unknown = next((name for name, found in header.items() if found["dtype"] not in DTYPES), None)
    if unknown is not None:
        what = f"{unknown} has the unsupported dtype {header[unknown]['dtype']}"
        raise UserError(what, where=file, remedy=f"convert it to one of {', '.join(DTYPES)}")
    first = _LENGTH + length
    return {
        name: Place(file, first + found["data_offsets"][0], DTYPES[found["dtype"]], tuple(found["shape"]))
        for name, found in header.items()
    }


def header(tensors: Iterable[tuple[str, torch.dtype, Shape]]) -> bytes:
    """The length field and header of a file with these tensors, in this order."""
    found: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        found[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    return len(text).to_bytes(_LENGTH, "little") + text
