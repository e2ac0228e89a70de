"""Indexes WebDataset tars whose index is missing or wrong: `megamm data index FOLDER`.

In: a folder of 000000.tar, 000001.tar, ..., with one member `<key>.<ext>` per sample. Out: a `.jsonl` index beside
each (see `shards`), offsets and sizes in bytes.
"""

import tarfile
from pathlib import Path

from megamm.common.errors import UserError
from megamm.shards.folder import EXTENSION, KEY, Member, check_tar_end, write_counts
from megamm.shards.token_ids import tokens_from_bytes


def index_tar(tar: Path) -> list[Member]:
    """The members of any WebDataset tar, in order. Raises UserError if it is damaged or has other members."""
    members = []
    try:
        with tarfile.open(tar, "r:") as file:
            for info in file:
                key, _, ext = info.name.partition(".")
                if not info.isreg() or not KEY.fullmatch(key) or not EXTENSION.fullmatch(ext):
                    what = f"{info.name!r} is neither `<key>.<ext>` nor `<key>.<number>.<ext>`"
                    raise UserError(what, where=tar, remedy="repack the tar with such member names")
                tokens = None
                if ext.endswith("npy"):
                    tokens = tokens_from_bytes(_read_exactly(file, info)).size
                members.append(Member(key, ext, info.offset_data, info.size, tokens))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"unreadable tar: {error}", where=tar, remedy=f"rebuild {tar.parent}") from error
    check_tar_end(tar, members[-1].offset + members[-1].size if members else 0)
    return members


def _read_exactly(file: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    stream = file.extractfile(info)
    data = stream.read() if stream is not None else b""
    if len(data) != info.size:
        raise tarfile.ReadError(f"{info.name} is truncated")
    return data


def write_index(folder: Path) -> int:
    """(Re)build the index of every tar of a folder; returns the number of members."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError("no tar files", where=folder, remedy="give a folder with 000000.tar, 000001.tar, ...")
    if [tar.stem for tar in tars] != [f"{number:06d}" for number in range(len(tars))]:
        raise UserError("the tar numbers have a gap", where=folder, remedy="rename them to 000000.tar, 000001.tar, ...")
    indexes = {tar: index_tar(tar) for tar in tars}
    for tar, members in indexes.items():
        partial = tar.with_suffix(".jsonl.partial")
        partial.write_text("".join(member.to_line() for member in members))
        partial.replace(tar.with_suffix(".jsonl"))
    write_counts(folder, len(tars))
    return sum(len(members) for members in indexes.values())
