"""`megamm convert export RUN OUT` and `megamm convert import FOLDER RUN2`, tensor by tensor (docs/conversion.md).

An export holds what stock engines read (config.json, the weights as one safetensors file or several with an index,
tokenizer.json), the codecs under codecs/<modality>/, megamm.json (convert/io/export_metadata.py), which import needs,
the model card, the attribution of the data, and a digest of every file. Neither direction builds the model:
convert/job/export_tensors.py and convert/job/import_tensors.py plan which bytes go where; convert/job/conversion.py
lets processes write them into a temporary folder, which is renamed when all of it is complete and verified.
"""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from megamm import __version__, checkpoint
from megamm.checkpoint import RunState, files, manifest, retention
from megamm.checkpoint.folder import all_of, find_checkpoint
from megamm.common import events
from megamm.common.errors import UserError
from megamm.config import ParallelConfig, RunConfig, apply_overrides, config_from_dict
from megamm.convert.extras import card
from megamm.convert.families.config import family_for, read_model, to_config
from megamm.convert.families.tables import Family
from megamm.convert.io import dtypes as elements
from megamm.convert.io.export_metadata import OWN, own_of, read_own
from megamm.convert.io.hf_source import shapes_of, text_alone
from megamm.convert.io.safetensors_files import Weights
from megamm.convert.io.tokenizer import copy_tokenizer, export_tokenizer
from megamm.convert.job import export_tensors, import_tensors
from megamm.convert.job.conversion import Work
from megamm.convert.job.plan import SHARD_SIZE, Conversion
from megamm.convert.verify.gate import Checks
from megamm.model.vocabulary import Vocabulary
from megamm.tokenizers.io import WEIGHTS

log = logging.getLogger(__name__)
_SMALL = 16 << 20
"""Files up to this many bytes are fully verified before they are read; larger ones only by size."""
_NO_MODEL = shutil.ignore_patterns("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "*.index.json")
"""Files to skip: a text tokenizer's folder may be that of a whole model."""


def export(
    run_or_checkpoint: Path,
    out: Path,
    *,
    nproc: int = 0,
    shard_size: int = SHARD_SIZE,
    dtype: torch.dtype | None = None,
    checks: Checks = Checks(),
) -> Path:
    """Write a Hugging Face folder that AutoModelForCausalLM loads; returns `out`.

    nproc: processes, 0: one per core; shard_size: bytes of a file; dtype: of the export's weights, None: as stored.
    Raises UserError if `out` exists, a value is out of range for the dtype, there is not enough space, another process
    converts to the same folder, or a file of the newest checkpoint does not match its manifest. An incomplete newest
    checkpoint is skipped. Raises GateError if the result is not the same model.
    """
    from megamm.convert.io import tensor_sources
    from megamm.convert.verify import gate

    if out.exists():
        raise UserError("the output exists", where=out, remedy="remove it or choose another folder")
    folder = find_checkpoint(run_or_checkpoint, _SMALL)
    state = checkpoint.read_state(folder)
    config = config_from_dict(state.config, where=folder)
    vocabulary = Vocabulary.from_json(state.vocabulary)
    family = family_for(config.model)
    for name, codec in config.tokenizers.items():
        if not codec.is_dir():
            raise UserError(f"tokenizers.{name}: no such folder", where=codec, remedy="restore the run's codec there")
    if checks.need_models:
        gate.room_for_logits(config, vocabulary.size)
    if checks.refuse_nan:
        gate.refuse_not_finite(tensor_sources.Native(folder))
    planned = export_tensors.plan(folder, family.entries, config.model, vocabulary.size, dtype, shard_size)
    _tell(planned, planned.dtypes)
    media = [codec for name, codec in config.tokenizers.items() if name != "text"]
    codecs = sum(f.stat().st_size for codec in media for f in codec.rglob("*") if f.is_file())
    with Work(planned, out, nproc, more=codecs) as work:
        _fill(work, folder)
        if len(planned.files) > 1:
            files.write(work.folder / f"{WEIGHTS}.index.json", [planned.index()])
        _write_beside(work.folder, family, config, vocabulary, planned.dtypes[-1][1])
        own = own_of(state, card.record(folder, state, config))
        (work.folder / OWN).write_text(json.dumps(own, indent=1))
        card.copy_attribution(state, config, work.folder)
        card.write_card(work.folder, own)
        gate.end(folder, work.folder, work.folder, checks, nproc)
        work.publish()
    return out


def _fill(work: Work, source: Path) -> None:
    """Fill it from a checkpoint, then verify the checkpoint's digests, so that it is read from disk only once.

    The files made from a damaged checkpoint are removed; its damage is reported instead of errors that follow from it.
    """
    failed: UserError | None = None
    try:
        work.fill()
    except UserError as error:
        failed = error
    try:
        checkpoint.verify(source)
    except UserError:
        files.remove_tree(work.place)
        raise
    if failed is not None:
        raise failed


def _tell(planned: Conversion, dtypes: Sequence[tuple[torch.dtype, torch.dtype]]) -> None:
    size = sum(item.size for items in planned.files.values() for item in items)
    log.info("%s: %d files, %.2f GB", planned.name, len(planned.files), size / 1e9)
    for line in elements.said(dtypes):
        log.info("%s: %s", planned.name, line)


def _write_beside(folder: Path, family: Family, config: RunConfig, vocabulary: Vocabulary, dtype: torch.dtype) -> None:
    """Write the config, the tokenizer and the codecs."""
    from transformers import GenerationConfig

    if any(part.name == "control" for part in vocabulary.ranges):
        export_tokenizer(config.tokenizers["text"], vocabulary, folder)
        special = {
            "bos_token_id": vocabulary.document_start,
            "eos_token_id": vocabulary.document_end,
            "pad_token_id": vocabulary.padding,
        }
    else:  # imported from a plain folder
        special = copy_tokenizer(config.tokenizers["text"], folder, vocabulary.size)
    theirs = to_config(family, config.model, vocabulary.size, config.data.seq_length, special)
    theirs.dtype = dtype
    theirs.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)
    for name, codec in config.tokenizers.items():
        shutil.copytree(codec, folder / "codecs" / name, ignore=_NO_MODEL if name == "text" else None)


def import_(
    folder: Path,
    run: Path,
    *,
    nproc: int = 0,
    shard_size: int = SHARD_SIZE,
    dtype: torch.dtype | None = None,
    overrides: Sequence[str] = (),
    checks: Checks = Checks(),
) -> Path:
    """Write step 0 of a new run from an export or any folder of a family: weights bit for bit, no optimizer state.

    overrides: `key=value` for the config in the checkpoint, except the model's. For the rest see `export`.
    """
    from megamm.convert.io import tensor_sources
    from megamm.convert.verify import gate, shapes

    if all_of(run):
        raise UserError("the run already has checkpoints", where=run, remedy="remove it or choose another output")
    config, vocabulary, family = _described(folder, run, overrides)
    began = time.monotonic()
    given = tensor_sources.OfFiles(folder)
    shapes.check(folder, given.described)
    if checks.need_models:
        gate.room_for_logits(config, vocabulary.size)
    if checks.refuse_nan:
        gate.refuse_not_finite(given)
    with Weights(folder) as weights:
        shapes_of(weights, family, config.model, vocabulary)
        planned = import_tensors.plan(weights, family.entries, config.model, dtype, shard_size)
    _tell(planned, planned.dtypes)
    final = checkpoint.path_of(run, 0)
    with Work(planned, final, nproc) as work:
        listed = work.fill()
        random = torch.get_rng_state()  # the state of a process that has not drawn in a parallel region
        more = {f"tensors/{name}": data for name, data in planned.index().items()}
        more["rng_00000.safetensors"] = safetensors.torch.save({"torch": random, "device": random.clone()})
        more[checkpoint.STATE] = _state(config, vocabulary).to_json()
        listed |= {name: files.write(work.folder / name, [data]) for name, data in more.items()}
        files.write(work.folder / manifest.NAME, [manifest.render(listed)])
        gate.end(work.folder, folder, work.folder, checks, nproc)
        work.publish()
    size = sum(entry.size for entry in listed.values())
    events.record(run, "imported", folder=str(folder), bytes=size, seconds=time.monotonic() - began)
    retention.apply(run, keep=1, keep_best=False)
    return final


def _state(config: RunConfig, vocabulary: Vocabulary) -> RunState:
    return RunState(
        step=0,
        consumed_rows=0,
        world_size=1,
        layout=ParallelConfig().model_dump(),
        vocabulary=vocabulary.to_json(),
        config=config.model_dump(mode="json"),
        versions={"megamm": __version__, "code": checkpoint.code_version(), "torch": torch.__version__},
        has_optimizer=False,
    )


def _described(folder: Path, run: Path, overrides: Sequence[str]) -> tuple[RunConfig, Vocabulary, Family]:
    """Config, vocabulary and family of a folder. In a plain folder, config.json gives the model and the tokenizer; the
    rest is the minimum that is valid, plus `overrides`: a run has its own config."""
    wrong = next((given for given in overrides if given.split("=")[0].split(".")[0] == "model"), None)
    if wrong is not None:
        what = f"{wrong}: the folder's config.json defines the model"
        raise UserError(what, where=folder, remedy="remove this option")
    if (folder / OWN).is_file():
        _, vocabulary, own = read_own(folder)
        apply_overrides(own["config"], overrides)
        config = config_from_dict(own["config"], where=folder / OWN)
        return config, vocabulary, family_for(config.model)
    values: dict[str, Any] = {
        "output": str(run),
        "data": {"sources": [{"path": "none"}]},
        "tokenizers": {"text": str(folder.absolute())},
        "optimizer": {"lr": 1e-5},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
    }
    apply_overrides(values, overrides)
    values["data"].setdefault("seq_length", _longest(folder))
    family, model = read_model(folder, values["data"]["seq_length"])
    config = config_from_dict(values | {"model": model.model_dump(mode="json")}, where=folder)
    return config, text_alone(folder), family


def _longest(folder: Path) -> int:
    """The maximum row length, in tokens, that the model was made for."""
    file = folder / "config.json"
    try:
        return int(json.loads(file.read_text())["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"max_position_embeddings is missing: {error!r}"
        raise UserError(what, where=file, remedy="set the row length: data.seq_length=N") from None
