"""Tensors of safetensors files: read one at a time (pread, so that no page of a file counts as this process's memory),
and the header of a file that is to be written.

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

from megamm.checkpoint.blocks import Shape
from megamm.checkpoint.pieces import read_into
from megamm.codecs.folders import WEIGHTS, weight_files
from megamm.errors import UserError

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
"""Bytes of the length of the header; the header ends at a multiple of it."""


@dataclass(frozen=True)
class Place:
    """A tensor in a file: `start` is its first byte there."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: Shape


class Weights(Mapping[str, torch.Tensor]):
    """Tensors of a folder by name, read when asked for. `places`: what is known of them without."""

    def __init__(self, folder: Path) -> None:
        """UserError for a folder without weights, and for damaged files."""
        self.folder = folder
        self.files = weight_files(folder)
        if not self.files:
            raise UserError(f"no {WEIGHTS}", where=folder, remedy="name a folder with its weights as safetensors")
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
        """Set a contiguous tensor from the elements of another one, from a row of it on. KeyError if there is none."""
        place = self.places[name]
        assert target.dtype == place.dtype
        start = place.start + row * torch.Size(place.shape[1:]).numel() * place.dtype.itemsize
        if place.file not in self.descriptors:
            self.descriptors[place.file] = os.open(place.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            read_into(self.descriptors[place.file], start, [target])
        except (OSError, EOFError) as error:
            raise UserError(f"{name} cannot be read: {error}", where=place.file, remedy="restore the file") from None

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
    """Where a file's tensors lie. UserError if it is damaged or has elements of a kind that we have not."""
    try:
        with safe_open(file, framework="pt"):  # it checks lengths and places
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH), "little")
            header = json.loads(opened.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"unreadable weights: {error}", where=file, remedy="restore the file") from None
    header.pop("__metadata__", None)
    unknown = next((name for name, found in header.items() if found["dtype"] not in DTYPES), None)
    if unknown is not None:
        what = f"{unknown} has elements of {header[unknown]['dtype']}"
        raise UserError(what, where=file, remedy=f"convert it to one of {', '.join(DTYPES)}")
    first = _LENGTH + length
    return {
        name: Place(file, first + found["data_offsets"][0], DTYPES[found["dtype"]], tuple(found["shape"]))
        for name, found in header.items()
    }


def header(tensors: Iterable[tuple[str, torch.dtype, Shape]]) -> bytes:
    """The begin of a file with these tensors, in this order."""
    found: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        found[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    return len(text).to_bytes(_LENGTH, "little") + text
