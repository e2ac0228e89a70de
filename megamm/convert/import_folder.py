"""`megamm convert import FOLDER RUN`: a Hugging Face folder as step 0 of a new run (docs/conversion.md).

The folder is an export, or any model of a family. The model is not built: `plan_import` computes which bytes go where,
and conversion.py lets processes write them into a temporary folder, which is renamed when all of it is complete and
verified. Each group (mapping.TensorGroup) is a block of its stacked tensor and a part of a file, laid out as
checkpoint/rank_file.py does: whole layers, from which any parallel layout reads its part.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from megamm import __version__, checkpoint
from megamm.checkpoint import TrainState, files, index, manifest, retention
from megamm.checkpoint.folder import all_of
from megamm.checkpoint.index import StoredShard
from megamm.checkpoint.rank_file import ALIGNMENT, frame
from megamm.checkpoint.tensor_shards import Shape
from megamm.common import events
from megamm.common.errors import UserError
from megamm.config import ModelConfig, MTPConfig, ParallelConfig, RunConfig, apply_overrides, config_from_dict
from megamm.convert.conversion import ConversionJob, log_plan
from megamm.convert.families import mapping
from megamm.convert.families.config import family_of
from megamm.convert.families.mapping import TensorGroup, TensorRule
from megamm.convert.io import dtypes
from megamm.convert.io.dtypes import DtypeChange
from megamm.convert.io.export_folder import METADATA, read_metadata
from megamm.convert.io.hf_source import join_group, read_folder, shapes_of, text_vocabulary, with_own_head
from megamm.convert.io.origin import Origin, read_origin
from megamm.convert.io.safetensors_files import Weights
from megamm.convert.io.tensor_sources import FileTensors
from megamm.convert.io.unused import summary
from megamm.convert.plan import SHARD_SIZE, FilePart, Maker, pack_into_files, row_windows
from megamm.convert.verify import equivalence, shapes
from megamm.convert.verify.equivalence import VerificationOptions
from megamm.model.vocabulary import Vocabulary

log = logging.getLogger(__name__)


def import_(
    folder: Path,
    run: Path,
    *,
    nproc: int = 0,
    shard_size: int = SHARD_SIZE,
    dtype: torch.dtype | None = None,
    overrides: Sequence[str] = (),
    verification: VerificationOptions = VerificationOptions(),
) -> Path:
    """Write step 0 of a new run from an export or any folder of a family: weights bit for bit, no optimizer state.

    overrides: `key=value` for the config in the checkpoint, except the model's. For the rest see `export`.
    """
    if all_of(run):
        raise UserError("the run already has checkpoints", where=run, remedy="remove it or choose another output")
    config = _read_config(folder, run, overrides)
    began = time.monotonic()
    given = FileTensors(folder, used_only=True)
    if given.weights.unused:
        log.info("%s: %s", folder, summary(given.weights.unused))
    shapes.check(folder, given.described)
    family, _ = read_folder(folder, config.data.seq_length)
    is_export = (folder / METADATA).is_file()
    vocabulary = read_metadata(folder)[1] if is_export else text_vocabulary(folder, given.weights)
    if verification.needs_models:
        equivalence.check_memory_for_logits(config, vocabulary.size)
    if verification.refuse_nan:
        equivalence.refuse_not_finite(given)
    with Weights(folder, used_only=True) as weights:
        # Checked twice: above against transformers' own class, here against our tables.
        found = shapes_of(weights, family, config.model, vocabulary)
        plan = plan_import(weights, family.rules, config.model, dtype, shard_size)
    log_plan(plan, plan.dtypes)
    origin = read_origin(folder, vocabulary, found[mapping.EMBEDDING][0])
    final = checkpoint.path_of(run, 0)
    with ConversionJob(plan, final, nproc) as job:
        listed = job.fill()
        random = torch.get_rng_state()  # the state of a process that has not drawn in a parallel region
        more = {f"tensors/{name}": data for name, data in plan.index().items()}
        more["rng_00000.safetensors"] = safetensors.torch.save({"torch": random, "device": random.clone()})
        more[checkpoint.STATE] = _state(config, vocabulary, origin).to_json()
        listed |= {name: files.write(job.folder / name, [data]) for name, data in more.items()}
        files.write(job.folder / manifest.NAME, [manifest.render(listed)])
        equivalence.verify_result(job.folder, folder, job.folder, verification, nproc)
        job.publish()
    size = sum(entry.size for entry in listed.values())
    events.record(run, "imported", folder=str(folder), bytes=size, seconds=time.monotonic() - began)
    retention.apply(run, keep=1, keep_best=False)  # writes the pointer `latest`
    return final


def _read_config(folder: Path, run: Path, overrides: Sequence[str]) -> RunConfig:
    """Read the config of the run that a folder becomes.

    In a plain folder, config.json gives the model and the tokenizer; the rest is the minimum that is valid, plus
    `overrides`: a run that starts from it has its own config.
    """
    wrong = next((given for given in overrides if given.split("=")[0].split(".")[0] == "model"), None)
    if wrong is not None:
        what = f"{wrong}: the folder's config.json defines the model"
        raise UserError(what, where=folder, remedy="remove this option")
    if (folder / METADATA).is_file():
        metadata = read_metadata(folder)[2]
        apply_overrides(metadata["config"], overrides)
        config = config_from_dict(metadata["config"], where=folder / METADATA)
        # Modules of multi-token prediction are not exported, so that the imported model has none.
        model = config.model.model_copy(update={"mtp": MTPConfig()})
        return config.model_copy(update={"model": with_own_head(folder, model)})
    values: dict[str, Any] = {
        "output": str(run),
        "data": {"sources": [{"path": "none"}]},
        "tokenizers": {"text": str(folder.absolute())},
        "optimizer": {"lr": 1e-5},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
    }
    apply_overrides(values, overrides)
    # Before the model is read: a window as long as a row counts as none.
    values["data"].setdefault("seq_length", _max_row_length(folder))
    model = read_folder(folder, values["data"]["seq_length"])[1]
    return config_from_dict(values | {"model": model.model_dump(mode="json")}, where=folder)


def _max_row_length(folder: Path) -> int:
    """Maximum row length, in tokens, that the model was made for."""
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"unreadable config: {error}", where=file, remedy="download or copy the file again") from None
    family_of(values, file)  # a model of another type may have its positions elsewhere
    found = values.get("max_position_embeddings")
    if not isinstance(found, int) or found < 1:
        what = "max_position_embeddings is missing" if found is None else f"max_position_embeddings = {found!r}"
        raise UserError(what, where=file, remedy="set the row length: data.seq_length=N")
    return found


def _state(config: RunConfig, vocabulary: Vocabulary, origin: Origin) -> TrainState:
    return TrainState(
        step=0,
        consumed_rows=0,
        world_size=1,
        layout=ParallelConfig().model_dump(),
        vocabulary=vocabulary.to_json(),
        config=config.model_dump(mode="json"),
        versions={"megamm": __version__, "code": checkpoint.code_version(), "torch": torch.__version__},
        has_optimizer=False,
        origin=origin.to_json(),
    )


@dataclass(frozen=True)
class ImportedShard:
    """A block that is stored: a group, or rows of a table; its size is without the axes of layers and experts."""

    group: TensorGroup
    rows: range | None
    size: Shape
    read_as: torch.dtype
    stored_as: torch.dtype

    @property
    def length(self) -> int:
        """Bytes of the shard's archive: the elements, and what torch.save writes around them."""
        around = frame(self.stored_as, self.block_size)
        elements = self.stored_as.itemsize * torch.Size(self.size).numel()
        return len(around.head) + elements + len(around.tail)

    @property
    def padded(self) -> int:
        """Length rounded up to where the next shard begins."""
        return -(-self.length // ALIGNMENT) * ALIGNMENT

    @property
    def offset(self) -> Shape:
        """Index of the first element in the stacked tensor."""
        first = 0 if self.rows is None else self.rows.start
        return (*self.group.index, first, *[0] * (len(self.size) - 1)) if self.size else self.group.index

    @property
    def block_size(self) -> Shape:
        """Size with the axes of layers and experts."""
        return (*[1] * len(self.group.index), *self.size)


@dataclass(frozen=True)
class ImportPlan:
    """The import as a plan.Conversion."""

    folder: Path
    model: ModelConfig
    files: Mapping[str, Sequence[FilePart]]
    stored: tuple[StoredShard, ...]
    dtypes: tuple[DtypeChange, ...]
    identity: str
    name: str = "import"

    @contextmanager
    def opened(self) -> Iterator[Maker]:
        with Weights(self.folder, used_only=True) as weights:
            yield _ImportMaker(weights, self.model)

    def index(self) -> dict[str, bytes]:
        """The checkpoint's tensor files that hold no elements."""
        return index.files_of(self.stored)


@dataclass(frozen=True)
class _ImportMaker:
    weights: Weights
    model: ModelConfig

    def __call__(self, source: ImportedShard) -> Iterable[bytes | memoryview]:
        around = frame(source.stored_as, source.block_size)
        yield around.head
        if source.rows is None:
            ours = join_group(source.group, self.weights, self.model)
        else:
            ours = torch.empty(source.size, dtype=source.read_as)
            self.weights.read(source.group.theirs[0], ours, source.rows.start)
        yield from dtypes.bytes_as(ours, source.stored_as, source.group.theirs[0])
        yield around.tail
        yield bytes(source.padded - source.length)


def plan_import(
    weights: Weights, rules: tuple[TensorRule, ...], m: ModelConfig, dtype: torch.dtype | None, file_size: int
) -> ImportPlan:
    """Plan the import of a checked folder (hf_source.shapes_of). Raises UserError if one tensor has several dtypes."""
    shards = [shard for group in mapping.groups(rules, m) for shard in _shards(group, weights, m, dtype)]
    planned, stored = _layout(shards, file_size)
    _check_dtypes(stored, weights.folder)
    changes = tuple((shard.read_as, shard.stored_as) for shard in shards if shard.rows is None or not shard.rows.start)
    return ImportPlan(weights.folder, m, planned, tuple(stored), changes, _identity(weights, stored))


def _shards(group: TensorGroup, weights: Weights, m: ModelConfig, dtype: torch.dtype | None) -> Iterator[ImportedShard]:
    """Yield the stored shards of a group: one for the whole group; for a table, one for each window of rows."""
    infos = [weights.infos[name] for name in group.theirs]
    read_as = infos[0].dtype
    if any(info.dtype != read_as for info in infos):
        names = ", ".join(group.theirs)
        raise UserError(f"{names} have several dtypes", where=weights.folder, remedy="convert them to one dtype")
    stored_as = dtypes.target_of(read_as, dtype)
    if group.rule is not None:
        parts = [torch.empty(info.shape, dtype=info.dtype, device="meta") for info in infos]
        yield ImportedShard(group, None, tuple(group.rule.join(parts, m).shape), read_as, stored_as)
        return
    rows, *rest = infos[0].shape
    for window in row_windows(rows, torch.Size(rest).numel() * read_as.itemsize):
        yield ImportedShard(group, window, (len(window), *rest), read_as, stored_as)


def _layout(shards: Sequence[ImportedShard], file_size: int) -> tuple[dict[str, list[FilePart]], list[StoredShard]]:
    """Distribute the shards over files as if each file were a rank's; returns the parts and the index entries."""
    shapes = _whole_shapes(shards)
    planned: dict[str, list[FilePart]] = {}
    stored: list[StoredShard] = []
    for number, file in enumerate(pack_into_files(shards, lambda shard: shard.padded, file_size)):
        name, start = f"__{number}_0.distcp", 0
        for shard in file:
            key, shape = shard.group.ours, shapes[shard.group.ours]
            box = shard.offset, shard.block_size
            stored.append(StoredShard(key, shape, *box, shard.stored_as, name, start, shard.length))
            start += shard.padded
        planned[f"tensors/{name}"] = [FilePart(shard.padded, shard) for shard in file]
    return planned, stored


def _whole_shapes(shards: Sequence[ImportedShard]) -> dict[str, Shape]:
    """Shapes of the whole tensors: as large as their shards extend."""
    shapes: dict[str, Shape] = {}
    for shard in shards:
        end = tuple(a + b for a, b in zip(shard.offset, shard.block_size, strict=True))
        before = shapes.get(shard.group.ours, end)
        shapes[shard.group.ours] = tuple(map(max, before, end))
    return shapes


def _check_dtypes(stored: Sequence[StoredShard], folder: Path) -> None:
    """Raise UserError for a stacked tensor whose layers have several dtypes: a checkpoint has one for each tensor."""
    found: dict[str, torch.dtype] = {}
    for entry in stored:
        if found.setdefault(entry.key, entry.dtype) != entry.dtype:
            what = f"layers of {entry.key} have the dtypes {found[entry.key]} and {entry.dtype}"
            raise UserError(what, where=folder, remedy="convert them to one dtype (--dtype)")


def _identity(weights: Weights, stored: Sequence[StoredShard]) -> str:
    """An identity of the input (files by name, size and mtime, tensor offsets) and of the output.

    Not by digests: a folder need not have them, and computing them would read all of it once more.
    """
    described: list[Any] = []
    for file in weights.files:
        state = file.stat()
        described.append([file.name, state.st_size, state.st_mtime_ns])
    described += [[name, info.file.name, info.start] for name, info in sorted(weights.infos.items())]
    described += [[e.key, *e.offset, *e.size, str(e.dtype), e.file, e.start] for e in stored]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()
