"""Indexes of earlier versions: 000000.jsonl beside 000000.tar, one line per member, and shards.json with their number.

In: {"key", "ext", "offset", "size", "tokens"} of every member. Out: the same `ShardIndex` as that of index.safetensors,
in memory: it takes seconds and some hundred megabytes for a million members. `megamm data index` converts them.
"""

import io
import json
import logging
import os
import sys
from pathlib import Path

import numpy as np

from megamm.common.errors import UserError
from megamm.common.sample import IntArray
from megamm.shards.columns import columns_of
from megamm.shards.index import INDEX, IndexBuilder, ShardIndex, checksum_of
from megamm.shards.tar_checks import rebuild_command, require_end, require_tars

logger = logging.getLogger(__name__)

_WORTH_CONVERTING = 100_000
"""Members from which on the log recommends the conversion."""


def read_jsonl_index(folder: Path) -> ShardIndex:
    """Read the indexes of an earlier version and check them as the columns are. Raises UserError if one is damaged."""
    spool, content = io.BytesIO(), io.BytesIO()
    builder = IndexBuilder(spool)
    append_jsonl(folder, builder)
    builder.write(content)
    index = ShardIndex(columns_of(content.getbuffer()))
    if len(index) >= _WORTH_CONVERTING:
        command = f"`megamm data index {folder}`"
        logger.info("%s: index of an earlier version, %d members read; %s converts it", folder, len(index), command)
    require_tars(folder, index)
    if index.has_duplicates():
        raise duplicate_key(folder)
    return index


def append_jsonl(folder: Path, builder: IndexBuilder, *, read_data: bool = False) -> None:
    """Add the members of all JSONL indexes of a folder; read_data: with checksums, for which all data is read.

    Raises UserError if a tar or an index is missing or damaged.
    """
    for tar in _numbered_tars(folder):
        keys, exts, numbers = _read(tar)
        # Offset plus size of the last member is where the tar's end must follow.
        size = require_end(tar, int(numbers[:2, -1].sum()) if keys else 0)
        try:
            builder.append(keys, exts, numbers, size, _checksums(tar, numbers) if read_data else None)
        except ValueError as error:
            raise _unreadable(tar, error) from error


def _checksums(tar: Path, numbers: IntArray) -> np.ndarray:
    """The checksum of each member's data; a wrong index is found later, by the headers."""
    with open(tar, "rb") as file:
        data = (os.pread(file.fileno(), max(size, 0), max(offset, 0)) for offset, size, _ in numbers.T.tolist())
        return np.fromiter(map(checksum_of, data), np.uint64, numbers.shape[1])


def duplicate_key(folder: Path) -> UserError:
    """The error about two members with the same key and number."""
    remedy = "store one modality per folder, with one member per sample or numbered parts"
    return UserError("a key has more than one member", where=folder, remedy=remedy)


def _numbered_tars(folder: Path) -> list[Path]:
    """000000.tar, 000001.tar, ... Raises UserError for a missing shard, or a tar or index without its counterpart."""
    if not folder.is_dir():
        raise UserError("no such folder of shards", where=folder, remedy=rebuild_command(folder))
    # Other files may be there, such as a metadata.jsonl.
    tars, indexes = ({f.stem for f in folder.glob(f"*.{ext}") if f.stem.isdigit()} for ext in ("tar", "jsonl"))
    if not tars | indexes:
        raise UserError("no shards in this folder", where=folder, remedy=rebuild_command(folder))
    if not indexes:
        remedy = f"create it with `megamm data index {folder}`"
        raise UserError(f"missing index {INDEX}", where=folder, remedy=remedy)
    try:
        count = json.loads((folder / "shards.json").read_text())["shards"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = f"create it with `megamm data index {folder}`"
        raise UserError("missing or damaged shards.json", where=folder, remedy=remedy) from error
    # The recorded count finds a missing last shard; the names found, a gap.
    expected = [f"{number:06d}" for number in range(max(count, len(tars | indexes)))]
    for stem in expected:
        if stem not in tars:
            raise UserError(f"missing shard {stem}.tar", where=folder, remedy=rebuild_command(folder))
        if stem not in indexes:
            remedy = f"rebuild the indexes with `megamm data index {folder}`"
            raise UserError(f"missing index {stem}.jsonl", where=folder, remedy=remedy)
    return [folder / f"{stem}.tar" for stem in expected]


def _read(tar: Path) -> tuple[list[str], list[str], IntArray]:
    """Keys and extensions, and offset, size and tokens (-1: none) as `[3, members]`, of one shard."""
    try:
        # One list of all lines is five times as fast as line by line. JSON values contain no bare line breaks.
        lines = tar.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
        entries = json.loads("[" + ",".join(lines) + "]")
        numbers = [(e["offset"], e["size"], e.get("tokens", -1)) for e in entries]
        columns = np.array(numbers, dtype=np.int64).reshape(-1, 3).T
        return [e["key"] for e in entries], [sys.intern(e["ext"]) for e in entries], columns
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unreadable(tar, error) from error


def _unreadable(tar: Path, error: Exception) -> UserError:
    remedy = f"rebuild the index with `megamm data index {tar.parent}`"
    return UserError(f"unreadable index: {error}", where=tar.with_suffix(".jsonl"), remedy=remedy)
