"""The source of a run's first weights: names, shapes and a way to read blocks.

It is a run (its newest valid checkpoint), one checkpoint, a URL of checkpoints (its newest; copied to a folder of
the run while it is read), or a Hugging Face folder: an export, or a model of a supported family.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megamm import checkpoint
from megamm.checkpoint import folder, index, reader
from megamm.checkpoint.storage.choose import choose
from megamm.checkpoint.tensor_shards import MAIN, STATE, Shape, TensorShard
from megamm.common import urls
from megamm.common.collectives import Collectives
from megamm.common.errors import UserError
from megamm.model.vocabulary import Vocabulary

MAIN_COPY = f"{STATE}{MAIN}."
"""Prefix that turns a weight's name into the name of its float32 copy."""
HF_CONFIG = "config.json"


class WeightSource(Protocol):
    """Whole tensors under their names in a checkpoint (mcore/store.py)."""

    where: Path
    vocabulary: Vocabulary
    model: Mapping[str, Any]
    """The model section of the source's config."""
    shapes: Mapping[str, Shape]

    @property
    def origin(self) -> dict[str, Any] | None:
        """TrainState.origin."""

    def read(self, blocks: Sequence[TensorShard]) -> None:
        """Set the blocks, which name tensors of `shapes`, from storage. Raises UserError if that is damaged."""


@dataclass
class CheckpointSource:
    """A verified checkpoint's folder; `shapes` includes the float32 copies."""

    where: Path
    vocabulary: Vocabulary
    model: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    origin: dict[str, Any] | None

    @classmethod
    def open(cls, step: Path) -> "CheckpointSource":
        """Open it. Raises UserError if the index is not safe to read."""
        state = checkpoint.read_state(step)
        shapes = {name: stored.shape for name, stored in index.read(step / "tensors").items()}
        return cls(step, Vocabulary.from_json(state.vocabulary), state.config["model"], shapes, state.origin)

    def read(self, blocks: Sequence[TensorShard]) -> None:
        reader.load(self.where / "tensors", blocks)


def open_unverified(location: str, seq_length: int) -> WeightSource | None:
    """Open the source without verifying it: a run's last checkpoint; None for a URL.

    Raises UserError if there is neither checkpoint nor model.
    """
    if urls.is_url(location):
        return None
    path = Path(location)
    if (path / HF_CONFIG).is_file():
        return _open_hugging_face(path, seq_length)
    folders = [path] if (path / checkpoint.STATE).is_file() else folder.all_of(path)
    if not folders:
        remedy = "give a run's output folder, a checkpoint, a URL of checkpoints, or a Hugging Face folder"
        raise UserError("no checkpoint or model found", where=path, remedy=remedy)
    try:
        return CheckpointSource.open(folders[-1])
    except (UserError, OSError, ValueError):
        return None  # damaged: verification will report it, and use an older one if there is one


def _open_hugging_face(path: Path, seq_length: int) -> WeightSource:
    # Imported here because it imports transformers.
    from megamm.convert.io.hf_source import HuggingFaceSource

    return HuggingFaceSource(path, seq_length)


@contextmanager
def opened(location: str, run: Path, seq_length: int, ranks: Collectives) -> Iterator[WeightSource]:
    """Open the source while it is read, for rows of seq_length tokens; every rank calls it.

    Raises UserError, the same on all ranks, if there is none.
    """
    if urls.is_url(location):
        copy = run / "start_from"
        found = choose(copy, location)
        if found is None:
            raise UserError(
                "no checkpoint found",
                where=location,
                remedy="give the URL that contains step_XXXXXXXX",
                on_all_ranks=True,
            )
        try:
            yield ranks.together(lambda: CheckpointSource.open(found.folder))
        finally:
            # All ranks have read it: `together` waits for all of them.
            if ranks.rank == 0:
                shutil.rmtree(copy, ignore_errors=True)
        return
    path = Path(location)
    if (path / HF_CONFIG).is_file():
        yield ranks.together(lambda: _open_hugging_face(path, seq_length))
        return
    step = ranks.on_first(lambda: folder.find_checkpoint(path))  # it verifies digests: once, not on every rank
    yield ranks.together(lambda: CheckpointSource.open(step))
