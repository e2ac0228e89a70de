"""The formats of raw data, each with a reader: `megamm data build --from samples|folder|jsonl|...`.

In: a folder or file, and an empty folder for unpacked data. Out: its samples, and by name everything unusable. Readers
do not decode media, follow paths out of their folder or write anywhere else.
    samples      a folder with samples.jsonl (see data/raw/samples.py)
    folder       files with the same stem are a sample: cat.png + cat.txt + cat.flac; subfolders are part of the key
    jsonl        any file of such lines, with paths relative to it
    webdataset   a folder of WebDataset tars, or a single one, made by other tools (`read_webdataset`)
    hf-datasets  a folder saved by `datasets.save_to_disk`, or parquet files (`read_arrow`)

Files that belong together are combined by `assemble`. The extension decides the modality. The text is the .txt file,
else "caption" or "text" of a .json file (which may also give "noun"), else the .cls file. Numbered extensions (0.txt,
1.png) make an interleaved sample. Unknown extensions are ignored and reported.
"""

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from megamm.common.errors import UserError
from megamm.data.raw.samples import (
    Broken,
    ByteRange,
    RawPart,
    RawSample,
    UnusableSample,
    fit_key,
    read_lines,
    read_samples,
    sample_of,
)
from megamm.modalities import REGISTRY

TEXT_EXTENSIONS = ("txt", "json", "cls")
MAX_TEXT_BYTES = 16 * 2**20
ALIASES = {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "mpo": "jpg", "dib": "bmp", "tif": "tiff", "heif": "heic"}
ALIASES |= {"hif": "heic", "apng": "png", "wave": "wav", "oga": "ogg", "m4v": "mp4"}
"""Other extensions of the same formats."""
_CAPTIONS = ("caption", "text")
_NO_SAMPLES = ("ATTRIBUTION.md", "README.md", "LICENSE")
_BATCH_ROWS = 64
"""Rows in memory at a time: with media, a row can have megabytes."""
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
"""First bytes of the formats, for media without a file name."""


@dataclass(frozen=True)
class SampleFile:
    """One file: its extension in lower case, its path or name, and its bytes (texts) or their position (in a tar)."""

    extension: str
    name: str
    data: bytes = b""
    byte_range: ByteRange | None = None


def modality_of(extension: str) -> str | None:
    """The first modality of the registry that accepts files with this extension."""
    if extension == "svg":
        return "image"
    return next((name for name, kind in REGISTRY.items() if ALIASES.get(extension, extension) in kind.extensions), None)


def assemble(key: str, members: list[SampleFile]) -> RawSample:
    """Combine members into a sample. Raises UnusableSample if two have the same role, or none has one."""
    for member in members:
        if len(member.data) > MAX_TEXT_BYTES:
            raise UnusableSample(f"{member.name} is larger than {MAX_TEXT_BYTES >> 20} MiB")
        if sum(other.extension == member.extension for other in members) > 1:
            raise UnusableSample(f"two members .{member.extension}")
    matches = [re.fullmatch(r"([0-9]{1,6})\.(\w+)", member.extension) for member in members]
    if all(matches):
        # All names are numbers: an interleaved sample. One other name makes it an unordered one.
        numbered = [(int(m[1]), m[2], member) for m, member in zip(matches, members, strict=True) if m]
        return _interleaved(key, sorted(numbered, key=lambda part: part[0]))
    entry: dict[str, Any] = {"key": key}
    ranges: dict[str, ByteRange | None] = {}
    ignored = []
    for member in members:
        modality = modality_of(member.extension)
        if modality is None or modality == "text":
            if member.extension not in TEXT_EXTENSIONS:
                ignored.append(member.extension)
        elif modality in entry:
            raise UnusableSample(f"two {modality} members: {entry[modality]}, {member.name}")
        else:
            entry[modality], ranges[modality] = member.name, member.byte_range
    entry |= _text({member.extension: member.data for member in members if member.extension in TEXT_EXTENSIONS})
    # Checked like a line of samples.jsonl, so all formats have the same rules and messages.
    sample = sample_of(entry, key)
    parts = tuple(RawPart(part.modality, part.content, ranges.get(part.modality)) for part in sample.parts)
    return RawSample(sample.key, sample.noun, parts, ignored=tuple(sorted(ignored)))


def _interleaved(key: str, members: list[tuple[int, str, SampleFile]]) -> RawSample:
    """An interleaved sample from (number, extension, member), in order of the numbers."""
    if [number for number, _, _ in members] != list(range(len(members))):
        raise UnusableSample("its parts are not numbered 0, 1, 2, ...")
    entries, ranges = [], []
    for _, extension, member in members:
        modality = modality_of(extension)
        if modality is None:
            raise UnusableSample(f"extension {extension!r} belongs to no modality")
        entries.append({modality: decode(member) if modality == "text" else member.name})
        ranges.append(member.byte_range)
    sample = sample_of({"key": key, "parts": entries}, key)
    parts = (
        part if part.modality == "text" else RawPart(part.modality, part.content, byte_range)
        for part, byte_range in zip(sample.parts, ranges, strict=True)
    )
    return RawSample(sample.key, sample.noun, tuple(parts), ordered=True)


def _text(found: dict[str, bytes]) -> dict[str, Any]:
    """The text and the noun, as fields of a sample's line."""
    fields: dict[str, Any] = {}
    if "json" in found:
        try:
            entry = json.loads(found["json"])
        except (ValueError, RecursionError) as error:
            raise UnusableSample(f"its .json is not valid JSON: {error}") from error
        if isinstance(entry, dict):
            # Other fields of a .json file are metadata of the tool that made the data set.
            fields = {name: entry[name] for name in ("noun",) if name in entry}
            caption = next((entry[name] for name in _CAPTIONS if entry.get(name)), None)
            fields |= {"text": caption} if caption is not None else {}
    # The .txt file replaces a caption of the .json file; a class name is used only without any other text.
    for extension in ("txt", "cls"):
        if extension in found and (extension == "txt" or "text" not in fields):
            fields["text"] = decode(SampleFile(extension, f".{extension}", found[extension]))
    return fields


def decode(member: SampleFile) -> str:
    """The text of a member. Raises UnusableSample if it is not UTF-8."""
    try:
        return member.data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableSample(f"{member.name} is not UTF-8: {error.reason} at byte {error.start}") from error


def media_root(raw: Path) -> Path:
    """The folder to which the paths of the raw data's parts are relative."""
    return raw if raw.is_dir() else raw.parent


def source_name(raw: Path) -> str:
    """The source's name for raw data: the folder's name, or the file's without its extension."""
    raw = raw.resolve()
    return raw.stem if raw.is_file() else raw.name


def _read_samples(raw: Path, spool: Path) -> Iterator[RawSample | Broken]:
    return read_samples(raw)


def _read_jsonl(raw: Path, spool: Path) -> Iterator[RawSample | Broken]:
    if not raw.is_file():
        raise UserError("not a file of JSON lines", where=raw, remedy="give the .jsonl file itself")
    return read_lines(raw)


def _read_folder(raw: Path, spool: Path) -> Iterator[RawSample | Broken]:
    """The samples of a folder of files: those with the same path without the extension belong together."""
    if not raw.is_dir():
        raise UserError("no such folder", where=raw, remedy="give a folder of media files")
    stems: dict[str, list[Path]] = {}
    for path in sorted(raw.rglob("*")):
        relative = path.relative_to(raw)
        # Hidden files, such as .git or .DS_Store, are not data.
        if any(name.startswith(".") for name in relative.parts) or relative.as_posix() in _NO_SAMPLES:
            continue
        # Links that stay within the folder are followed.
        if path.is_symlink() and not path.resolve().is_relative_to(raw.resolve()):
            yield Broken(relative.as_posix(), "a link that leads outside the folder")
        elif path.is_file():
            stems.setdefault(relative.with_suffix("").as_posix(), []).append(relative)
        elif not path.is_dir():
            yield Broken(relative.as_posix(), "not a regular file")
    for stem, files in stems.items():
        try:
            yield assemble(fit_key(stem), [_folder_file(raw, file) for file in files])
        except UnusableSample as error:
            yield Broken(stem, str(error))


def _folder_file(raw: Path, file: Path) -> SampleFile:
    """A file of the folder; texts are read, media are named only."""
    extension = file.suffix.lower().lstrip(".")
    if extension not in TEXT_EXTENSIONS:
        return SampleFile(extension, file.as_posix())
    try:
        with (raw / file).open("rb") as opened:
            return SampleFile(extension, file.as_posix(), data=opened.read(MAX_TEXT_BYTES + 1))
    except OSError as error:
        raise UnusableSample(f"{file.name}: {error.strerror}") from error


def read_webdataset(raw: Path, spool: Path) -> Iterator[RawSample | Broken]:
    """The samples of all tars, sorted by tar name."""
    tars = sorted(raw.rglob("*.tar")) if raw.is_dir() else [raw]
    if not tars or not raw.exists():
        raise UserError("no .tar files", where=raw, remedy="give a folder of WebDataset tars, or one; unpack .tar.gz")
    for tar in tars:
        name = tar.relative_to(raw).with_suffix("").as_posix() if raw.is_dir() else tar.stem
        # Only consecutive members are grouped, as WebDataset does: a tar is read once, with one sample in memory.
        for key, entries in groupby(_tar_files(tar), key=lambda entry: entry[0]):
            found = [entry for _, entry in entries]
            faults = [entry for entry in found if isinstance(entry, Broken)]
            yield from faults
            if not faults:
                try:
                    yield assemble(
                        fit_key(f"{name}-{key}"), [entry for entry in found if isinstance(entry, SampleFile)]
                    )
                except UnusableSample as error:
                    yield Broken(f"{tar.name}:{key}", str(error))


def _tar_files(tar: Path) -> Iterator[tuple[str, SampleFile | Broken]]:
    """(key, member) of every file in a tar, or the reason it is not read, in which case its sample is skipped."""
    try:
        with tarfile.open(tar, "r:") as file:
            for info in file:
                path = PurePosixPath(info.name)
                stem, _, extension = path.name.partition(".")
                # The key ends at the first dot of the file's name, so `0.png` of `cat.0.png` is its extension.
                key, what = (path.parent / stem).as_posix(), f"{tar.name}:{info.name}"
                if fault := _fault(info, path):
                    yield key, Broken(what, fault)
                if fault or info.isdir():
                    continue
                data = b""
                if extension.rpartition(".")[2].lower() in TEXT_EXTENSIONS:
                    opened = file.extractfile(info)
                    data = opened.read(MAX_TEXT_BYTES + 1) if opened else b""
                # Media stay in the tar; the build reads them by offset.
                byte_range = ByteRange(tar, info.offset_data, info.size)
                yield key, SampleFile(extension.lower(), what, data, byte_range)
            # tarfile treats a damaged header as the end.
            with tar.open("rb") as plain:
                plain.seek(file.offset)
                if plain.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    yield "", Broken(tar.name, "truncated or damaged after its last complete member")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield tar.name, Broken(tar.name, f"unreadable from here on: {error}")


def _fault(info: tarfile.TarInfo, path: PurePosixPath) -> str | None:
    """The reason why a member is not read, if any."""
    if path.is_absolute() or ".." in path.parts:
        return "its path leads outside the folder"
    if info.issym() or info.islnk():
        return "a link"
    if not (info.isreg() or info.isdir()):
        return "a device, a pipe or an unknown type"
    return "a sparse file" if info.issparse() else None


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
                for row in _table_rows(file):
                    number += 1
                    yield _row_sample(row, f"{name}-{number:08d}", media)
            except UnreadableTable as error:
                yield Broken(file.name, f"unreadable from row {number + 1} on: {error}")


class UnreadableTable(ValueError):
    """A file that is not a table, or is truncated."""


def _table_rows(file: Path) -> Iterator[dict[str, Any]]:
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
                    yield from batch.to_pylist()
        else:
            with pyarrow.memory_map(str(file)) as opened, ipc.open_stream(opened) as stream:
                for batch in stream:
                    for start in range(0, batch.num_rows, _BATCH_ROWS):
                        yield from batch.slice(start, _BATCH_ROWS).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UnreadableTable(str(error).partition("\n")[0]) from error


def _row_sample(row: dict[str, Any], default_key: str, media: BinaryIO) -> RawSample | Broken:
    """The sample of a row; its media are appended to the spool file."""
    ranges: dict[str, ByteRange] = {}
    entry = {name: value for name, value in row.items() if value is not None}
    try:
        # A path replaces the bytes, so that `sample_of` checks the row like a line of samples.jsonl.
        for modality in set(REGISTRY) & set(entry) - {"text"}:
            data, path = _cell_media(entry[modality], modality)
            entry[modality] = f"{default_key}/{modality}.{_extension(data, path)}"
            ranges[modality] = ByteRange(Path(media.name), media.tell(), len(data))
            media.write(data)
        if isinstance(entry.get("key"), int | str):
            entry["key"] = fit_key(str(entry["key"]))
        sample = sample_of(entry, fit_key(default_key))
    except UnusableSample as error:
        return Broken(default_key, str(error))
    # The build reads the spool file through its own descriptor, possibly in another process.
    media.flush()
    parts = tuple(RawPart(part.modality, part.content, ranges.get(part.modality)) for part in sample.parts)
    return RawSample(sample.key, sample.noun, parts, sample.ordered, sample.ignored)


def _cell_media(value: Any, modality: str) -> tuple[bytes, str]:
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
    # MP4 and QuickTime start with a box: four bytes of length, then its type.
    if data[4:8] == b"ftyp":
        return "mp4"
    return next((extension for signature, extension in _SIGNATURES if data.startswith(signature)), "unknown")


READERS: dict[str, Callable[[Path, Path], Iterator[RawSample | Broken]]] = {
    "samples": _read_samples,
    "folder": _read_folder,
    "jsonl": _read_jsonl,
    "webdataset": read_webdataset,
    "hf-datasets": read_arrow,
}
