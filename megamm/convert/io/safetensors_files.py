"""Reads tensors of safetensors files one at a time (with pread, so that file pages do not count as process memory),
makes the header of a file to be written, and rewrites the weights of a folder.

Format: 8 bytes with the length of the header, little-endian; the header, JSON: name -> dtype, shape, first and last
byte after it; the elements without gaps. Source: github.com/huggingface/safetensors, README.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megamm.checkpoint.reader import bytes_of, read_into
from megamm.checkpoint.tensor_shards import Shape
from megamm.common.errors import UserError
from megamm.convert.io.unused import unused
from megamm.tokenizers.io import INDEX, WEIGHTS, weight_files

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
Change = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
"""Maps a tensor and its name to the tensors written instead of it."""


@dataclass(frozen=True)
class TensorInfo:
    """Description of a tensor in a file: `start` is its first byte there."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: Shape


class Weights(Mapping[str, torch.Tensor]):
    """Tensors of a folder by name, read on demand. `infos`: shapes, dtypes and offsets, known without reading."""

    def __init__(self, folder: Path, *, used_only: bool = False) -> None:
        """Read the headers. Raises UserError if there are no weights, or files are damaged.

        used_only: without the tensors that transformers does not use; `unused` has their names and kinds.
        """
        self.folder = folder
        self.files = weight_files(folder)
        if not self.files:
            raise UserError(f"no {WEIGHTS}", where=folder, remedy="give a folder with its weights as safetensors")
        self.infos: dict[str, TensorInfo] = {}
        for file in self.files:
            self.infos |= read_header(file)
        if "embed_tokens.weight" in self.infos:
            # Saved by the class without output layer (Qwen3Model). transformers' causal language models load it too.
            self.infos = {f"model.{name}": info for name, info in self.infos.items()}
        shapes = ((name, info.shape) for name, info in self.infos.items())
        self.unused = unused(folder, shapes) if used_only else {}
        for name in self.unused:
            del self.infos[name]
        self.descriptors: dict[Path, int] = {}

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *_: Any) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()

    def read(self, name: str, target: torch.Tensor, row: int = 0) -> None:
        """Fill a contiguous tensor from the named one, starting at one of its rows. Raises KeyError if missing."""
        info = self.infos[name]
        assert target.dtype == info.dtype
        start = info.start + row * torch.Size(info.shape[1:]).numel() * info.dtype.itemsize
        if info.file not in self.descriptors:
            self.descriptors[info.file] = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            read_into(self.descriptors[info.file], start, [target])
        except (OSError, EOFError) as error:
            what, remedy = f"{name} cannot be read: {error}", "download or copy the file again"
            raise UserError(what, where=info.file, remedy=remedy) from None

    def __getitem__(self, name: str) -> torch.Tensor:
        info = self.infos[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        self.read(name, tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def described(self) -> dict[str, torch.Tensor]:
        """The tensors without their values."""
        return {n: torch.empty(p.shape, dtype=p.dtype, device="meta") for n, p in self.infos.items()}


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read the descriptions of a file's tensors. Raises UserError if it is damaged or has an unsupported dtype."""
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
        name: TensorInfo(file, first + found["data_offsets"][0], DTYPES[found["dtype"]], tuple(found["shape"]))
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


def rewrite(source: Path, target: Path, change: Change) -> None:
    """Write the weights of `source`, changed tensor by tensor, into the folder `target`.

    The files, their names and their index are kept; at most one of the files is in memory. Raises UserError if weights
    are missing or damaged.
    """
    written_to: dict[str, str] = {}
    size = parameters = 0
    with Weights(source) as weights:
        for file in sorted({info.file for info in weights.infos.values()}):
            written: dict[str, torch.Tensor] = {}
            for name in (name for name, info in weights.infos.items() if info.file == file):
                written |= change(name, weights[name])
            _write(target / file.name, written)
            written_to |= dict.fromkeys(written, file.name)
            size += sum(tensor.nbytes for tensor in written.values())
            parameters += sum(tensor.numel() for tensor in written.values())
    # Several files need their index, with the totals of what was written: a change may add, drop or cast tensors.
    if set(written_to.values()) != {WEIGHTS}:
        totals = json.loads((source / INDEX).read_text()).get("metadata", {})
        totals |= {"total_size": size} | ({"total_parameters": parameters} if "total_parameters" in totals else {})
        index = {"metadata": totals, "weight_map": dict(sorted(written_to.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the tensors in the given order, that of the source, so that a joined file has the same bytes again."""
    with file.open("wb") as opened:
        opened.write(header((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()))
        for tensor in tensors.values():
            opened.write(bytes_of(tensor.contiguous()))
