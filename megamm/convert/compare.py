"""An export against the run that it was made from: the same tokens through stock transformers and our own model.

The packed rows of the run in our model, each document of them alone in transformers: conversion, packing and
attention kept inside documents are checked at once. Unit: logits (no unit), largest absolute difference.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamm import checkpoint, device
from megamm.config import ParallelConfig, config_from_dict
from megamm.convert.exported import Exported, open_export
from megamm.convert.hf import find_checkpoint
from megamm.data.run_data import open_run_data
from megamm.data.sample import Batch, Row
from megamm.errors import UserError


def logits_difference(run: Path, export_folder: Path, place: device.Device, rows: int = 20) -> float:
    """Largest absolute difference of logits: the run's checkpoint in our model, packed, against the export.

    Over all tokens of the first `rows` held-out rows; transformers reads each document on its own. UserError if the
    export is of another step than the run's newest checkpoint.
    """
    export = open_export(export_folder, place.torch_device)
    folder = find_checkpoint(run)
    state = checkpoint.read_state(folder)
    if state.step != export.step:
        what = f"the export is of step {export.step}, the run's checkpoint of step {state.step}"
        raise UserError(what, where=export_folder, remedy="export the run anew")
    config = config_from_dict(state.config, where=folder).model_copy(update={"parallel": ParallelConfig()})
    data = open_run_data(config)
    from megamm.mcore import groups as grid

    grid.start(place)
    from megamm.mcore import backbone, store  # after grid.start, which adapts Megatron-core to the device

    groups = grid.build(config.parallel, config.train.seed)
    try:
        chunks = backbone.build_chunks(config, data.vocabulary.size, groups, place)
        store.load(folder / "tensors", backbone.wrap(chunks, groups, place), None, groups, state.step)
        return max(_row_difference(chunks[0].eval(), export, row) for row in data.heldout_rows[:rows])
    finally:
        grid.destroy()


@torch.inference_mode()
def _row_difference(ours: Any, export: Exported, row: Row) -> float:
    batch = Batch.stack([row]).to(export.device)
    packed_SV = ours(batch.input_ids, None, batch.row_map)[0]
    worst = 0.0
    for segment in range(int(row.segment.max()) + 1):
        places = np.flatnonzero(row.segment == segment)
        part = slice(int(places[0]), int(places[-1]) + 1)
        theirs_SV = export.model(batch.input_ids[:, part]).logits[0]
        worst = max(worst, (packed_SV[part, : export.vocabulary.size] - theirs_SV).abs().max().item())
    return worst
