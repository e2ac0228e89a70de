"""Raw data in tables: parquet files, and folders of `datasets.save_to_disk` (`--from hf-datasets`).

In: a file or a folder. Out: a sample for each row; its media are appended to a spool file, of which a part is a byte
range. Of a saved data set, only the files that its state.json names are read, and the splits of its dataset_dict.json:
others beside them, such as cache-*.arrow, are stale. A list of media in a cell makes an interleaved page.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megamm.common.errors import UserError
from megamm.data.raw.extensions import ALIASES, is_system_file, modality_of
from megamm.data.raw.samples import (
    Broken,
    ByteRange,
    Entry,
    Missing,
    NoData,
    RawPart,
    RawSample,
    UnusableSample,
    fit_key,
    sample_of,
)
from megamm.modalities import REGISTRY

_BATCH_ROWS = 64
"""Rows in memory at a time: with media, a row can have megabytes."""
_SIGNATURES = (
    (b"\x89PNG", "png"),
    (b"\xff\xd8\xff", "jpg"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"fLaC", "flac"),
    (b"OggS", "ogg"),
    (b"ID3", "mp3"),
    (b"\x1aE\xdf\xa3", "webm"),
    (b"glTF", "glb"),
    (b"PK\x03\x04", "npz"),
)
"""First bytes of the formats, for media without a file name."""
_BRANDS = {b"avif": "avif", b"avis": "avif", b"heic": "heic", b"heix": "heic", b"mif1": "heic", b"msf1": "heic"}
_BRANDS |= {b"M4A ": "m4a", b"M4B ": "m4a"}
"""Brands of MP4's family other than video (ISO/IEC 14496-12, the ftyp box)."""
_FAMILIES = (frozenset(("mp4", "mov", "m4a")), frozenset(("webm", "mkv")), frozenset(("ogg", "opus")))
"""Formats with the same first bytes."""
_ARROW_FILE = b"ARROW1"
_UNKNOWN = "unknown"
"""Extension of a medium of an unknown format."""
UNREADABLE = "\0unreadable"
"""Key of the reason in a row that cannot be read."""
_LISTS = {f"{modality}s": modality for modality in ("image", "audio", "video", "text")}
"""Columns whose cells are lists."""
_PLACEHOLDER = "<{}>"
"""Marks a medium's position in a text."""


def read_arrow(raw: Path, spool: Path, may_miss: frozenset[str] = frozenset()) -> Iterator[Entry]:
    """The rows of all tables, sorted by file name."""
    files, others = _table_files(raw) if raw.is_dir() else ([raw], [])
    if not files or not raw.exists():
        remedy = "give parquet files, a folder of them, or a folder saved by datasets.save_to_disk"
        raise UserError("no .parquet or .arrow files", where=raw, remedy=remedy)
    yield from others
    with (spool / "media").open("wb") as media:
        for file in files:
            name = file.relative_to(raw).with_suffix("").as_posix() if raw.is_dir() else file.stem
            number = 0
            try:
                for row in table_rows(file):
                    number += 1
                    yield _row_sample(row, f"{name}-{number:08d}", media, may_miss)
            except UnreadableTable as error:
                yield Broken(file.name, f"unreadable from row {number + 1} on: {error}")


def _table_files(raw: Path) -> tuple[list[Path], list[NoData]]:
    """The tables of a folder that hold its data, and the others."""
    files, others = [], []
    # Folder -> the files that its state.json names; None without a state.json.
    named: dict[Path, set[str] | None] = {}
    for file in sorted(p for p in raw.rglob("*") if p.suffix in (".parquet", ".arrow")):
        relative = file.relative_to(raw)
        if file.parent not in named:
            named[file.parent] = _names_of_state(file.parent)
        names = named[file.parent]
        if is_system_file(relative):
            others.append(NoData(relative.as_posix(), "files of the operating system"))
        elif _is_other_split(file.parent, raw):
            others.append(NoData(relative.as_posix(), "tables of splits that dataset_dict.json does not name"))
        elif names is not None and file.name not in names:
            others.append(NoData(relative.as_posix(), "tables that state.json does not name"))
        elif names is None and file.name.startswith(("cache-", "tmp")) and file.suffix == ".arrow":
            others.append(NoData(relative.as_posix(), "cache files of the datasets library"))
        else:
            files.append(file)
    for folder, names in named.items():
        for name in sorted(names or ()):
            if not (folder / name).is_file():
                what = f"state.json names {name}, which is missing"
                raise UserError(what, where=folder, remedy="restore the file, or save the data set again")
    return files, others


def _names_of_state(folder: Path) -> set[str] | None:
    """The files that a saved data set has; None without a state.json."""
    path = folder / "state.json"
    if not path.is_file():
        return None
    remedy = "load it with datasets.load_from_disk and save it again"
    try:
        state = json.loads(path.read_bytes())
        names = {entry["filename"] for entry in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("not a state.json of datasets.save_to_disk", where=path, remedy=remedy) from error
    # Older versions kept a selection of rows apart, instead of saving the selected rows.
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError("the data set was saved with an indices mapping", where=path, remedy=remedy)
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError("names files of another folder", where=path, remedy=remedy)
    return names


def _is_other_split(folder: Path, raw: Path) -> bool:
    """Whether a folder is beside a dataset_dict.json that does not name it."""
    while folder != raw:
        splits = folder.parent / "dataset_dict.json"
        if splits.is_file():
            try:
                names = json.loads(splits.read_bytes())["splits"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                remedy = "load it with datasets.load_from_disk and save it again"
                raise UserError("not a dataset_dict.json of save_to_disk", where=splits, remedy=remedy) from error
            return folder.name not in names
        folder = folder.parent
    return False


class UnreadableTable(ValueError):
    """A file that is not a table, or is truncated."""


def table_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of one file, as dicts by column. Raises UnreadableTable, possibly after some rows."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise UserError("reading tables needs pyarrow", remedy="install it: pip install pyarrow") from error
    try:
        if file.suffix == ".parquet":
            with parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                    yield from _batch_rows(batch)
        else:
            with pyarrow.memory_map(str(file)) as opened:
                # Two forms of one format: save_to_disk writes streams, Feather and others write files.
                if opened.read(len(_ARROW_FILE)) == _ARROW_FILE:
                    blocks = ipc.open_file(opened)
                    batches = map(blocks.get_batch, range(blocks.num_record_batches))
                else:
                    opened.seek(0)
                    batches = iter(ipc.open_stream(opened))
                for batch in batches:
                    for start in range(0, batch.num_rows, _BATCH_ROWS):
                        yield from _batch_rows(batch.slice(start, _BATCH_ROWS))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UnreadableTable(str(error).partition("\n")[0]) from error


def _batch_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a pyarrow.RecordBatch. One that cannot be read has its reason under UNREADABLE.

    Dates and times are not read: no sample has them, and some have no form in Python (nanoseconds, the year 100,000).
    """
    import pyarrow

    for number, field in enumerate(batch.schema):
        if pyarrow.types.is_temporal(field.type):
            marks = [None if missing else "a date or time" for missing in batch.column(number).is_null().to_pylist()]
            batch = batch.set_column(number, field.name, pyarrow.array(marks, pyarrow.string()))
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        for number in range(batch.num_rows):
            try:
                yield from batch.slice(number, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                yield {UNREADABLE: str(error).partition("\n")[0]}


def _row_sample(row: dict[str, Any], default_key: str, media: BinaryIO, may_miss: frozenset[str]) -> Entry:
    """The sample of a row; its media are appended to the spool file."""
    if UNREADABLE in row:
        return Broken(default_key, f"unreadable: {row[UNREADABLE]}")
    entry = {name: value for name, value in row.items() if value is not None}
    if isinstance(entry.get("key"), int | str):
        entry["key"] = fit_key(str(entry["key"]))
    spooled = _Spooled(default_key, media)
    try:
        missing = _lost_columns(entry, may_miss)
        parts = _page(entry, spooled)
        if parts is None:
            # A path replaces the bytes, so that `sample_of` checks the row like a line of samples.jsonl.
            for modality in set(REGISTRY) & set(entry) - {"text"}:
                try:
                    entry[modality] = spooled.add(entry[modality], modality, modality)
                except UnusableSample as error:
                    if modality not in may_miss:
                        raise
                    missing.append(Missing(modality, str(error)))
                    del entry[modality]
        else:
            taken = {*_LISTS, *REGISTRY, "caption"}
            entry = {name: value for name, value in entry.items() if name not in taken} | {"parts": parts}
        sample = sample_of(entry, fit_key(default_key), may_miss)
    except UnusableSample as error:
        return Broken(default_key, str(error))
    # The build reads the spool file through its own descriptor, possibly in another process.
    media.flush()
    raw_parts = tuple(RawPart(part.modality, part.content, spooled.ranges.get(part.content)) for part in sample.parts)
    missing += sample.missing
    return RawSample(sample.key, sample.noun, raw_parts, sample.ordered, sample.ignored, tuple(missing))


class _Spooled:
    """The media of a row that are in the spool file: the byte range of each, by its name."""

    def __init__(self, key: str, media: BinaryIO) -> None:
        self._key, self._media = key, media
        self.ranges: dict[str, ByteRange] = {}

    def add(self, cell: Any, modality: str, name: str) -> str:
        """Append the medium of a cell; returns its name."""
        data, path = _cell_media(cell, modality)
        name = f"{self._key}/{name}.{_extension(data, path) or _UNKNOWN}"
        self.ranges[name] = ByteRange(Path(self._media.name), self._media.tell(), len(data))
        self._media.write(data)
        return name


def _page(entry: dict[str, Any], spooled: _Spooled) -> list[dict[str, Any]] | None:
    """The parts of a row with lists of media, in reading order; None for a row without.

    Two lists of one length with holes, `images` and `texts`, are read index by index. A text with <image> in it gets
    the pictures there, in order. Otherwise the media come first, then the text.
    """
    lists = {name: modality for name, modality in _LISTS.items() if isinstance(entry.get(name), list)}
    lists |= {name: name for name in REGISTRY if name != "text" and isinstance(entry.get(name), list)}
    cells = {name: entry[name] for name in lists if entry[name]}
    for name in set(lists) - set(cells):
        del entry[name]  # an empty list adds nothing
    if not any(lists[name] != "text" for name in cells):
        return None
    # Each cell becomes a part, {modality: text or name in the spool file}; a hole stays None.
    columns: dict[str, list[dict[str, Any] | None]] = {}
    for name, values in cells.items():
        modality = lists[name]
        columns[name] = [
            None
            if value is None
            else {modality: value if modality == "text" else spooled.add(value, modality, f"{name}-{number}")}
            for number, value in enumerate(values)
        ]
    single = [name for name in REGISTRY if name != "text" and name in entry and name not in columns]
    if single:
        raise UnusableSample(f'both lists ({", ".join(columns)}) and a single "{single[0]}": use one list per kind')
    text = entry.get("text", entry.get("caption"))
    if "texts" in columns:
        if text is not None or len({len(column) for column in columns.values()}) != 1:
            raise UnusableSample(f"the lists {', '.join(columns)} must have one length, without a text beside them")
        return [part for parts in zip(*columns.values(), strict=True) for part in parts if part is not None]
    if any(None in column for column in columns.values()):
        raise UnusableSample(f"a list ({', '.join(columns)}) has holes, which need a list of texts of its length")
    return _at_placeholders(columns, lists, text)


def _at_placeholders(
    columns: dict[str, list[dict[str, Any] | None]], lists: dict[str, str], text: Any
) -> list[dict[str, Any]]:
    """Media at their marks in the text, or all before it if it has none."""
    if text is None or not isinstance(text, str):
        text = ""
    marks = {_PLACEHOLDER.format(lists[name]): [part for part in column if part] for name, column in columns.items()}
    if not any(mark in text for mark in marks):
        media = [part for column in marks.values() for part in column]
        return media + ([{"text": text}] if text.strip() else [])
    for mark, media in marks.items():
        if text.count(mark) != len(media):
            raise UnusableSample(f"its text has {text.count(mark)} {mark} for {len(media)} media")
    parts: list[dict[str, Any]] = []
    # The pattern is a group, so that the marks are kept between the pieces of text.
    for piece in re.split(f"({'|'.join(map(re.escape, marks))})", text):
        if piece in marks:
            parts.append(marks[piece].pop(0))
        elif piece.strip():
            parts.append({"text": piece})
    return parts


def _lost_columns(entry: dict[str, Any], may_miss: frozenset[str]) -> list[Missing]:
    """The media in columns of unknown names, of modalities that the row has no part of."""
    there = {_LISTS.get(name, name) for name in entry}
    missing = []
    for name in sorted(set(entry) - set(REGISTRY) - set(_LISTS)):
        found = (modality_of(_extension(data, path)) for data, path in _media_in(entry[name]))
        modality = next((kind for kind in found if kind not in (None, "text", *there)), None)
        if modality:
            reason = f'column "{name}" holds {modality}: call the column "{modality}", or remove it'
            if modality not in may_miss:
                raise UnusableSample(reason)
            missing.append(Missing(str(modality), reason))
            del entry[name]
    return missing


def _media_in(cell: Any, depth: int = 4) -> Iterator[tuple[bytes, str]]:
    """(bytes, path or "") of the media in a cell, also in lists (of which the first is looked at) and structures."""
    if isinstance(cell, bytes):
        yield cell, ""
    elif isinstance(cell, list) and cell and depth:
        yield from _media_in(cell[0], depth - 1)
    elif isinstance(cell, dict) and depth:
        data, path = cell.get("bytes"), cell.get("path")
        if isinstance(data, bytes):
            yield data, path if isinstance(path, str) else ""
        else:
            for inner in cell.values():
                yield from _media_in(inner, depth - 1)


def _cell_media(value: Any, modality: str) -> tuple[bytes, str]:
    """(bytes, path or "") of a cell."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(value, list):
        raise UnusableSample(f"the {modality} is a list of {type(value[0]).__name__ if value else 'nothing'}")
    if not isinstance(data, bytes):
        where = f", it is stored at {path!r}" if path else ""
        raise UnusableSample(f"the {modality} is not in the table{where}")
    return data, path if isinstance(path, str) else ""


def _extension(data: bytes, path: str) -> str:
    """The extension of the format detected from the first bytes, else the path's, or "" without one.

    Paths of tables are where media came from, often an address, and may name another format.
    """
    named = Path(path.partition("?")[0]).suffix.lower().lstrip(".")
    found = _format_of(data)
    canonical = ALIASES.get(named, named)
    is_named = canonical == found or any({canonical, found} <= family for family in _FAMILIES)
    return named if is_named or not found else found


def _format_of(data: bytes) -> str:
    """The extension of the format that the first bytes have, or ""."""
    if data[:4] == b"RIFF":
        return {b"WEBP": "webp", b"WAVE": "wav"}.get(data[8:12], "")
    # MP4 and QuickTime start with a box: four bytes of length, then its type.
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "mp4")
    return next((extension for signature, extension in _SIGNATURES if data.startswith(signature)), "")
