"""Raw data as WebDataset tars made by other tools (`--from webdataset`).

In: a folder of uncompressed tars, or one. Out: a sample for each key; media stay in the tar and are read by offset. The
key ends at the first dot of a member's name, as in WebDataset; the members of a key may be anywhere in its tar.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from megamm.common.errors import UserError
from megamm.data.raw.assemble import MAX_TEXT_BYTES, SampleFile, assemble
from megamm.data.raw.extensions import TEXT_EXTENSIONS, is_system_file
from megamm.data.raw.samples import Broken, ByteRange, Entry, NoData, UnusableSample, fit_key

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""First bytes of gzip, bzip2, xz and zstd."""
_COMPRESSED_NAMES = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
_READ_BYTES = 2**20


def read_webdataset(raw: Path, spool: Path, may_miss: frozenset[str] = frozenset()) -> Iterator[Entry]:
    """The samples of all tars, sorted by tar name."""
    tars = sorted(raw.rglob("*.tar")) if raw.is_dir() else [raw]
    names = [tar.relative_to(raw) if raw.is_dir() else Path(tar.name) for tar in tars]
    # Media are read in place. Without a compressed shard, its samples would be lost.
    if raw.is_dir() and (compressed := _compressed(raw)):
        what = f"{len(compressed)} of its tars are compressed, for example {compressed[0].name}"
        raise UserError(what, where=raw, remedy="unpack them to .tar, for example with gunzip")
    if not tars or not raw.exists():
        raise UserError("no .tar files", where=raw, remedy="give a folder of WebDataset tars, or one")
    for tar, name in zip(tars, names, strict=True):
        if is_system_file(name):
            yield NoData(name.as_posix(), "files of the operating system, and hidden ones")
        else:
            yield from _tar_samples(tar, name.with_suffix("").as_posix(), may_miss)


def _compressed(raw: Path) -> list[Path]:
    """The files of a folder with the name of a compressed tar."""
    return sorted(path for path in raw.rglob("*") if path.name.lower().endswith(_COMPRESSED_NAMES))


def _tar_samples(tar: Path, name: str, may_miss: frozenset[str]) -> Iterator[Entry]:
    """The samples of a tar, in the order of their first members."""
    samples: dict[str, list[SampleFile]] = {}
    faulty: set[str] = set()
    for key, entry in _tar_files(tar):
        if isinstance(entry, SampleFile):
            samples.setdefault(key, []).append(entry)
        else:
            yield entry
            if isinstance(entry, Broken):
                faulty.add(key)
    for key, members in samples.items():
        if key in faulty:
            continue
        try:
            yield assemble(fit_key(f"{name}-{key}"), members, may_miss)
        except UnusableSample as error:
            yield Broken(f"{tar.name}:{key}", f"{error}{_hint(key, members)}")


def _hint(key: str, members: list[SampleFile]) -> str:
    """How the key was found, if dots in a name may be the reason for an error."""
    dotted = [member for member in members if "." in member.extension]
    if not dotted:
        return ""
    rule = f"the key ends at the first dot, so {dotted[0].name} has the key {key!r} and the ending"
    return f"; {rule} .{dotted[0].extension}: replace other dots in the names of the sample by _"


def _tar_files(tar: Path) -> Iterator[tuple[str, SampleFile | Broken | NoData]]:
    """(key, member) of every file in a tar, or the reason it is not read, in which case its sample is skipped.

    A file can hold several archives behind each other (`cat a.tar b.tar`), each with its own end.
    """
    last = ""
    start: int | None = 0
    try:
        with tar.open("rb") as plain:
            if plain.read(8).startswith(_COMPRESSED):
                yield last, Broken(tar.name, "unreadable: compressed; unpack it")
                return
            while start is not None:
                plain.seek(start)
                with tarfile.open(fileobj=plain, mode="r:") as file:
                    for key, entry in _members(file, tar):
                        last = key if isinstance(entry, SampleFile) else last
                        yield key, entry
                # tarfile treats a damaged header as the end.
                plain.seek(file.offset)
                if plain.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    what = f"truncated or damaged after its last complete member, of {last!r}"
                    if start and file.offset == start:
                        what = f"has other data than a tar at byte {start}"
                    # The last sample may have lost members.
                    yield last, Broken(tar.name, what)
                    return
                start = _after_zeros(plain)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield last, Broken(tar.name, f"unreadable from here on: {error}")


def _after_zeros(plain: BinaryIO) -> int | None:
    """The position of the first block with data from the current one on; None if there is none."""
    position = plain.tell()
    while blocks := plain.read(_READ_BYTES):
        zeros = len(blocks) - len(blocks.lstrip(b"\0"))
        if zeros < len(blocks):
            return position + zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        position += len(blocks)
    return None


def _members(file: tarfile.TarFile, tar: Path) -> Iterator[tuple[str, SampleFile | Broken | NoData]]:
    """(key, member) of every file in one archive."""
    regular: dict[str, tarfile.TarInfo] = {}
    for info in file:
        path = PurePosixPath(info.name)
        stem, _, extension = path.name.partition(".")
        # The key ends at the first dot of the file's name, so `0.png` of `cat.0.png` is its extension.
        key, what = (path.parent / stem).as_posix(), f"{tar.name}:{info.name}"
        if is_system_file(path) and ".." not in path.parts:
            if not info.isdir():
                yield key, NoData(what, "files of the operating system, and hidden ones")
            continue
        # tar stores a file that it has stored under another name as a hard link.
        stored = regular.get(info.linkname, info) if info.islnk() else info
        if fault := _fault(stored, path):
            yield key, Broken(what, fault)
        if fault or info.isdir():
            continue
        regular[info.name] = stored
        data = b""
        if extension.rpartition(".")[2].lower() in TEXT_EXTENSIONS:
            opened = file.extractfile(stored)
            data = opened.read(MAX_TEXT_BYTES + 1) if opened else b""
        # Media stay in the tar; the build reads them by offset.
        yield key, SampleFile(extension.lower(), what, data, ByteRange(tar, stored.offset_data, stored.size))


def _fault(info: tarfile.TarInfo, path: PurePosixPath) -> str | None:
    """The reason why a member is not read, if any."""
    if path.is_absolute() or ".." in path.parts:
        return "its path leads outside the folder"
    if info.issym() or info.islnk():
        return "a link"
    if not (info.isreg() or info.isdir()):
        return "a device, a pipe or an unknown type"
    return "a sparse file" if info.issparse() else None
