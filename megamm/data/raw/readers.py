"""The formats of raw data, each with a reader: `megamm data build --from samples|folder|jsonl|...`.

In: a folder or file, and an empty folder for unpacked data. Out: its samples, and by name everything unusable. Readers
do not decode media, follow paths out of their folder or write anywhere else.
    samples      a folder with samples.jsonl (see `samples`)
    folder       files with the same stem are a sample: cat.png + cat.txt + cat.flac; subfolders are part of the key
    jsonl        any file of such lines, with paths relative to it
    webdataset   a folder of WebDataset tars, or a single one, made by other tools (see `read_webdataset`)
    hf-datasets  a folder saved by `datasets.save_to_disk`, or parquet files (see `read_arrow`)
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from megamm.common.errors import UserError
from megamm.data.raw.members import MAX_TEXT_BYTES, TEXT_EXTENSIONS, SampleFile, assemble
from megamm.data.raw.read_arrow import read_arrow
from megamm.data.raw.read_webdataset import read_webdataset
from megamm.data.raw.samples import Broken, RawSample, UnusableSample, fit_key, read_lines, read_samples

_NO_SAMPLES = ("ATTRIBUTION.md", "README.md", "LICENSE")


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
    if not raw.is_dir():
        raise UserError("no such folder", where=raw, remedy="give a folder of media files")
    stems: dict[str, list[Path]] = {}
    for path in sorted(raw.rglob("*")):
        relative = path.relative_to(raw)
        if any(name.startswith(".") for name in relative.parts) or relative.as_posix() in _NO_SAMPLES:
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(raw.resolve()):
            yield Broken(relative.as_posix(), "a link that leads outside the folder")
        elif path.is_file():
            stems.setdefault(relative.with_suffix("").as_posix(), []).append(relative)
        elif not path.is_dir():
            yield Broken(relative.as_posix(), "not a regular file")
    for stem, files in stems.items():
        try:
            yield assemble(fit_key(stem), [_member(raw, file) for file in files])
        except UnusableSample as error:
            yield Broken(stem, str(error))


def _member(raw: Path, file: Path) -> SampleFile:
    extension = file.suffix.lower().lstrip(".")
    if extension not in TEXT_EXTENSIONS:
        return SampleFile(extension, file.as_posix())
    try:
        with (raw / file).open("rb") as opened:
            return SampleFile(extension, file.as_posix(), data=opened.read(MAX_TEXT_BYTES + 1))
    except OSError as error:
        raise UnusableSample(f"{file.name}: {error.strerror}") from error


READERS: dict[str, Callable[[Path, Path], Iterator[RawSample | Broken]]] = {
    "samples": _read_samples,
    "folder": _read_folder,
    "jsonl": _read_jsonl,
    "webdataset": read_webdataset,
    "hf-datasets": read_arrow,
}
