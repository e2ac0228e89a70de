"""A Hugging Face folder of Qwen3 or Qwen3-MoE as what a run starts from (megamm/start), layer by layer.

An export of megamm has its vocabulary beside it; of a plain folder the ids of its tokenizer are the text, and rows
beyond them, which pad its table, are nobody's. At most one layer is in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megamm.checkpoint.blocks import Block, Shape
from megamm.codecs.folders import WEIGHTS, weight_files
from megamm.convert import qwen3
from megamm.convert.hf import OWN, read_own
from megamm.errors import UserError
from megamm.modalities.text import TextModality
from megamm.model.vocabulary import Range, Vocabulary

_REMEDY = "name a folder of Qwen3 or Qwen3-MoE with its weights as safetensors"


class Qwen3Source:
    """megamm.start.source.Source over a folder's safetensors files."""

    def __init__(self, folder: Path) -> None:
        """UserError for another architecture, tensors that are missing, unknown or damaged, or no tokenizer."""
        self.where = folder
        self.config = qwen3.read_model_config(folder)
        self.model: Mapping[str, Any] = self.config.model_dump(mode="json")
        self.vocabulary = read_own(folder)[1] if (folder / OWN).is_file() else _text_alone(folder)
        with _Weights(folder) as weights:
            try:
                stored = qwen3.from_transformers(weights.described(), self.config)
            except (KeyError, RuntimeError) as error:
                raise UserError(f"the weights do not fit config.json: {error}", where=folder, remedy=_REMEDY) from None
            expected = qwen3.to_transformers(stored, self.config, len(stored[qwen3.EMBEDDING]))
            unknown = sorted(weights.keys() - expected.keys() - {"lm_head.weight"})
        if unknown:
            what = f"{len(unknown)} tensors have no place in the backbone, the first is {unknown[0]}"
            raise UserError(what, where=folder, remedy=_REMEDY)
        if len(stored[qwen3.EMBEDDING]) < self.vocabulary.size:
            what = f"{len(stored[qwen3.EMBEDDING])} rows for {self.vocabulary.size} ids of the tokenizer"
            raise UserError(what, where=folder, remedy="restore its tokenizer.json")
        self.shapes: Mapping[str, Shape] = {name: tuple(tensor.shape) for name, tensor in stored.items()}

    def read(self, blocks: Sequence[Block]) -> None:
        """UserError for a file that cannot be read."""
        with _Weights(self.where) as weights, torch.no_grad():
            for block in blocks:
                if (name := qwen3.unstacked(self.config).get(block.key)) is not None:
                    _copy(weights[name], block, 0)
            for layer in range(self.config.num_layers):
                wanted = [b for b in blocks if qwen3.is_stacked(b.key) and 0 <= layer - b.offset[0] < b.size[0]]
                joined = qwen3.join_layer(weights, self.config, layer) if wanted else {}
                for block in wanted:
                    _copy(joined[block.key][None], block, layer)


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
