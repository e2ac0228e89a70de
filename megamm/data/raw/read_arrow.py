"""Reads tables of the Hugging Face `datasets` library, with pyarrow only: parquet files, or a `save_to_disk` folder.

In: a .parquet or .arrow file, or a folder with such files at any depth. Columns "caption" or "text" are strings;
"image", "audio", "video", ... (the names of the modalities) are bytes, or the library's own features: {"bytes",
"path"}; "key" and "noun" are optional. Out: samples, whose media are copied row by row to one file in the spool
folder. Rows whose media are stored elsewhere (no bytes) are reported as broken; other columns are ignored and reported.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megamm.common.errors import UserError
from megamm.data.raw.samples import Broken, ByteRange, RawPart, RawSample, UnusableSample, fit_key, sample_of
from megamm.modalities import REGISTRY

_ROWS = 64
_SIGNATURES = (
    (b"\x89PNG", "png"),
    (b"\xff\xd8\xff", "jpg"),
    (b"fLaC", "flac"),
    (b"OggS", "ogg"),
    (b"ID3", "mp3"),
    (b"\x1aE\xdf\xa3", "webm"),
    (b"glTF", "glb"),
    (b"PK\x03\x04", "npz"),
)


def read_arrow(raw: Path, spool: Path) -> Iterator[RawSample | Broken]:
    """The rows of all tables, sorted by file name."""
    files = sorted(p for p in raw.rglob("*") if p.suffix in (".parquet", ".arrow")) if raw.is_dir() else [raw]
    if not files or not raw.exists():
        remedy = "give parquet files, a folder of them, or a folder saved by datasets.save_to_disk"
        raise UserError("no .parquet or .arrow files", where=raw, remedy=remedy)
    with (spool / "media").open("wb") as media:
        for file in files:
            name = file.relative_to(raw).with_suffix("").as_posix() if raw.is_dir() else file.stem
            number = 0
            try:
                for row in _rows(file):
                    number += 1
                    yield _sample(row, f"{name}-{number:08d}", media)
            except UnreadableTable as error:
                yield Broken(file.name, f"unreadable from row {number + 1} on: {error}")


class UnreadableTable(ValueError):
    """A file that is not a table, or is truncated."""


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise UserError("reading tables needs pyarrow", remedy="install it: pip install pyarrow") from error
    try:
        if file.suffix == ".parquet":
            with parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=_ROWS):
                    yield from batch.to_pylist()
        else:
            with pyarrow.memory_map(str(file)) as opened, ipc.open_stream(opened) as stream:
                for batch in stream:
                    for start in range(0, batch.num_rows, _ROWS):
                        yield from batch.slice(start, _ROWS).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UnreadableTable(str(error).partition("\n")[0]) from error


def _sample(row: dict[str, Any], default_key: str, media: BinaryIO) -> RawSample | Broken:
    ranges: dict[str, ByteRange] = {}
    entry = {name: value for name, value in row.items() if value is not None}
    try:
        for modality in set(REGISTRY) & set(entry) - {"text"}:
            data, path = _medium(entry[modality], modality)
            entry[modality] = f"{default_key}/{modality}.{_extension(data, path)}"
            ranges[modality] = ByteRange(Path(media.name), media.tell(), len(data))
            media.write(data)
        if isinstance(entry.get("key"), int | str):
            entry["key"] = fit_key(str(entry["key"]))
        sample = sample_of(entry, fit_key(default_key))
    except UnusableSample as error:
        return Broken(default_key, str(error))
    media.flush()
    parts = tuple(RawPart(part.modality, part.content, ranges.get(part.modality)) for part in sample.parts)
    return RawSample(sample.key, sample.noun, parts, sample.ordered, sample.ignored)


def _medium(value: Any, modality: str) -> tuple[bytes, str]:
    """(bytes, path or "") of a cell."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if not isinstance(data, bytes):
        where = f", it is stored at {path!r}" if path else ""
        raise UnusableSample(f"the {modality} is not in the table{where}")
    return data, path if isinstance(path, str) else ""


def _extension(data: bytes, path: str) -> str:
    """The path's extension, if any, else that of the format detected from the first bytes, else "unknown"."""
    if suffix := Path(path).suffix:
        return suffix.lower().lstrip(".")
    if data[:4] == b"RIFF":
        return {b"WEBP": "webp", b"WAVE": "wav"}.get(data[8:12], "unknown")
    if data[4:8] == b"ftyp":
        return "mp4"
    return next((extension for signature, extension in _SIGNATURES if data.startswith(signature)), "unknown")
