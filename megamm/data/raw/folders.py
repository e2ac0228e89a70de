"""Raw data as a folder of files (`--from folder`): cat.png + cat.txt + cat.flac are a sample.

In: a folder. Out: a sample for each stem (a caption may also be named cat.png.txt), or for each line of a metadata
file. As in Hugging Face's imagefolder, audiofolder and videofolder, metadata.jsonl, metadata.csv or metadata.parquet
names the files below its own folder in `file_name` or `NAME_file_name`, and has their text in `text` or `caption`.
Other files with the stem of a named one belong to the same sample.
"""

import csv
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from megamm.common.errors import UserError
from megamm.data.raw.assemble import MAX_TEXT_BYTES, SampleFile, assemble
from megamm.data.raw.elsewhere import Elsewhere
from megamm.data.raw.extensions import TEXT_EXTENSIONS, is_system_file
from megamm.data.raw.samples import Broken, Entry, Missing, NoData, RawSample, UnusableSample, fit_key
from megamm.data.raw.tables import UnreadableTable, table_rows

_NO_SAMPLES = ("ATTRIBUTION.md", "README.md", "LICENSE")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_FILE_NAME = "file_name"
_TEXTS = ("text", "caption")


def read_folder(raw: Path, spool: Path, may_miss: frozenset[str] = frozenset()) -> Iterator[Entry]:
    """The samples of a folder of files: those with the same path without the extension belong together."""
    if not raw.is_dir():
        raise UserError("no such folder", where=raw, remedy="give a folder of media files")
    files: list[PurePosixPath] = []
    tables: list[PurePosixPath] = []
    for path in sorted(raw.rglob("*")):
        relative = PurePosixPath(path.relative_to(raw).as_posix())
        if is_system_file(relative):
            if path.is_file():
                yield NoData(str(relative), "files of the operating system, and hidden ones")
        elif str(relative) in _NO_SAMPLES:
            continue
        elif any(
            "\udc80" <= character <= "\udcff" for character in str(relative)
        ):  # bytes that Python could not decode
            yield Broken(str(relative), "its name is not UTF-8: rename it")
        # Links that stay within the folder are followed.
        elif path.is_symlink() and not path.resolve().is_relative_to(raw.resolve()):
            yield Broken(str(relative), "a link that leads outside the folder")
        elif path.is_file():
            (tables if relative.name in _METADATA else files).append(relative)
        elif not path.is_dir():
            yield Broken(str(relative), "not a regular file")
    # Lines of metadata come first: they say which files belong together. Names decide about the other files.
    stems = _stems(files)
    described: set[str] = set()
    for table in tables:
        yield from _described(raw, table, stems, described, may_miss)
    folders = [table.parent for table in tables]
    elsewhere = Elsewhere(raw, {stem: members for stem, members in stems.items() if stem not in described})
    for stem, members in stems.items():
        if stem in described:
            continue
        if stem in elsewhere.lists:
            yield NoData(str(members[0]), "lists of captions, which are not read")
            continue
        try:
            if reason := elsewhere.reason_without_medium(stem):
                raise UnusableSample(reason)
            sample = assemble(fit_key(stem), [_folder_file(raw, file) for file in members], may_miss)
            yield _with_text(sample, stem, folders, elsewhere, may_miss)
        except UnusableSample as error:
            yield Broken(stem, str(error))


def _stems(files: list[PurePosixPath]) -> dict[str, list[PurePosixPath]]:
    """The files of each sample, by their path without the extension."""
    media = {file for file in files if _extension(file) not in TEXT_EXTENSIONS}
    stems: dict[str, list[PurePosixPath]] = {}
    for file in files:
        stem = file.with_suffix("")
        # Some tools write the caption of cat.png to cat.png.txt.
        if _extension(file) in TEXT_EXTENSIONS and stem in media:
            stem = stem.with_suffix("")
        stems.setdefault(_nfc(stem), []).append(file)
    return stems


def _nfc(path: PurePosixPath) -> str:
    """A path in Unicode NFC: macOS writes names as NFD, and the caption of one may come from elsewhere."""
    return unicodedata.normalize("NFC", str(path))


def _with_text(
    sample: RawSample, stem: str, folders: list[PurePosixPath], elsewhere: Elsewhere, may_miss: frozenset[str]
) -> RawSample:
    """The sample; unusable if it has no text and should have one."""
    if "text" in may_miss or any(part.modality == "text" for part in sample.parts):
        return sample
    if any(PurePosixPath(stem).is_relative_to(folder) for folder in folders):
        raise UnusableSample("no line of the metadata file names it: add one, or use --allow-missing text")
    if reason := elsewhere.reason_without_text(stem):
        raise UnusableSample(reason)
    return sample


def _described(
    raw: Path,
    table: PurePosixPath,
    stems: dict[str, list[PurePosixPath]],
    described: set[str],
    may_miss: frozenset[str],
) -> Iterator[Entry]:
    """The samples of a metadata file's lines; adds the stems of their files to `described`."""
    lines: dict[str, int] = {}
    try:
        for number, row in _rows(raw / table):
            what = f"{table}:{number}"
            try:
                members = _named_files(row, table.parent, stems)
                stem = _nfc(members[0].with_suffix(""))
                described.update(_nfc(file.with_suffix("")) for file in members)
                members += [file for file in stems.get(stem, []) if file not in members]
                # The second line of a file is a sample too, for example another caption of the same picture.
                lines[stem] = lines.get(stem, 0) + 1
                key = stem if lines[stem] == 1 else f"{stem}-line-{lines[stem]}"
                yield _row_sample(raw, fit_key(key), row, members, may_miss)
            except UnusableSample as error:
                yield Broken(what, str(error))
    except (UnreadableTable, csv.Error, UnicodeDecodeError) as error:
        yield Broken(str(table), f"unreadable: {error}")


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, fields) of each line. A line that is not JSON gives its text instead of fields."""
    if path.suffix == ".parquet":
        yield from enumerate(table_rows(path), start=1)
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            for row in rows:
                # Too many or too few fields: shifted columns would give wrong captions.
                yield rows.line_num, "fields" if None in row or None in row.values() else row
    else:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except (ValueError, RecursionError):
                        yield number, "JSON"


def _named_files(row: Any, folder: PurePosixPath, stems: dict[str, list[PurePosixPath]]) -> list[PurePosixPath]:
    """The files that a line names, of which each exists. Raises UnusableSample."""
    if not isinstance(row, dict):
        raise UnusableSample("has another number of fields than the first line" if row == "fields" else "not JSON")
    names = [name for name in row if name == _FILE_NAME or name.endswith(f"_{_FILE_NAME}")]
    if not names:
        lists = [name for name in row if name.endswith(f"{_FILE_NAME}s")]
        fix = f"lists ({lists[0]}) are read from parquet and samples.jsonl only" if lists else 'add "file_name"'
        raise UnusableSample(f"names no file: {fix}")
    files = []
    for name in names:
        if not isinstance(row[name], str) or not row[name]:
            raise UnusableSample(f'its "{name}" is empty')
        # Programs of Windows write backslashes.
        paths = [folder / row[name], folder / row[name].replace("\\", "/")]
        wanted = {_nfc(path) for path in paths}
        found = [file for path in paths for file in stems.get(_nfc(path.with_suffix("")), []) if _nfc(file) in wanted]
        if not found:
            raise UnusableSample(f"{row[name]!r} is not a file below its folder")
        files.append(found[0])
    return files


def _row_sample(
    raw: Path, key: str, row: dict[str, Any], files: list[PurePosixPath], may_miss: frozenset[str]
) -> RawSample:
    """The sample of a line and its files."""
    members = [_folder_file(raw, file) for file in files]
    has_text = any(member.extension in ("txt", "caption") for member in members)
    named = [name for name in _TEXTS if name in row]
    if not named and not has_text and "text" not in may_miss:
        fields = ", ".join(name for name in row if not name.endswith(_FILE_NAME)) or "none"
        raise UnusableSample(f'no "text" or "caption" (other fields: {fields}): rename the one with the text')
    members.append(
        SampleFile("json", "", json.dumps({name: row[name] for name in (*named, "noun") if name in row}).encode())
    )
    # The line replaces a .json file beside the media: a sample has one source of its fields.
    members = [member for i, member in enumerate(members) if member.extension != "json" or i == len(members) - 1]
    sample = assemble(key, members, may_miss)
    ignored = sorted(name for name in row if name not in (*_TEXTS, "noun") and not name.endswith(_FILE_NAME))
    missing = sample.missing
    if "text" in may_miss and all(part.modality != "text" for part in sample.parts) and not missing:
        missing = (Missing("text", "no text in the metadata file"),)
    return RawSample(sample.key, sample.noun, sample.parts, ignored=(*sample.ignored, *ignored), missing=missing)


def _extension(file: PurePosixPath) -> str:
    return file.suffix.lower().lstrip(".")


def _folder_file(raw: Path, file: PurePosixPath) -> SampleFile:
    """A file of the folder; texts are read, media are named only."""
    extension = _extension(file)
    if extension not in TEXT_EXTENSIONS:
        return SampleFile(extension, str(file))
    try:
        with (raw / file).open("rb") as opened:
            return SampleFile(extension, str(file), data=opened.read(MAX_TEXT_BYTES + 1))
    except OSError as error:
        raise UnusableSample(f"its .{extension} cannot be read: {error.strerror}") from error
