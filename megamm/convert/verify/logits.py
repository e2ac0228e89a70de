"""Runs the same tokens through our model (a native checkpoint) and transformers' model (a folder), both in float32.

Our model gets packed rows; transformers gets each document of them separately. So one check covers conversion, packing
and attention that stays inside documents. Compared are the logits and, to find where two models start to differ, the
input of the first layer and the output of each layer. Differences are relative to the largest value of transformers'.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamm import checkpoint
from megamm.checkpoint.folder import find_checkpoint
from megamm.common import device
from megamm.common.errors import UserError
from megamm.common.sample import IGNORE_LABEL, Batch, Row
from megamm.config import ParallelConfig, RunConfig, config_from_dict
from megamm.convert.io.export_folder import load_stock, read_metadata
from megamm.convert.io.span_masks import attention_mask
from megamm.data.pipeline.run_data import open_run_data
from megamm.model.vocabulary import Vocabulary

EMBEDDING, LOGITS = "embedding", "logits"


@dataclass(frozen=True)
class Pass:
    """One row through one model: float32 `[S, H]` by stage (EMBEDDING, "layer 0" …), then LOGITS `[S, V]`."""

    stages: dict[str, torch.Tensor]

    def of_first_ids(self, size: int) -> "Pass":
        """A copy with the logits of the first ids only: padding rows of an embedding table are ignored."""
        return Pass(self.stages | {LOGITS: self.stages[LOGITS][:, :size]})


Forward = Callable[[Row], Pass]


def random_rows(vocabulary_size: int, length: int, seed: int = 0) -> list[Row]:
    """Random ids: two rows of one document, two of many documents and padding, as the trainer packs them."""
    rng = np.random.default_rng(seed)
    rows = []
    for most in (length, length, max(2, length // 3), max(2, length // 6)):
        segment, index = np.full(length, -1, dtype=np.int64), np.zeros(length, dtype=np.int64)
        at, document, end = 0, 0, length if most == length else length - length // 16
        while at < end:
            size = length if most == length else min(int(rng.integers(1, most + 1)), end - at)
            segment[at : at + size], index[at : at + size] = document, np.arange(size)
            at, document = at + size, document + 1
        ids = rng.integers(0, vocabulary_size, length)
        nothing, none = np.full(length, IGNORE_LABEL, dtype=np.int64), np.full(length, -1, dtype=np.int64)
        rows.append(Row(ids, nothing, np.zeros(length, np.float32), segment, np.tile(index, (3, 1)), none, none))
    return rows


@contextmanager
def our_model(step: Path, on: device.Device, rounded: Sequence[torch.dtype] = ()) -> Iterator[Forward]:
    """Build our backbone from a verified checkpoint, in float32 on one process; weights are cast to `rounded` first."""
    state = checkpoint.read_state(step)
    made_with = config_from_dict(state.config, where=step)
    train = made_with.train.model_copy(update={"precision": "fp32", "attention": "auto"})
    config = made_with.model_copy(update={"parallel": ParallelConfig(), "train": train})
    size = Vocabulary.from_json(state.vocabulary).size
    # Imported here: a conversion without the logit check needs no Megatron.
    from megamm.mcore import process_groups

    process_groups.start(on)
    from megamm.mcore import backbone, store  # after process_groups.start, which adapts Megatron-core to the device

    groups = process_groups.build(config.parallel, config.train.seed)
    try:
        (model,) = backbone.build_chunks(config, size, groups, on)
        store.load_weights(step / "tensors", [model], groups)
        _round(model, rounded)
        yield lambda row: _ours(model.eval(), row, size, on.torch_device)
    finally:
        process_groups.destroy()


@contextmanager
def their_model(folder: Path, on: device.Device, rounded: Sequence[torch.dtype] = ()) -> Iterator[Forward]:
    """Load a transformers folder with its own class, in float32. Raises UserError if the weights are incomplete."""
    model = load_stock(folder, torch.float32).to(on.torch_device)
    _round(model, rounded)
    yield lambda row: _theirs(model, row, on.torch_device)


@torch.inference_mode()
def _ours(model: Any, row: Row, vocabulary_size: int, where: torch.device) -> Pass:
    """Run our model on a packed row; attention is limited to the documents by the row's metadata."""
    batch = Batch.stack([row]).to(where)
    with _recorded(model.decoder.layers) as stages:
        logits = model(batch.input_ids, None, batch.packed_seq_metadata)[0, :, :vocabulary_size]
    seen = {name: tensor[:, 0] for name, tensor in stages.items()}  # [S, B = 1, H]
    return _seen(row, seen | {LOGITS: logits})


@torch.inference_mode()
def _theirs(model: Any, row: Row, where: torch.device) -> Pass:
    """Run transformers' model on each document of a row alone: the reference that knows nothing of packing."""
    found: dict[str, list[torch.Tensor]] = {}
    ids = torch.from_numpy(row.input_ids).to(where)[None]
    for document in range(int(row.segment.max()) + 1):
        tokens = np.flatnonzero(row.segment == document)
        with _recorded(model.get_decoder().layers) as stages:
            span = torch.from_numpy(row.span[tokens]).to(where)[None]
            mask = attention_mask(model, torch.ones_like(span), span)
            logits = model(ids[:, int(tokens[0]) : int(tokens[-1]) + 1], mask, use_cache=False).logits[0]
        # The documents, one after the other, make the same rows as the packed pass without padding.
        for name, tensor in ({name: tensor[0] for name, tensor in stages.items()} | {LOGITS: logits}).items():
            found.setdefault(name, []).append(tensor)
    return Pass({name: torch.cat(tensors).float().cpu() for name, tensors in found.items()})


def _seen(row: Row, stages: dict[str, torch.Tensor]) -> Pass:
    """The values of a row's documents, without padding."""
    inside = torch.from_numpy(row.segment >= 0)
    return Pass({name: tensor.float().cpu()[inside] for name, tensor in stages.items()})


@contextmanager
def _recorded(layers: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Record the input of the first of these modules and the output of each, in their own order of axes."""
    found: dict[str, torch.Tensor] = {}

    def before(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        # transformers passes the input by position, Megatron-core by name.
        found[EMBEDDING] = given[0] if given else named["hidden_states"]

    def after(number: int) -> Callable[[Any, Any, Any], None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            found[f"layer {number}"] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after(number)) for number, layer in enumerate(layers)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _round(model: torch.nn.Module, dtypes: Sequence[torch.dtype]) -> None:
    """Round float32 parameters to each dtype in turn, so that both models compute with equal weights."""
    for parameter in model.parameters():
        for dtype in dtypes:
            parameter.copy_(parameter.to(dtype))


def relative_differences(ours: Sequence[Pass], theirs: Sequence[Pass]) -> dict[str, float]:
    """Largest difference / largest value of `theirs`, by stage, over all rows. NaN where either side has NaN."""
    found = {}
    for stage in theirs[0].stages:
        pairs = [(a.stages[stage], b.stages[stage]) for a, b in zip(ours, theirs, strict=True)]
        scale = torch.stack([b.abs().max() for _, b in pairs]).max()
        found[stage] = float(torch.stack([(a - b).abs().max() for a, b in pairs]).max() / scale.clamp(min=1e-30))
    return found


def logits_difference(run: Path, export_folder: Path, on: device.Device, rows: int = 20) -> float:
    """Largest absolute logit difference between an export and its run, over the first `rows` held-out rows of the run.

    A run that was imported from a plain folder has none: random rows are used. Raises UserError if the export's step
    differs from the step of the run's newest checkpoint.
    """
    folder = find_checkpoint(run)
    state, step = checkpoint.read_state(folder), read_metadata(export_folder)[2]["step"]
    if state.step != step:
        what = f"the export is of step {step}, but the run's newest checkpoint is of step {state.step}"
        raise UserError(what, where=export_folder, remedy="export the run again")
    config: RunConfig = config_from_dict(state.config, where=folder)
    vocabulary = Vocabulary.from_json(state.vocabulary)
    if vocabulary.has_control:
        heldout = open_run_data(config).heldout_rows[:rows]
    else:  # an import of a plain folder has no data
        heldout = random_rows(vocabulary.size, min(128, config.data.seq_length))
    with our_model(folder, on) as ours, their_model(export_folder, on) as theirs:
        return max(float((ours(r).stages[LOGITS] - theirs(r).stages[LOGITS]).abs().max()) for r in heldout)
