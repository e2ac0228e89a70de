"""A Hugging Face folder of any of the families as what a run starts from (megamm/start), layer by layer.

An export of megamm has its vocabulary beside it; of a plain folder the ids of its tokenizer are the text, and rows
beyond them, which pad its table, are nobody's. At most one stored tensor of one layer is in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megamm.checkpoint.blocks import Block, Shape
from megamm.codecs.folders import WEIGHTS, weight_files
from megamm.convert import mapping
from megamm.convert.families import FAMILIES
from megamm.convert.family_config import read_model
from megamm.convert.hf import OWN, read_own
from megamm.errors import UserError
from megamm.modalities.text import TextModality
from megamm.model.vocabulary import Range, Vocabulary

_REMEDY = f"name a folder of {', '.join(family.model_type for family in FAMILIES)} with its weights as safetensors"


class HuggingFaceSource:
    """megamm.start.source.Source over a folder's safetensors files."""

    def __init__(self, folder: Path, seq_length: int) -> None:
        """seq_length: tokens of the run's rows.

        UserError for another architecture, tensors that are missing, unknown or damaged, or no tokenizer."""
        self.where = folder
        self.family, self.config = read_model(folder, seq_length)
        self.entries = {mapping.LAYERS + entry.ours: entry for entry in self.family.entries}
        self.model: Mapping[str, Any] = self.config.model_dump(mode="json")
        self.vocabulary = read_own(folder)[1] if (folder / OWN).is_file() else _text_alone(folder)
        with _Weights(folder) as weights:
            try:
                stored = mapping.from_transformers(self.family.entries, weights.described(), self.config)
            except (KeyError, RuntimeError) as error:
                raise UserError(f"the weights do not fit config.json: {error}", where=folder, remedy=_REMEDY) from None
            expected = mapping.names(self.family.entries, self.config)
            unknown = sorted(weights.keys() - {*expected, "lm_head.weight"})
        if unknown:
            what = f"{len(unknown)} tensors have no place in the backbone, the first is {unknown[0]}"
            raise UserError(what, where=folder, remedy=_REMEDY)
        if len(stored[mapping.EMBEDDING]) < self.vocabulary.size:
            what = f"{len(stored[mapping.EMBEDDING])} rows for {self.vocabulary.size} ids of the tokenizer"
            raise UserError(what, where=folder, remedy="restore its tokenizer.json")
        self.shapes: Mapping[str, Shape] = {name: tuple(tensor.shape) for name, tensor in stored.items()}

    def read(self, blocks: Sequence[Block]) -> None:
        """UserError for a file that cannot be read."""
        with _Weights(self.where) as weights, torch.no_grad():
            for block in blocks:
                if (name := mapping.unstacked(self.config).get(block.key)) is not None:
                    _copy(weights[name], block, 0)
            for layer in range(self.config.num_layers):
                wanted = [
                    b for b in blocks if b.key.startswith(mapping.LAYERS) and 0 <= layer - b.offset[0] < b.size[0]
                ]
                for key in {block.key for block in wanted}:
                    joined = mapping.join_layer(self.entries[key], weights, self.config, layer)[None]
                    for block in (b for b in wanted if b.key == key):
                        _copy(joined, block, layer)


def _copy(tensor: torch.Tensor, block: Block, first: int) -> None:
    """What a tensor, rows [first, ...) of the whole one, has of a block."""
    data = block.data.view(block.size)
    low, high = max(first, block.offset[0]), min(first + len(tensor), block.offset[0] + block.size[0])
    inside = tuple(slice(start, start + n) for start, n in zip(block.offset[1:], block.size[1:], strict=True))
    data[low - block.offset[0] : high - block.offset[0]].copy_(tensor[(slice(low - first, high - first), *inside)])


class _Weights(Mapping[str, torch.Tensor]):
    """Tensors by name, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = weight_files(folder)
        if not files:
            raise UserError(f"no {WEIGHTS}", where=folder, remedy=_REMEDY)
        self.stack, self.files = ExitStack(), dict[str, Any]()
        try:
            for file in files:
                opened = self.stack.enter_context(safe_open(file, framework="pt"))
                self.files |= dict.fromkeys(opened.keys(), opened)
        except (SafetensorError, OSError) as error:
            raise UserError(f"unreadable weights: {error}", where=file, remedy="restore the file") from None

    def __enter__(self) -> "_Weights":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def __getitem__(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self.files[name].get_tensor(name)
            return tensor
        except SafetensorError as error:
            raise UserError(f"{name} cannot be read: {error}", where=self.folder, remedy="restore the file") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def described(self) -> dict[str, torch.Tensor]:
        """The tensors without their values."""
        shapes = {name: file.get_slice(name).get_shape() for name, file in self.files.items()}
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _text_alone(folder: Path) -> Vocabulary:
    text = TextModality.load(folder)
    return Vocabulary((Range("text", 0, text.vocabulary_size, text.codec_id, ("text",)),))
