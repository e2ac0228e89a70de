"""What the trainers of all codecs share: which media they read, and the folder they leave.

In: source folders `SHARDS/<source>`, each with `<train|heldout>/<modality>/` shards. Out: a codec folder.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from megamm.data.shards import ShardFolder
from megamm.errors import UserError

logger = logging.getLogger(__name__)

Split = Literal["train", "heldout"]


def open_media(sources: list[Path], split: Split, modality: str) -> list[ShardFolder]:
    """The shards of one modality in every source that has it. UserError if none has."""
    folders = []
    for source in sources:
        folder = source / split / modality
        if folder.is_dir():
            folders.append(ShardFolder(folder))
        else:
            logger.info("%s has no %s for %s", source, modality, split)
    if not any(folders):
        remedy = f"name source folders with {split}/{modality}/ in them (`megamm data build` makes them)"
        raise UserError(f"no {modality} to read", where=", ".join(map(str, sources)) or None, remedy=remedy)
    return folders


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that gets its name when the block ends well. UserError if the target exists."""
    if target.exists():
        raise UserError("the folder exists already", where=target, remedy="name another one or delete it first")
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():  # left by a killed run
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
