"""What of a checkpoint is not a tensor: `RunState`, and whether it fits the config that wants to go on from it."""

import functools
import json
import subprocess
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamm import __version__, redact
from megamm.checkpoint.manifest import STATE
from megamm.errors import UserError

if TYPE_CHECKING:  # the writer's process imports this package, and has no torch
    import torch

    from megamm.model.vocabulary import Range, Vocabulary


@dataclass(frozen=True)
class RunState:
    """Everything of a checkpoint that is not a tensor. `layout` is the grid that wrote it.

    Without optimizer state (an import) training starts with fresh moments. mixture is the history of the data
    (data/history.py); None in an import and in checkpoints from before it was kept. tokens: seen so far, by modality.
    loss_guard is LossGuard.state. heldout_loss: weighted mean over modalities
    (objective.overall), None where it was not measured at this step. versions: of what wrote it, its code too.
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

    def to_json(self) -> bytes:
        """The contents of state.json, without secrets."""
        whole = asdict(self) | {"config": _redacted(json.dumps(self.config))}
        return json.dumps(whole, indent=1).encode()


def read_state(folder: Path) -> RunState:
    """The non-tensor part of a verified checkpoint."""
    return RunState(**json.loads((folder / STATE).read_bytes()))


def check_same_model(folder: Path, state: RunState, vocabulary: "Vocabulary", model: dict[str, Any]) -> None:
    """Refuse a checkpoint of another vocabulary or another architecture, naming the first difference."""
    from megamm.model.vocabulary import Vocabulary

    theirs = Vocabulary.from_json(state.vocabulary)
    if theirs != vocabulary:
        both = zip_longest(theirs.ranges, vocabulary.ranges)
        other, ours = next((a, b) for a, b in both if a != b)
        raise UserError(
            f"the checkpoint has another vocabulary: {_described(other)}, the config's is {_described(ours)}",
            where=folder,
            remedy=f"use the tokenizers it was trained with, or another `output` with start_from.checkpoint={folder}",
            on_all_ranks=True,
        )
    for key, value in state.config["model"].items():
        if key != "megatron" and value != model[key]:
            raise UserError(
                f"the checkpoint has model.{key} = {value}, the config {model[key]}",
                where=folder,
                remedy="resume with the checkpoint's model, or choose another `output`",
                on_all_ranks=True,
            )


def _described(part: "Range | None") -> str:
    return f"{part.name} of {part.size} ids of codec {part.codec_id or '-'}" if part else "shorter"


def check_same_data(folder: Path, state: RunState, config: dict[str, Any]) -> None:
    """Refuse another order of the data than that of which the checkpoint has consumed a part; the mixture may differ.

    config as `RunConfig.model_dump(mode="json")` gives it.
    """
    kept = [("data", "seq_length"), ("train", "seed")] + ([("data", "sources")] if state.mixture is None else [])
    for section, key in kept if state.consumed_rows else []:
        theirs, ours = state.config[section][key], config[section][key]
        if theirs != ours:
            what = f"the checkpoint has {section}.{key} = {theirs}, the config {ours}"
            if key == "sources":
                what += ", and it is from before changes of the mixture were recorded"
            remedy = f"resume with the checkpoint's {key}, or choose another `output`"
            raise UserError(what, where=folder, remedy=remedy, on_all_ranks=True)


def read_rng(folder: Path, rank: int) -> dict[str, "torch.Tensor"]:
    """The generator states of this rank (same layout only)."""
    from safetensors.torch import load_file

    return load_file(folder / f"rng_{rank:05d}.safetensors")


@functools.cache
def code_version() -> str:
    """The commit that this package is of, marked if files differ from it; its version where there is no repository."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return __version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return __version__
    return said.stdout.strip() or __version__


@functools.lru_cache(maxsize=1)
def _redacted(config: str) -> Any:
    """As JSON, without secrets; a run's config is the same at every save."""
    return redact.values(json.loads(config))
