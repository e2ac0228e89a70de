"""Reads WebDataset tars made by other tools in place: headers and texts now, media later by their offset.

In: a folder of .tar files (or one file). Consecutive members `<folder/key>.<extension>` belong together (see `members`
for the extensions). Out: samples with the key `<tar>-<key>`. Nothing is extracted: a member with path traversal in its
name, a link, a device or a sparse file is reported as broken.
Format: Aizman et al. 2019, "High Performance I/O For Large Scale Deep Learning".
"""

import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath

from megamm.common.errors import UserError
from megamm.data.raw.members import MAX_TEXT_BYTES, TEXT_EXTENSIONS, SampleFile, assemble
from megamm.data.raw.samples import Broken, ByteRange, RawSample, UnusableSample, fit_key


def read_webdataset(raw: Path, spool: Path) -> Iterator[RawSample | Broken]:
    """The samples of all tars, sorted by tar name."""
    tars = sorted(raw.rglob("*.tar")) if raw.is_dir() else [raw]
    if not tars or not raw.exists():
        raise UserError("no .tar files", where=raw, remedy="give a folder of WebDataset tars, or one; unpack .tar.gz")
    for tar in tars:
        name = tar.relative_to(raw).with_suffix("").as_posix() if raw.is_dir() else tar.stem
        for key, entries in groupby(_members(tar), key=lambda entry: entry[0]):
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


def _members(tar: Path) -> Iterator[tuple[str, SampleFile | Broken]]:
    """(key, member) of every file in a tar, or the reason it is not read, in which case its sample is skipped."""
    try:
        with tarfile.open(tar, "r:") as file:
            for info in file:
                path = PurePosixPath(info.name)
                stem, _, extension = path.name.partition(".")
                key, what = (path.parent / stem).as_posix(), f"{tar.name}:{info.name}"
                if fault := _fault(info, path):
                    yield key, Broken(what, fault)
                if fault or info.isdir():
                    continue
                data = b""
                if extension.rpartition(".")[2].lower() in TEXT_EXTENSIONS:
                    opened = file.extractfile(info)
                    data = opened.read(MAX_TEXT_BYTES + 1) if opened else b""
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
    if path.is_absolute() or ".." in path.parts:
        return "its path leads outside the folder"
    if info.issym() or info.islnk():
        return "a link"
    if not (info.isreg() or info.isdir()):
        return "a device, a pipe or an unknown type"
    return "a sparse file" if info.issparse() else None
