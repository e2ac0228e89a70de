"""The formats of raw data, each with a reader: `megamm data build --from samples|folder|jsonl|...`.

In: a folder or file, and an empty folder for unpacked data. Out: its samples, and by name everything unusable. Readers
do not decode media, follow paths out of their folder or write anywhere else.
    samples      a folder with samples.jsonl (see data/raw/samples.py)
    folder       files with the same stem are a sample: cat.png + cat.txt + cat.flac; subfolders are part of the key
                 (data/raw/folders.py)
    jsonl        any file of such lines, with paths relative to it
    webdataset   a folder of WebDataset tars, or a single one, made by other tools (data/raw/webdataset.py)
    hf-datasets  a folder saved by `datasets.save_to_disk`, or parquet files (data/raw/tables.py)

A sample is whole or not there: one of which a part is recognised but cannot be read is unusable, unless parts of that
modality may be missing (`may_miss`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from megamm.common.errors import UserError
from megamm.data.raw.folders import read_folder
from megamm.data.raw.samples import Entry, read_lines, read_samples
from megamm.data.raw.tables import read_arrow
from megamm.data.raw.webdataset import read_webdataset


class Reader(Protocol):
    """Reads raw data; spool: an empty folder for unpacked media; may_miss: modalities a sample may be without."""

    def __call__(self, raw: Path, spool: Path, may_miss: frozenset[str] = frozenset()) -> Iterator[Entry]: ...


def media_root(raw: Path) -> Path:
    """The folder to which the paths of the raw data's parts are relative."""
    return raw if raw.is_dir() else raw.parent


def source_name(raw: Path) -> str:
    """The source's name for raw data: the folder's name, or the file's without its extension."""
    raw = raw.resolve()
    return raw.stem if raw.is_file() else raw.name


def _read_samples(raw: Path, spool: Path, may_miss: frozenset[str] = frozenset()) -> Iterator[Entry]:
    return read_samples(raw, may_miss)


def _read_jsonl(raw: Path, spool: Path, may_miss: frozenset[str] = frozenset()) -> Iterator[Entry]:
    if not raw.is_file():
        raise UserError("not a file of JSON lines", where=raw, remedy="give the .jsonl file itself")
    return read_lines(raw, may_miss)


READERS: dict[str, Reader] = {
    "samples": _read_samples,
    "folder": read_folder,
    "jsonl": _read_jsonl,
    "webdataset": read_webdataset,
    "hf-datasets": read_arrow,
}
