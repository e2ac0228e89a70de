"""Opens an export for use: the stock transformers model, and the codecs and vocabulary stored with it.

Generation and evaluation see a model only through this module, so their results are what any engine gets from the
export, the folder that `megamm convert export` makes.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from megamm.common.errors import UserError
from megamm.common.sample import Document, Row
from megamm.config import RunConfig
from megamm.convert.io.export_metadata import read_own
from megamm.data.pipeline.packing import pack
from megamm.data.pipeline.run_data import load_modalities, packing_specs, vocabulary_of
from megamm.modalities.protocol import Modality
from megamm.model.vocabulary import Vocabulary

log = logging.getLogger(__name__)
_REMEDY = "create the export again with `megamm convert export`"


@dataclass(frozen=True)
class Exported:
    """An open export; `step` is the training step of its weights. The weights are read on first use of `model`."""

    folder: Path
    config: RunConfig
    vocabulary: Vocabulary
    modalities: dict[str, Modality]
    step: int
    device: torch.device

    @cached_property
    def model(self) -> Any:
        """The transformers model, in eval mode on the device. Raises UserError if weights are missing or do not fit."""
        model = load_stock(self.folder)
        log.info("%s from step %d on %s, %s", type(model).__name__, self.step, self.device, model.dtype)
        return model.to(self.device)

    def row(self, document: Document, length: int) -> Row:
        """One document as in training, padded to `length` tokens."""
        return pack([document], self.vocabulary, length, packing_specs(self.modalities, length))


def load_stock(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The model of any transformers folder, in eval mode on the CPU; dtype None: the stored dtype.

    Raises UserError if weights are missing or do not fit.
    """
    from transformers import AutoModelForCausalLM  # seconds to import
    from transformers.utils import logging as their_logging

    their_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, dtype=dtype or "auto"
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"transformers cannot load it: {reason}", where=folder, remedy=_REMEDY) from error
    model, found = loaded
    # transformers would continue with random weights in place of missing ones.
    wrong = sorted(map(str, [*found["missing_keys"], *found["unexpected_keys"]]))
    if wrong:
        what = f"{len(wrong)} tensors are missing or unknown, the first is {wrong[0]}"
        raise UserError(what, where=folder, remedy=_REMEDY)
    return model.eval()


def open_export(folder: Path, device: torch.device) -> Exported:
    """Open an export with its own codecs. Raises UserError if it is not an export, or a codec was exchanged."""
    config, vocabulary, own = read_own(folder)
    modalities = load_modalities(config.tokenizers, device)
    if vocabulary_of(modalities) != vocabulary:
        raise UserError("the codecs do not match the model's vocabulary", where=folder / "codecs", remedy=_REMEDY)
    return Exported(folder, config, vocabulary, modalities, own["step"], device)
