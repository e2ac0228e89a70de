"""The weights of a Hugging Face folder of a supported family as our stored tensors, group by group.

`HuggingFaceSource` is the source of a run's first weights (megamm/init_from); import uses the rest.

An export of megamm contains its vocabulary. In a plain folder the ids of the tokenizer are the text range. Padding rows
of the embedding table beyond them are imported, but no id of another run starts from them. At most one group
(mapping.TensorGroup) is in memory.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megamm.checkpoint.tensor_shards import Shape, TensorShard
from megamm.checkpoint.whole_tensors import difference
from megamm.common.errors import UserError
from megamm.config import ModelConfig
from megamm.convert.families import mapping
from megamm.convert.families.config import read_model
from megamm.convert.families.family import Family
from megamm.convert.families.mapping import TensorGroup
from megamm.convert.families.tables import FAMILIES
from megamm.convert.io.export_folder import METADATA, read_metadata, surplus_tokens
from megamm.convert.io.origin import read_origin
from megamm.convert.io.safetensors_files import Weights
from megamm.convert.io.unused import summary
from megamm.convert.plan import row_windows
from megamm.modalities.text import TextModality
from megamm.model.vocabulary import Range, Vocabulary

log = logging.getLogger(__name__)
_REMEDY = f"give a folder of {', '.join(family.model_type for family in FAMILIES)} with its weights as safetensors"


class HuggingFaceSource:
    """megamm.init_from.source.WeightSource over a folder's safetensors files."""

    def __init__(self, folder: Path, seq_length: int) -> None:
        """seq_length: tokens of the run's rows.

        Raises UserError for another architecture, missing, unknown or damaged tensors, or a missing tokenizer."""
        self.where = folder
        self.family, self.config = read_folder(folder, seq_length)
        self.model: Mapping[str, Any] = self.config.model_dump(mode="json")
        with Weights(folder, used_only=True) as weights:
            if weights.unused:
                log.info("%s: %s", folder, summary(weights.unused))
            is_export = (folder / METADATA).is_file()
            self.vocabulary = read_metadata(folder)[1] if is_export else text_vocabulary(folder, weights)
            self.shapes = shapes_of(weights, self.family, self.config, self.vocabulary)
        self.origin = read_origin(folder, self.vocabulary, self.shapes[mapping.EMBEDDING][0]).to_json()

    def read(self, blocks: Sequence[TensorShard]) -> None:
        """Fill the blocks. Raises UserError for an unreadable file."""
        with Weights(self.where, used_only=True) as weights, torch.no_grad():
            for group in mapping.groups(self.family.rules, self.config):
                wanted = [block for block in blocks if block.key == group.ours and _has(block, group.index)]
                # A table can be the largest tensor by far: only the rows that the blocks need are read.
                if wanted and group.rule is None:
                    for block in wanted:
                        _copy_rows(weights, group.theirs[0], block)
                elif wanted:
                    tensor = join_group(group, weights, self.config)
                    for block in wanted:
                        _copy(tensor, group.index, block)


def read_folder(folder: Path, seq_length: int) -> tuple[Family, ModelConfig]:
    """`read_model`, corrected by the weights: a head that differs from the embedding is not tied to it."""
    family, model = read_model(folder, seq_length)
    return family, with_own_head(folder, model)


def with_own_head(folder: Path, m: ModelConfig) -> ModelConfig:
    """The model, untied if the folder has an output layer with other values than its embedding, as transformers does.

    The log reports it, because the folder's configuration declares the opposite.
    """
    if not m.tie_embeddings:
        return m
    names = [mapping.unstacked(m)[mapping.EMBEDDING], mapping.HEAD_THERE]
    with Weights(folder) as weights:
        infos = [weights.infos.get(name) for name in names]
        if infos[0] is None or infos[1] is None or _equal(weights, names):
            return m
    what = "config.json has tie_word_embeddings = true, but lm_head.weight differs from model.embed_tokens.weight"
    log.warning("%s: %s: importing both, with tie_embeddings = false", folder, what)
    return m.model_copy(update={"tie_embeddings": False})


def _equal(weights: Weights, names: Sequence[str]) -> bool:
    """Whether two tensors have the same values; they are read in windows of rows."""
    one, other = (weights.infos[name] for name in names)
    if one.shape != other.shape:
        return False
    rows, *rest = one.shape
    size = torch.Size(rest).numel()
    for window in row_windows(rows, size * max(one.dtype.itemsize, other.dtype.itemsize)):
        parts = [torch.empty((len(window), *rest), dtype=info.dtype) for info in (one, other)]
        for name, part in zip(names, parts, strict=True):
            weights.read(name, part, window.start)
        if difference(names[1], *parts):
            return False
    return True


def shapes_of(weights: Weights, family: Family, m: ModelConfig, vocabulary: Vocabulary) -> Mapping[str, Shape]:
    """Shapes of the stored tensors that a folder provides. Raises UserError if some are missing, unknown or misfit."""
    try:
        stored = mapping.from_transformers(family.rules, weights.described(), m)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"the weights do not fit config.json: {error}", where=weights.folder, remedy=_REMEDY) from None
    # Folders with tied embeddings may store the head nevertheless; it equals the embedding and is not read.
    unknown = sorted(weights.keys() - {*mapping.names(family.rules, m), mapping.HEAD_THERE})
    if unknown:
        what = f"{len(unknown)} tensors are unknown to the backbone, the first is {unknown[0]}"
        raise UserError(what, where=weights.folder, remedy=_REMEDY)
    rows = len(stored[mapping.EMBEDDING])
    if rows < vocabulary.size:
        what = f"the embedding has {rows} rows, but the tokenizer has {vocabulary.size} ids"
        raise UserError(what, where=weights.folder, remedy="restore the tokenizer.json of this model")
    return {name: tuple(tensor.shape) for name, tensor in stored.items()}


def join_group(group: TensorGroup, weights: Weights, m: ModelConfig) -> torch.Tensor:
    """A group's part of the stored tensor, in the files' dtype. Raises KeyError for a missing tensor, or UserError.

    Where the parts are contiguous views of the result (all but query, key and value by query group), the files are read
    directly into it; otherwise the group is in memory twice.
    """
    if group.rule is None:
        return weights[group.theirs[0]]
    infos = [weights.infos[name] for name in group.theirs]
    # The result's shape comes from a join without values, its views from the inverse.
    like = group.rule.join([torch.empty(info.shape, dtype=info.dtype, device="meta") for info in infos], m)
    ours = torch.empty(like.shape, dtype=like.dtype)
    parts = group.rule.cut(ours, m)
    memory = ours.untyped_storage().data_ptr()
    if all(part.untyped_storage().data_ptr() == memory and part.is_contiguous() for part in parts):
        for name, part in zip(group.theirs, parts, strict=True):
            weights.read(name, part)
        return ours
    del ours, parts
    return group.rule.join([weights[name] for name in group.theirs], m)


def text_vocabulary(folder: Path, weights: Weights) -> Vocabulary:
    """The vocabulary of a plain folder: the ids of its tokenizer. Raises UserError if it has none.

    Added tokens at the end of a tokenizer that have no row in the embedding are left out: no prompt for this model can
    have them (Gemma 3 1B has one, of its larger siblings).
    """
    text = TextModality.load(folder)
    size, embedding = text.vocabulary_size, weights.infos.get("model.embed_tokens.weight")
    if embedding is not None and (surplus := surplus_tokens(text.tokenizer, embedding.shape[0])):
        names = ", ".join(f"{token} ({id_})" for id_, token in surplus.items())
        log.warning("%s: tokens left out, as the embedding has no row for them: %s", folder, names)
        size = embedding.shape[0]
    return Vocabulary((Range("text", 0, size, text.codec_id, ("text",)),))


def _has(block: TensorShard, index: tuple[int, ...]) -> bool:
    """Return whether the group at `index` of the stacked axes is in the block."""
    axes = zip(index, block.offset, block.size, strict=False)
    return all(first <= i < first + size for i, first, size in axes)


def _copy(tensor: torch.Tensor, index: tuple[int, ...], block: TensorShard) -> None:
    """Copy the part of a tensor, stored as a whole at `index`, that belongs to a block."""
    # The index drops the stacked axes, which the group's tensor lacks; its other axes may be sharded, so they are cut.
    inside = tuple(i - first for i, first in zip(index, block.offset, strict=False))
    rest = zip(block.offset[len(index) :], block.size[len(index) :], strict=True)
    block.data.view(block.size)[inside].copy_(tensor[tuple(slice(start, start + n) for start, n in rest)])


def _copy_rows(weights: Weights, name: str, block: TensorShard) -> None:
    """Copy a block's rows of a tensor that has no axis of layers."""
    info = weights.infos[name]
    rows = torch.empty((block.size[0], *info.shape[1:]), dtype=info.dtype)
    weights.read(name, rows, block.offset[0])
    inside = tuple(slice(start, start + n) for start, n in zip(block.offset[1:], block.size[1:], strict=True))
    block.data.view(block.size).copy_(rows[(slice(None), *inside)])
