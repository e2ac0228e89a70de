"""The non-tensor part of a checkpoint: `TrainState`, and checks that it matches the config that resumes from it."""

import functools
import json
import subprocess
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamm import __version__
from megamm.checkpoint.manifest import STATE
from megamm.common import redact
from megamm.common.errors import UserError

if TYPE_CHECKING:  # the writer process imports this package without torch
    import torch

    from megamm.model.vocabulary import Range, Vocabulary


@dataclass(frozen=True)
class TrainState:
    """The non-tensor part of a checkpoint. layout: the process grid that wrote it.

    Without optimizer state (an import) training starts with new moments. mixture: the mixture schedule
    (data/pipeline/run_data.py); None in an import and in old checkpoints without it. tokens: seen so far, by
    modality. loss_guard: LossGuard.state. heldout_loss: weighted mean over modalities (objective.overall), None if it
    was not measured at this step. versions: of the software that wrote it, including the code. origin: what the Hugging
    Face folder that the weights came from says about its use (convert/io/origin.py); None without one.
    """

    step: int
    consumed_rows: int
    world_size: int
    layout: dict[str, Any]
    vocabulary: list[dict[str, Any]]
    config: dict[str, Any]
    versions: dict[str, str]
    has_optimizer: bool = True
    mixture: dict[str, Any] | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    loss_guard: dict[str, Any] = field(default_factory=dict)
    heldout_loss: float | None = None
    origin: dict[str, Any] | None = None

    def to_json(self) -> bytes:
        """Return the contents of state.json, without secrets."""
        whole = asdict(self) | {"config": _redacted(json.dumps(self.config))}
        return json.dumps(whole, indent=1).encode()


def read_state(folder: Path) -> TrainState:
    """Read the non-tensor part of a verified checkpoint."""
    return TrainState(**json.loads((folder / STATE).read_bytes()))


def check_same_model(folder: Path, state: TrainState, vocabulary: "Vocabulary", model: dict[str, Any]) -> None:
    """Reject a checkpoint with another vocabulary or architecture; the UserError names the first difference."""
    from megamm.config import ModelConfig
    from megamm.model.vocabulary import Vocabulary

    theirs = Vocabulary.from_json(state.vocabulary)
    if theirs != vocabulary:
        both = zip_longest(theirs.ranges, vocabulary.ranges)
        other, ours = next((a, b) for a, b in both if a != b)
        raise UserError(
            f"the checkpoint has another vocabulary: {_described(other)}, but the config has {_described(ours)}",
            where=folder,
            remedy=f"use the tokenizers it was trained with, or another `output` with init_from.checkpoint={folder}",
            on_all_ranks=True,
        )
    # Keys that did not exist when it was written have their defaults.
    written = ModelConfig.model_validate(state.config["model"]).model_dump(mode="json")
    for key, value in written.items():
        if key != "megatron" and value != model[key]:
            name, stored, given = _first_difference(f"model.{key}", value, model[key])
            raise UserError(
                f"the checkpoint has {name} = {stored}, but the config has {given}",
                where=folder,
                remedy="resume with the checkpoint's model, or choose another `output`",
                on_all_ranks=True,
            )


def _first_difference(name: str, stored: Any, given: Any) -> tuple[str, Any, Any]:
    """Return the first key of a section with another value, and both values; a plain value is itself the difference."""
    if isinstance(stored, dict) and isinstance(given, dict) and stored.keys() == given.keys():
        key = next(key for key in stored if stored[key] != given[key])
        return _first_difference(f"{name}.{key}", stored[key], given[key])
    return name, stored, given


def _described(part: "Range | None") -> str:
    return f"{part.name} of {part.size} ids of codec {part.codec_id or '-'}" if part else "shorter"


def check_same_data(folder: Path, state: TrainState, config: dict[str, Any]) -> None:
    """Reject a config that changes the order of the data after a part of it was consumed; the mixture may change.

    config: the result of `RunConfig.model_dump(mode="json")`.
    """
    # A history of the mixture says which rows were consumed, so the sources may change; without one they may not.
    fixed = [("data", "seq_length"), ("data", "long_documents"), ("train", "seed")]
    fixed += [("data", "sources")] if state.mixture is None else []
    for section, key in fixed if state.consumed_rows else []:
        # Checkpoints from before this key have its default.
        theirs, ours = ({"long_documents": "auto"} | state.config[section])[key], config[section][key]
        # With "error", no sample is longer than a row, so that all values mean the same rows.
        if theirs != ours and not (key == "long_documents" and "error" in (theirs, ours)):
            what = f"the checkpoint has {section}.{key} = {theirs}, but the config has {ours}"
            if key == "sources":
                what += ", and this old checkpoint has no history of the mixture"
            remedy = f"resume with the checkpoint's {key}, or choose another `output`"
            raise UserError(what, where=folder, remedy=remedy, on_all_ranks=True)


def read_rng(folder: Path, rank: int) -> dict[str, "torch.Tensor"]:
    """Read the random generator states of this rank (for the same layout only)."""
    from safetensors.torch import load_file

    return load_file(folder / f"rng_{rank:05d}.safetensors")


@functools.cache
def code_version() -> str:
    """Return this package's commit, marked if files differ from it; without a repository, its version."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return __version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return __version__
    return done.stdout.strip() or __version__


@functools.lru_cache(maxsize=1)
def _redacted(config: str) -> Any:
    """Return the config as JSON values without secrets (cached: it is the same at every save)."""
    return redact.values(json.loads(config))
