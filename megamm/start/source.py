"""What a run starts from, as names, shapes and a way to read blocks of it.

A place is a run (its newest valid checkpoint), one checkpoint, a URL of checkpoints (its newest; copied to a folder of
the run for as long as it is read), or a Hugging Face folder: an export, or a model of one of the families.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megamm import checkpoint
from megamm.checkpoint import folder, index, reader
from megamm.checkpoint.blocks import MAIN, STATE, Block, Shape
from megamm.errors import UserError
from megamm.model.vocabulary import Vocabulary
from megamm.tiers import remote
from megamm.tiers.choose import Ranks, choose

MAIN_COPY = f"{STATE}{MAIN}."
"""Prefix of a weight's name for its float32 copy."""
HF_CONFIG = "config.json"


class Source(Protocol):
    """Whole tensors under the names of a checkpoint (mcore/store.py)."""

    where: Path
    vocabulary: Vocabulary
    model: Mapping[str, Any]
    """The model section of the config that it was made with."""
    shapes: Mapping[str, Shape]

    def read(self, blocks: Sequence[Block]) -> None:
        """Set the blocks, which name tensors of `shapes`, from what is stored. UserError if that is damaged."""


@dataclass
class CheckpointSource:
    """A verified checkpoint's folder; shapes have main copies, too."""

    where: Path
    vocabulary: Vocabulary
    model: Mapping[str, Any]
    shapes: Mapping[str, Shape]

    @classmethod
    def open(cls, step: Path) -> "CheckpointSource":
        """UserError for an index that is not safe to read."""
        state = checkpoint.read_state(step)
        shapes = {name: stored.shape for name, stored in index.read(step / "tensors").items()}
        return cls(step, Vocabulary.from_json(state.vocabulary), state.config["model"], shapes)

    def read(self, blocks: Sequence[Block]) -> None:
        reader.load(self.where / "tensors", blocks)


def glance(place: str, seq_length: int) -> Source | None:
    """The source unverified, a run's last checkpoint; None behind a URL. UserError if nothing is there."""
    if remote.is_url(place):
        return None
    path = Path(place)
    if (path / HF_CONFIG).is_file():
        return _of_hugging_face(path, seq_length)
    folders = [path] if (path / checkpoint.STATE).is_file() else folder.all_of(path)
    if not folders:
        remedy = "name a run's output folder, one checkpoint, a URL of them, or a Hugging Face folder"
        raise UserError("nothing to start from", where=path, remedy=remedy)
    try:
        return CheckpointSource.open(folders[-1])
    except (UserError, OSError, ValueError):
        return None  # damaged: named, and passed over if there is another, where it is verified


def _of_hugging_face(path: Path, seq_length: int) -> Source:
    # Imported here: it brings transformers.
    from megamm.convert.hf_source import HuggingFaceSource

    return HuggingFaceSource(path, seq_length)


@contextmanager
def opened(place: str, run: Path, seq_length: int, ranks: Ranks) -> Iterator[Source]:
    """The source for as long as it is read, for rows of seq_length tokens; every rank calls it.

    UserError, the same on all, if there is none.
    """
    if remote.is_url(place):
        copy = run / "start_from"
        found = choose(copy, place)
        if found is None:
            raise UserError(
                "no checkpoint there", where=place, remedy="name the URL that step_XXXXXXXX are in", on_all_ranks=True
            )
        try:
            yield ranks.together(lambda: CheckpointSource.open(found.folder))
        finally:
            # Nobody reads a part of it any more: what the ranks do next, they do together.
            if ranks.rank == 0:
                shutil.rmtree(copy, ignore_errors=True)
        return
    path = Path(place)
    if (path / HF_CONFIG).is_file():
        yield ranks.together(lambda: _of_hugging_face(path, seq_length))
        return
    from megamm.convert.hf import find_checkpoint

    step = ranks.on_first(lambda: find_checkpoint(path))
    yield ranks.together(lambda: CheckpointSource.open(step))
