"""`megamm data index`: makes the index of a folder from its JSONL indexes of earlier versions, or from its tars.

In: 000000.tar, 000001.tar, ... Out: index.safetensors (shards/index.py) beside them, complete or absent; then the JSONL
indexes and shards.json are removed. A second run gives the same bytes.
"""

import logging
import tarfile
import tempfile
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from megamm.common.errors import UserError
from megamm.common.files import new_file, sync
from megamm.shards.folder import EXTENSION, KEY, tokens_from_bytes
from megamm.shards.index import INDEX, IndexBuilder, Member, checksum_of, map_index
from megamm.shards.jsonl_index import append_jsonl, duplicate_key
from megamm.shards.tar_checks import member_of, require_end, require_tar
from megamm.shards.tar_reader import TarReader

logger = logging.getLogger(__name__)


class Indexed(NamedTuple):
    """The result of `write_index`: the number of members, and what the index was made of."""

    members: int
    source: str


def write_index(folder: Path) -> Indexed:
    """Make the index of a folder.

    JSONL indexes are converted if no newer index exists and every member's header in the tars agrees with them;
    otherwise the tars are read. Raises UserError, and leaves the old index unchanged, if a tar is damaged.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError("no tar files", where=folder, remedy="give a folder with 000000.tar, 000001.tar, ...")
    if [tar.stem for tar in tars] != [f"{number:06d}" for number in range(len(tars))]:
        raise UserError("the tar numbers have a gap", where=folder, remedy="rename them to 000000.tar, 000001.tar, ...")
    source = "the tars"
    jsonl = [tar.with_suffix(".jsonl") for tar in tars]
    is_converted = not (folder / INDEX).exists() and any(file.exists() for file in jsonl)
    if is_converted:
        try:
            members = _write(folder, [])
            source = "the JSONL indexes"
        except UserError as error:
            logger.warning("%s: the JSONL indexes cannot be used (%s); reading the tars instead", folder, error.what)
            members = _write(folder, tars)
    else:
        members = _write(folder, tars)
    for old in (*jsonl, folder / "shards.json"):
        old.unlink(missing_ok=True)
    return Indexed(members, source)


def _write(folder: Path, tars: list[Path]) -> int:
    """Write and verify the index of these tars, or of the JSONL indexes; return the number of members."""
    with tempfile.TemporaryFile(dir=folder) as spool:
        builder = IndexBuilder(cast(BinaryIO, spool))
        if tars:
            for tar in tars:
                builder.append_members(index_tar(tar), tar.stat().st_size)
        else:
            append_jsonl(folder, builder, read_data=True)
        # Verified under a temporary name: what is wrong leaves the old index as it is.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".index.") as temporary:
            with new_file(Path(temporary) / INDEX) as file:
                builder.write(file)
            _verify(folder, Path(temporary))
            (Path(temporary) / INDEX).replace(folder / INDEX)
            sync(folder)
    return len(map_index(folder))


def _verify(folder: Path, written: Path) -> None:
    """Raise UserError unless every member is in the tar where the index says, and no name occurs twice."""
    index, reader = map_index(written), TarReader()
    for shard in range(index.shards):
        require_tar(folder, index, shard, reader)
        for i in range(int(index.first[shard]), int(index.first[shard + 1])):
            reader.verify(member_of(folder, index, i))
        index.release()
    if index.has_duplicates():
        raise duplicate_key(folder)


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
                data = _read_exactly(file, info)
                # Only token caches contain .npy; their index has lengths.
                tokens = tokens_from_bytes(data).size if ext.endswith("npy") else None
                members.append(Member(key, ext, info.offset_data, info.size, tokens, checksum_of(data)))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"unreadable tar: {error}", where=tar, remedy=f"rebuild {tar.parent}") from error
    require_end(tar, members[-1].offset + members[-1].size if members else 0)
    return members


def _read_exactly(file: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    """The data of a member. Raises ReadError if the tar ends inside it."""
    stream = file.extractfile(info)
    data = stream.read() if stream is not None else b""
    if len(data) != info.size:
        raise tarfile.ReadError(f"{info.name} is truncated")
    return data
