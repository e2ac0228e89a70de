"""`megamm convert export RUN OUT` and `megamm convert import OUT RUN2`.

An export holds what stock engines read (config.json, model.safetensors, tokenizer.json), the codecs
under codecs/<modality>/, and megamm.json (vocabulary ranges, run config, step) that import needs.
It is written under a temporary name and renamed.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megamm import checkpoint, device
from megamm.checkpoint import saver
from megamm.config import RunConfig, config_from_dict
from megamm.convert import mapping
from megamm.convert.families import Family
from megamm.convert.family_config import family_for, to_config
from megamm.convert.tokenizer import export_tokenizer
from megamm.errors import UserError
from megamm.mcore import groups as grid
from megamm.model.vocabulary import Vocabulary

log = logging.getLogger(__name__)
OWN = "megamm.json"
WEIGHTS = "model.safetensors"


def find_checkpoint(run_or_checkpoint: Path) -> Path:
    """A run's newest valid checkpoint, or the checkpoint folder itself, verified."""
    if (run_or_checkpoint / checkpoint.STATE).exists():
        checkpoint.verify(run_or_checkpoint)
        return run_or_checkpoint
    folder = checkpoint.newest(run_or_checkpoint)
    if folder is None:
        raise UserError("no checkpoint here", where=run_or_checkpoint, remedy="name a run's `output` folder")
    return folder


def export(run_or_checkpoint: Path, out: Path) -> Path:
    """Write a Hugging Face folder that AutoModelForCausalLM loads; returns `out`. UserError if it exists."""
    if out.exists():
        raise UserError("the output exists", where=out, remedy="remove it or choose another")
    folder = find_checkpoint(run_or_checkpoint)
    state = checkpoint.read_state(folder)
    config = config_from_dict(state.config, where=folder)
    vocabulary = Vocabulary.from_json(state.vocabulary)
    family = family_for(config.model)
    _start_alone()
    from megamm.mcore import store

    stored = store.export_tensors(folder / "tensors")
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = mapping.to_transformers(family.entries, stored, config.model, vocabulary.size)
    save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
    _write_configs(temporary, family, config, vocabulary, weights["model.norm.weight"].dtype)
    export_tokenizer(config.tokenizers["text"], vocabulary, temporary)
    for name, codec in config.tokenizers.items():
        shutil.copytree(codec, temporary / "codecs" / name)
    own = {"vocabulary": state.vocabulary, "config": state.config, "step": state.step, "versions": state.versions}
    (temporary / OWN).write_text(json.dumps(own, indent=1))
    os.replace(temporary, out)
    return out


def _write_configs(folder: Path, family: Family, config: RunConfig, vocabulary: Vocabulary, dtype: torch.dtype) -> None:
    from transformers import GenerationConfig

    special = {
        "bos_token_id": vocabulary.document_start,
        "eos_token_id": vocabulary.document_end,
        "pad_token_id": vocabulary.padding,
    }
    theirs = to_config(family, config.model, vocabulary.size, config.data.seq_length, special)
    theirs.dtype = dtype
    theirs.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)


def read_own(export_folder: Path) -> tuple[RunConfig, Vocabulary, dict[str, Any]]:
    """Run config, vocabulary and the rest of an export's megamm.json; its codecs are those in the export."""
    try:
        own = json.loads((export_folder / OWN).read_text())
        config = config_from_dict(own["config"], where=export_folder / OWN)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"not an export of megamm: {error}",
            where=export_folder,
            remedy="make one by `megamm convert export`; from other folders a run starts by start_from.checkpoint",
        ) from None
    inside = {name: export_folder / "codecs" / name for name in config.tokenizers}
    return config.model_copy(update={"tokenizers": inside}), Vocabulary.from_json(own["vocabulary"]), own


def import_(export_folder: Path, run: Path) -> Path:
    """Write step 0 of a new run from an export: its weights bit for bit, no optimizer state."""
    if (run / "checkpoints").exists():
        raise UserError("the run has checkpoints", where=run, remedy="remove it or choose another output")
    config, vocabulary, own = read_own(export_folder)
    family = family_for(config.model)
    try:
        stored = mapping.from_transformers(family.entries, load_file(export_folder / WEIGHTS), config.model)
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise UserError(
            f"the weights do not fit config.json: {error}", where=export_folder / WEIGHTS, remedy="export again"
        ) from None
    _start_alone()
    from megamm.mcore import rng, store

    state = checkpoint.RunState(
        step=0,
        consumed_rows=0,
        world_size=1,
        layout=config.parallel.model_dump(),
        vocabulary=vocabulary.to_json(),
        config=own["config"],
        versions=store.versions(),
        has_optimizer=False,
    )
    saver.save_now(run, state, store.whole_blocks(stored), rng.fresh(), device.choose("cpu"))
    return checkpoint.path_of(run, state.step)


def _start_alone() -> None:
    """Stored tensors are read and written by one process on the CPU, with or without a GPU in the machine."""
    os.environ.pop("RANK", None)
    if not dist.is_initialized():
        grid.start(device.choose("cpu"))
