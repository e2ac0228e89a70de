"""Native checkpoints of small models of transformers, in several ranks' files, without a training run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoint_folders import write_blocks, write_manifest
from family_models import SEQUENCE, write_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megamm import cli
from megamm.checkpoint import TrainState, path_of
from megamm.checkpoint.tensor_shards import TensorShard
from megamm.convert.families import mapping
from megamm.convert.families.config import read_config
from megamm.convert.io.safetensors_files import Weights
from megamm.model.vocabulary import Range, Vocabulary
from megamm.parity.case import Case
from megamm.parity.rows import VOCABULARY

PADDING = 3
"""Padding rows of the tables, as tensor parallel leaves them."""
Change = Callable[[torch.Tensor], torch.Tensor]


def make_pair(name: str, folder: Path, shard: str = "60KB") -> tuple[Path, Path]:
    """Return (folder/run of two ranks' files, folder/hf in shards), the same random model of a family."""
    write_model(name, folder / "whole").save_pretrained(folder / "hf", max_shard_size=shard)
    make_native(folder / "hf", folder / "run")
    return folder / "run", folder / "hf"


def make_native(hf: Path, run: Path, change: Change = lambda tensor: tensor) -> Path:
    """Write RUN's step 0 with a folder's tensors, each changed; ranks have different layers, or halves of a tensor."""
    family, section = read_config(json.loads((hf / "config.json").read_text()), SEQUENCE, hf)
    config = Case.of(1, {f"model.{key}": value for key, value in section.items()}).config
    with Weights(hf) as weights:
        stored = mapping.from_transformers(family.rules, weights, config.model)
    ranks: list[list[TensorShard]] = [[], []]
    for key, tensor in stored.items():
        if key in (mapping.EMBEDDING, mapping.HEAD):
            tensor = torch.cat([tensor, torch.zeros(PADDING, tensor.shape[1], dtype=tensor.dtype)])
        for rank, block in enumerate(_halves(key, change(tensor))):
            ranks[rank].append(block)
    step = path_of(run, 0)
    step.mkdir(parents=True)
    write_blocks(step / "tensors", ranks)
    (step / "state.json").write_bytes(_state(config).to_json())
    write_manifest(step)
    return step


def _halves(key: str, tensor: torch.Tensor) -> list[TensorShard]:
    if len(tensor) < 2:
        return [TensorShard.whole(key, tensor)]
    shape, middle = tuple(tensor.shape), len(tensor) // 2
    return [
        TensorShard(
            key, shape, (start, *[0] * (len(shape) - 1)), (stop - start, *shape[1:]), tensor[start:stop].contiguous()
        )
        for start, stop in ((0, middle), (middle, shape[0]))
    ]


def _state(config: Any) -> TrainState:
    vocabulary = Vocabulary((Range("text", 0, VOCABULARY, "none", ("text",)),))
    return TrainState(0, 0, 1, {}, vocabulary.to_json(), config.model_dump(mode="json"), {}, has_optimizer=False)


def edit(folder: Path, name: str, change) -> None:
    """Change a tensor of a folder in shards in place, or remove it (None)."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    if changed is None:
        del index["weight_map"][name]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors | ({} if changed is None else {name: changed.contiguous()}), file, metadata={"format": "pt"})


def convert(*arguments):
    done = CliRunner().invoke(cli.app, ["convert", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done
