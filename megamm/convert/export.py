"""`megamm convert export RUN OUT`: a checkpoint as a Hugging Face folder, tensor by tensor (docs/conversion.md).

An export holds what stock engines read (config.json, the weights as one safetensors file or several with an index,
tokenizer.json), the codecs under codecs/<modality>/, megamm.json (io/export_folder.py), which import needs, the model
card, the attribution of the data, and a digest of every file. The model is not built: `plan_export` computes which
bytes go where, and conversion.py lets processes write them into a temporary folder, which is renamed when all of it is
complete and verified.

A weights file has a header, then the tensors in the order of the layers, wider dtypes first so that each is aligned.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megamm import checkpoint
from megamm.checkpoint import files, index, manifest
from megamm.checkpoint.folder import find_checkpoint
from megamm.checkpoint.index import StoredTensor
from megamm.checkpoint.reader import TensorReader
from megamm.checkpoint.tensor_shards import Shape, TensorShard
from megamm.common.errors import UserError
from megamm.config import ModelConfig, RunConfig, config_from_dict
from megamm.convert.conversion import ConversionJob, log_plan
from megamm.convert.extras import card
from megamm.convert.families import mapping
from megamm.convert.families.config import family_for, to_config
from megamm.convert.families.family import Family
from megamm.convert.families.mapping import TensorGroup, TensorRule
from megamm.convert.io import dtypes
from megamm.convert.io.dtypes import DtypeChange
from megamm.convert.io.export_folder import METADATA, copy_tokenizer, export_tokenizer, metadata_of
from megamm.convert.io.origin import GENERATION, Origin, generation_settings, plain_ids, special_ids
from megamm.convert.io.safetensors_files import header
from megamm.convert.io.tensor_sources import NativeTensors
from megamm.convert.plan import SHARD_SIZE, FilePart, Maker, pack_into_files, row_windows
from megamm.convert.verify import equivalence
from megamm.convert.verify.equivalence import VerificationOptions
from megamm.model.vocabulary import Vocabulary
from megamm.tokenizers.io import INDEX, WEIGHTS

log = logging.getLogger(__name__)
_VERIFIED_FIRST = 16 << 20
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
    trim_vocabulary: bool = False,
    verification: VerificationOptions = VerificationOptions(),
) -> Path:
    """Write a Hugging Face folder that AutoModelForCausalLM loads; returns `out`.

    nproc: processes, 0: one per core; shard_size: bytes of a file; dtype: of the export's weights, None: as stored;
    trim_vocabulary: drop the rows that an imported model's tables have beyond its tokenizer's ids.
    Raises UserError if `out` exists, a value is out of range for the dtype, there is not enough space, another process
    converts to the same folder, or a file of the newest checkpoint does not match its manifest. An incomplete newest
    checkpoint is skipped. Raises VerificationError if the result is not the same model.
    """
    if out.exists():
        raise UserError("the output exists", where=out, remedy="remove it or choose another folder")
    folder = find_checkpoint(run_or_checkpoint, _VERIFIED_FIRST)
    state = checkpoint.read_state(folder)
    config = config_from_dict(state.config, where=folder)
    vocabulary = Vocabulary.from_json(state.vocabulary)
    origin = Origin.from_json(state.origin)
    family, native = family_for(config.model, state.origin), NativeTensors(folder)
    for name, codec in config.tokenizers.items():
        if not codec.is_dir():
            raise UserError(f"tokenizers.{name}: no such folder", where=codec, remedy="restore the run's codec there")
    if verification.needs_models:
        equivalence.check_memory_for_logits(config, vocabulary.size)
    if verification.refuse_nan:
        equivalence.refuse_not_finite(native)
    rows = vocabulary.size if trim_vocabulary else native.table_rows
    plan = plan_export(folder, family.rules, config.model, rows, dtype, shard_size)
    log_plan(plan, plan.dtypes)
    media = [codec for name, codec in config.tokenizers.items() if name != "text"]
    codec_bytes = sum(f.stat().st_size for codec in media for f in codec.rglob("*") if f.is_file())
    with ConversionJob(plan, out, nproc, more=codec_bytes) as job:
        _write_weights(job, folder)
        if len(plan.files) > 1:
            files.write(job.folder / INDEX, [plan.index()])
        _write_config_and_codecs(job.folder, family, config, vocabulary, origin, rows, plan.dtypes[-1][1])
        # Last, because they describe the files before them: the card, then the digests of all files.
        metadata = metadata_of(state, card.record(folder, state, config))
        (job.folder / METADATA).write_text(json.dumps(metadata, indent=1))
        card.copy_attribution(state, config, job.folder)
        card.write_card(job.folder, metadata)
        equivalence.verify_result(folder, job.folder, job.folder, verification, nproc)
        job.publish()
    return out


def _write_weights(job: ConversionJob, source: Path) -> None:
    """Write the weights of a checkpoint, then verify its digests: after, so that it is read from disk only once.

    The files made from a damaged checkpoint are removed; its damage is reported instead of errors that follow from it.
    """
    failed: UserError | None = None
    try:
        job.fill()
    except UserError as error:
        failed = error
    try:
        checkpoint.verify(source)
    except UserError:
        files.remove_tree(job.temporary)
        raise
    if failed is not None:
        raise failed


def _write_config_and_codecs(
    folder: Path,
    family: Family,
    config: RunConfig,
    vocabulary: Vocabulary,
    origin: Origin | None,
    rows: int,
    dtype: torch.dtype,
) -> None:
    """Write config.json, generation_config.json, the tokenizer and the codecs. rows: of the vocabulary's tables."""
    template = origin.chat_template if origin is not None else None
    if vocabulary.has_control:
        export_tokenizer(config.tokenizers["text"], vocabulary, folder, template)
        special = special_ids(vocabulary, origin)
    else:  # imported from a plain folder
        special = copy_tokenizer(config.tokenizers["text"], folder, vocabulary.size, template)
        special = plain_ids(origin, special, rows) if origin is not None else special
    theirs = to_config(family, config.model, rows, config.data.seq_length, special, origin.config if origin else None)
    theirs.dtype = dtype
    theirs.save_pretrained(folder)
    # As it is: transformers' own class refuses to write settings that published files have.
    settings = generation_settings(origin, vocabulary, special)
    (folder / GENERATION).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for name, codec in config.tokenizers.items():
        shutil.copytree(codec, folder / "codecs" / name, ignore=_NO_MODEL if name == "text" else None)


@dataclass(frozen=True)
class ExportedGroup:
    """A group, the shape read for it, and the tensors that it is split into: name, dtype, shape."""

    group: TensorGroup
    shape: Shape
    stored_as: torch.dtype
    tensors: tuple[tuple[str, torch.dtype, Shape], ...]

    @property
    def size(self) -> int:
        return sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in self.tensors)

    def parts(self) -> Iterator[FilePart]:
        """The whole group as one part of the file; a table as several, by rows."""
        _, dtype, _ = self.tensors[0]
        if self.group.rule is not None:
            yield FilePart(self.size, _Rows(self, None))
            return
        row = torch.Size(self.shape[1:]).numel()
        for rows in row_windows(self.shape[0], row * self.stored_as.itemsize):
            yield FilePart(len(rows) * row * dtype.itemsize, _Rows(self, rows))


@dataclass(frozen=True)
class _Rows:
    """Rows of a group's only tensor; None: the whole group."""

    unit: ExportedGroup
    rows: range | None


@dataclass(frozen=True)
class ExportPlan:
    """The export as a plan.Conversion. tensors: the tensors folder of a checkpoint."""

    tensors: Path
    model: ModelConfig
    files: Mapping[str, Sequence[FilePart]]
    file_of: Mapping[str, str]
    """The file of each tensor."""
    dtypes: tuple[DtypeChange, ...]
    identity: str
    name: str = "export"

    @contextmanager
    def opened(self) -> Iterator[Maker]:
        with closing(TensorReader(self.tensors)) as reader:
            yield _ExportMaker(reader, self.model)

    def index(self) -> bytes:
        """The content of model.safetensors.index.json; total_size counts tensors only, so no header."""
        size = sum(part.size for parts in self.files.values() for part in parts[1:])
        return json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(self.file_of.items()))}).encode()


@dataclass(frozen=True)
class _ExportMaker:
    reader: TensorReader
    model: ModelConfig

    def __call__(self, source: bytes | _Rows) -> Iterable[bytes | memoryview]:
        if isinstance(source, bytes):  # a file's header
            yield source
            return
        unit, group = source.unit, source.unit.group
        shape = unit.shape if source.rows is None else (len(source.rows), *unit.shape[1:])
        first = (0 if source.rows is None else source.rows.start, *[0] * (len(shape) - 1))
        ours = torch.empty(shape, dtype=unit.stored_as)
        # In the stored tensor the group is at group.index of the leading axes (layer, expert), one element wide there.
        whole, ones = self.reader.stored[group.ours].shape, (1,) * len(group.index)
        self.reader.read(TensorShard(group.ours, whole, (*group.index, *first), (*ones, *shape), ours))
        parts = [ours] if group.rule is None else group.rule.cut(ours, self.model)
        for part, (name, dtype, _) in zip(parts, unit.tensors, strict=True):
            yield from dtypes.bytes_as(part, dtype, name)


def plan_export(
    step: Path,
    rules: tuple[TensorRule, ...],
    m: ModelConfig,
    rows: int,
    dtype: torch.dtype | None,
    shard_size: int,
) -> ExportPlan:
    """Plan the export of a checkpoint's folder. rows: of the vocabulary's tables in the export.

    Raises UserError for missing tensors, or ones the family lacks."""
    stored = {name: found for name, found in index.read(step / "tensors").items() if not name.startswith("optimizer.")}
    if dropped := [name for name in stored if name.startswith(mapping.PREDICTION)]:
        log.info("export: without the modules of multi-token prediction (%d tensors)", len(dropped))
        stored = {name: found for name, found in stored.items() if name not in dropped}
    groups = list(mapping.groups(rules, m))
    _check_names(stored.keys(), {group.ours for group in groups}, step)
    units = [_exported_group(group, stored[group.ours], m, rows, dtype) for group in groups]
    layout = _layout(units, shard_size)
    changes = tuple((unit.stored_as, written) for unit in units for _, written, _ in unit.tensors)
    return ExportPlan(step / "tensors", m, layout.files, layout.file_of, changes, _identity(step, layout.files))


def _check_names(stored: Iterable[str], needed: set[str], step: Path) -> None:
    """Raise UserError unless the checkpoint holds exactly the tensors that the family's rules read."""
    found = set(stored)
    for wrong, what in ((needed - found, "missing in the checkpoint"), (found - needed, "unknown to the family")):
        if wrong:
            raise UserError(f"tensors {what}: {', '.join(sorted(wrong))}", where=step, remedy="use another checkpoint")


def _exported_group(
    group: TensorGroup, stored: StoredTensor, m: ModelConfig, rows: int, dtype: torch.dtype | None
) -> ExportedGroup:
    """Compute what a group is split into, by splitting a tensor without values."""
    shape = stored.shape[len(group.index) :]
    if group.ours in (mapping.EMBEDDING, mapping.HEAD):  # without the padding of a parallel layout
        shape = (rows, *shape[1:])
    ours = torch.empty(shape, dtype=stored.dtype, device="meta")
    parts = [ours] if group.rule is None else group.rule.cut(ours, m)
    written = dtypes.target_of(stored.dtype, dtype)
    tensors = zip(group.theirs, parts, strict=True)
    return ExportedGroup(
        group, shape, stored.dtype, tuple((name, written, tuple(part.shape)) for name, part in tensors)
    )


@dataclass(frozen=True)
class _Layout:
    files: dict[str, list[FilePart]]
    file_of: dict[str, str]


def _layout(units: Sequence[ExportedGroup], shard_size: int) -> _Layout:
    """Distribute the groups over files. The first part of each file is its header."""
    shards = pack_into_files(units, lambda unit: unit.size, shard_size)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    layout = _Layout({}, {})
    for name, shard in zip(names if len(shards) > 1 else [WEIGHTS], shards, strict=True):
        # sorted() is stable: the order of the layers is kept among tensors of one dtype.
        ordered = sorted(shard, key=lambda unit: -unit.tensors[0][1].itemsize)
        tensors = [tensor for unit in ordered for tensor in unit.tensors]
        head = header(tensors)
        layout.files[name] = [FilePart(len(head), head), *(part for unit in ordered for part in unit.parts())]
        layout.file_of.update((tensor, name) for tensor, _, _ in tensors)
    return layout


def _identity(step: Path, planned: Mapping[str, Sequence[FilePart]]) -> str:
    """An identity of the input (its manifest holds the digest of every file) and of the output (the headers)."""
    source = hashlib.sha256((step / manifest.NAME).read_bytes()).hexdigest()
    # A damaged file that is repaired while a killed conversion waits has the same size and digest, but another ctime.
    changed = max(file.stat().st_ctime_ns for file in (step / "tensors").iterdir())
    headers = hashlib.sha256(b"".join(parts[0].source for parts in planned.values())).hexdigest()
    return f"{source} {changed} {headers}"
