"""Opens and checks all data of a run before any step: vocabulary, training rows, held-out rows.

    data = open_run_data(config)
    data.stream, data.heldout_steps(...)            # for training and evaluation
    recorded = data.to_json(consumed_rows)          # the mixture schedule, into a checkpoint
    change = data.resume(recorded, consumed_rows)   # out of it

`--dry-run` and the launcher also open the data, so that a missing or damaged shard is found before processes start.

The mixture schedule is what a run has been trained on: which sources with which weights from which shuffle block on. If
the config of a resumed run has other sources or weights, they take effect at the first block of which nothing has been
consumed; the block in progress is finished as planned. The document count of each source continues, so that no document
is lost or repeated in its epoch. The order is a pure function of seed and schedule, independent of world size and
readers.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamm.common.errors import UserError
from megamm.common.sample import Batch, IntArray, Row
from megamm.common.urls import url_of
from megamm.config import RunConfig, SourceConfig
from megamm.config.sections import CacheConfig
from megamm.data.pipeline.bin_dataset import BinDataset, BinDocument, DocumentDataset, Split, open_split
from megamm.data.pipeline.fetch_ahead import fetch_rows
from megamm.data.pipeline.mixture import Mixture, MixtureSource, source_names
from megamm.data.pipeline.packing import PackingSpec, PackingSpecs, pack, plan_rows
from megamm.data.pipeline.row_stream import BlockStart, RowReader, RowSpec, RowStream, used_samples
from megamm.data.pipeline.token_dataset import DocumentSpec, LongDocuments, LongSamples
from megamm.modalities import REGISTRY, tokenizer_names
from megamm.modalities.protocol import CPU, Modality
from megamm.model.vocabulary import Vocabulary
from megamm.shards.shard_cache import CacheOptions, ShardCache, cache_of

HELDOUT_ROWS = 64
"""Maximum number of held-out rows read at an evaluation during training."""


@dataclass(frozen=True)
class OpenSource:
    """A source of the config with its opened training split."""

    path: Path
    weight: float
    dataset: DocumentDataset


@dataclass(frozen=True)
class StreamOptions:
    """Everything besides the mixture that determines the rows."""

    seed: int
    row_length: int
    vocabulary: Vocabulary
    packing: PackingSpecs


@dataclass(frozen=True)
class MixtureChange:
    """A change of the mixture from row `row` on, as text."""

    row: int
    what: str


@dataclass
class RunData:
    """The result of `open_run_data`; heldout_rows are packed from whole held-out documents in order."""

    vocabulary: Vocabulary
    modalities: dict[str, Modality]
    stream: RowStream
    heldout_rows: list[Row]
    sources: list[OpenSource]
    options: StreamOptions
    long_documents: LongDocuments = "auto"
    long_samples: Sequence[LongSamples] = ()
    """Of each split of each source, what becomes of the samples that are longer than a row."""
    resumed: dict[str, Any] | None = None
    """The schedule that the run resumed from."""
    cache: ShardCache | None = None
    """The cache of shards at a URL, if a source is there."""

    def resume(self, recorded: dict[str, Any], consumed_rows: int) -> MixtureChange | None:
        """Resume the recorded schedule, changed where the config differs. Raises UserError as `resume_stream` does."""

        def open_removed(source: SourceConfig) -> DocumentDataset:
            return open_split(source, "train", self.modalities, self.long_documents, self.cache)

        self.resumed = recorded
        self.stream, change = resume_stream(self.sources, self.options, recorded, consumed_rows, open_removed)
        return change

    def to_json(self, consumed_rows: int) -> dict[str, Any]:
        """The mixture schedule, for a checkpoint."""
        return schedule_to_json(self.stream, consumed_rows, self.resumed)

    def heldout_steps(self, config: RunConfig, data_rank: int, data_size: int) -> Iterator[list[Batch]]:
        """This data rank's microbatches of each evaluation step; together the same rows at every layout, each once."""
        # A pipeline needs as many microbatches as it has stages.
        micro, microbatches = config.train.micro_batch_size, config.parallel.pipeline
        empty = pack([], self.vocabulary, config.data.seq_length, self.options.packing)
        for first in range(0, len(self.heldout_rows), micro * microbatches * data_size):
            starts = [first + (i * data_size + data_rank) * micro for i in range(microbatches)]
            parts = [self.heldout_rows[start : start + micro] for start in starts]
            # A rank without rows takes part with padding, which does not count.
            yield [Batch.stack(part + [empty] * (micro - len(part))) for part in parts]


def load_modalities(tokenizers: dict[str, Path], device: torch.device = CPU) -> dict[str, Modality]:
    """Load the modalities of the configured tokenizers, in the registry's order. UserError for an unknown one."""
    for name in tokenizers:
        if name not in tokenizer_names():
            remedy = f"the tokenizers are {', '.join(tokenizer_names())}"
            raise UserError(f"tokenizers.{name}: no such tokenizer", remedy=remedy)
    chosen = {name: m for name, m in REGISTRY.items() if m.tokenizer_name in tokenizers}
    return {name: m.load(tokenizers[m.tokenizer_name], device) for name, m in chosen.items()}


def vocabulary_of(modalities: dict[str, Modality]) -> Vocabulary:
    """The vocabulary over these codecs."""
    return Vocabulary.of({name: (m.vocabulary_size, m.codec_id) for name, m in modalities.items()})


@dataclass(frozen=True)
class PositionTable:
    """Positions `[3, length]` for every length up to that of `longest`, for data workers, which have no codec.

    A part's first positions do not depend on its length, since the length of a generated part is not known yet.
    """

    longest: IntArray

    def __call__(self, length: int) -> IntArray:
        return self.longest[:, :length]


def packing_specs(modalities: dict[str, Modality], row_length: int, spans: Collection[str]) -> PackingSpecs:
    """How each modality's parts are packed into rows of that many tokens. spans: those whose parts are spans."""
    return {
        name: PackingSpec(
            PositionTable(m.positions(m.tokens_per_item or row_length - row_length % m.stride)),
            m.tokens_per_item is not None,
            name in spans,
        )
        for name, m in modalities.items()
    }


def open_run_data(config: RunConfig) -> RunData:
    """Open the codecs and shards of the config. Raises UserError for missing, damaged or mismatched data."""
    modalities = load_modalities(config.tokenizers)
    for key, names in (("loss_weights", config.loss_weights), ("modalities", config.modalities)):
        for name in names:
            if name not in modalities:
                remedy = f"the modalities are {', '.join(modalities)}"
                raise UserError(f"{key}.{name} has no tokenizer", remedy=remedy)
    vocabulary = vocabulary_of(modalities)
    packing = packing_specs(modalities, config.data.seq_length, config.spans)

    is_remote = any(url_of(source.path) for source in config.data.sources)
    cache = open_cache(config.data.cache) if is_remote else None

    def opened(source: SourceConfig, split: Split) -> DocumentDataset:
        return open_split(source, split, modalities, config.data.long_documents, cache)

    sources = [OpenSource(source.path, source.weight, opened(source, "train")) for source in config.data.sources]
    options = StreamOptions(config.train.seed, config.data.seq_length, vocabulary, packing)
    heldout = [opened(source, "heldout") for source in config.data.sources]
    splits = [split for source, other in zip(sources, heldout, strict=True) for split in (source.dataset, other)]
    long_samples = [split.long_samples(config.data.seq_length) for split in splits]
    rows = _heldout_rows(heldout, vocabulary, config, packing, cache)
    stream = begin_stream(sources, options)
    long_documents = config.data.long_documents
    return RunData(vocabulary, modalities, stream, rows, sources, options, long_documents, long_samples, cache=cache)


def open_cache(config: CacheConfig) -> ShardCache:
    """This node's cache of shards at a URL. Raises UserError if its folder cannot be used."""
    return cache_of(CacheOptions(str(config.folder.expanduser().absolute()), int(config.gb * 1e9), config.patience))


def _heldout_rows(
    datasets: list[DocumentDataset],
    vocabulary: Vocabulary,
    config: RunConfig,
    packing: PackingSpecs,
    cache: ShardCache | None,
) -> list[Row]:
    """Rows of the first held-out documents, from all sources in turn, as many as are evaluated."""
    length = config.data.seq_length
    plans = [_usable_documents(dataset, length) for dataset in datasets]
    documents: list[DocumentSpec | BinDocument] = []
    tokens = 0
    while plans and tokens < HELDOUT_ROWS * length:
        for plan in list(plans):  # one document of each, so that a few rows represent all sources
            document = next(plan, None)
            if document is None:
                plans.remove(plan)
            else:
                documents.append(document)
                tokens += document.length
    rows = plan_rows(np.array([document.length for document in documents], dtype=np.int64), length)
    specs = [RowSpec(tuple(documents[i] for i in row)) for row in rows[:HELDOUT_ROWS]]
    if cache is not None:
        fetch_rows(cache, specs)
    reader = RowReader(vocabulary, length, packing)
    return [reader.row(spec) for spec in specs]


def _usable_documents(dataset: DocumentDataset, length: int) -> Iterator[DocumentSpec | BinDocument]:
    """The documents of all samples that fit into rows of this length, in order."""
    for i in dataset.used(length):
        yield from dataset.evaluated(i, length)


def begin_stream(sources: Sequence[OpenSource], options: StreamOptions) -> RowStream:
    """The rows of a new run."""
    names = source_names([s.path for s in sources])
    mixture = Mixture(_in_mixture(names, sources, options.row_length), options.seed)
    return RowStream([s.dataset for s in sources], mixture, options.vocabulary, options.row_length, options.packing)


def schedule_to_json(stream: RowStream, consumed_rows: int, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """The mixture schedule after `consumed_rows`, for a checkpoint; earlier: that of the checkpoint resumed from.

    "window" is the shuffle block in progress, "first_row" its first row; "segments" are the changes of the mixture.
    """
    entries = dict(earlier["sources"]) if earlier else {}
    for source, dataset in zip(stream.mixture.sources, stream.datasets, strict=True):
        if dataset is not None:  # otherwise a removed source, which `earlier` has
            path = str(dataset.source)
            entry = {"documents": source.documents, "shards": source.shards, "path": path, "kind": dataset.kind}
            entries[source.name] = entry | (dataset.options if isinstance(dataset, BinDataset) else {})
    start = stream.block_start(consumed_rows)
    return {
        "window": start.block,
        "first_row": start.row,
        "sources": entries,
        "segments": [
            {"window": segment.block, "weights": {s.name: s.weight for s in segment.sources}}
            for segment in stream.mixture.segments
        ],
    }


def resume_stream(
    sources: Sequence[OpenSource],
    options: StreamOptions,
    recorded: dict[str, Any],
    consumed_rows: int,
    open_removed: Callable[[SourceConfig], DocumentDataset],
) -> tuple[RowStream, MixtureChange | None]:
    """The rows of a run that resumes after `consumed_rows`, with the change of its mixture if the config has one.

    Raises UserError if a source's shards have changed, or a removed source is still needed and missing.
    """
    names = _recorded_names([s.path for s in sources], recorded)
    digests = {name: entry["shards"] for name, entry in recorded["sources"].items()}
    now = _in_mixture(names, sources, options.row_length, digests)
    mixture = before = _recorded_mixture(recorded, options.seed)
    start = BlockStart(recorded["window"], recorded["first_row"])
    # A block of which a row has been consumed is finished as planned.
    change_at = start.block + (consumed_rows > start.row)
    if before.has_shares_of(now):
        before.require_same(now)
    else:
        mixture = before.then(change_at, now)
    datasets = {name: source.dataset for name, source in zip(names, sources, strict=True)}
    # The block in progress may still have documents of a source that the config no longer has.
    for source, documents in zip(mixture.sources, mixture.counts_in(start.block), strict=True):
        if documents and source.name not in datasets:
            datasets[source.name] = _open_removed(
                source, recorded["sources"][source.name], options.row_length, open_removed
            )
    ordered = [datasets.get(source.name) for source in mixture.sources]
    stream = RowStream(ordered, mixture, options.vocabulary, options.row_length, options.packing, start)
    if mixture is before:
        return stream, None
    return stream, MixtureChange(stream.first_row(change_at), _in_words(before.segments[-1].sources, now))


def _open_removed(
    source: MixtureSource,
    entry: dict[str, Any],
    row_length: int,
    open_removed: Callable[[SourceConfig], DocumentDataset],
) -> DocumentDataset:
    """Open a source no longer in the config, for the rest of the block in progress."""
    try:
        path = Path(entry["path"])
        options = {key: entry[key] for key in ("heldout", "end_token") if key in entry}
        dataset = open_removed(SourceConfig(path=path, documents=entry["kind"], **options))
        now = _in_mixture([source.name], [OpenSource(path, 1.0, dataset)], row_length, {source.name: source.shards})
        Mixture([source], 0).require_same(now)
    except UserError as error:
        what = f"source {source.name!r} was removed from the config, but the current block of rows still needs it: "
        remedy = "restore its shards until the run has written the first checkpoint after the change"
        raise UserError(what + error.what, where=error.where or entry["path"], remedy=remedy) from None
    return dataset


def _recorded_mixture(recorded: dict[str, Any], seed: int) -> Mixture:
    def sources(weights: dict[str, float]) -> list[MixtureSource]:
        entries = recorded["sources"]
        return [MixtureSource(n, w, entries[n]["documents"], entries[n]["shards"]) for n, w in weights.items()]

    first, *others = recorded["segments"]
    mixture = Mixture(sources(first["weights"]), seed)
    for segment in others:
        mixture = mixture.then(segment["window"], sources(segment["weights"]))
    return mixture


def _in_mixture(
    names: Sequence[str], sources: Sequence[OpenSource], row_length: int, recorded: Mapping[str, str] = {}
) -> list[MixtureSource]:
    """The sources with the number of their samples that are used. Raises UserError for one without any.

    recorded: the digests in a checkpoint, by name; those of the sources are then of the same version.
    """
    counts = [len(used_samples(s.dataset, row_length)) for s in sources]
    digests = [
        s.dataset.digest_like(recorded[name]) if name in recorded else s.dataset.digest
        for name, s in zip(names, sources, strict=True)
    ]
    return [
        MixtureSource(name, s.weight, count, digest)
        for name, s, count, digest in zip(names, sources, counts, digests, strict=True)
    ]


def _recorded_names(paths: Sequence[Path], recorded: dict[str, Any]) -> list[str]:
    """Names of the config's sources: a recorded name if the path or its end is the same, otherwise a new one.

    The order of documents depends on the names: a source keeps its own if it is moved, or another one is added.
    """
    by_path = {Path(entry["path"]): name for name, entry in recorded["sources"].items()}
    # First the same path, then the end of a moved one, then new names: the shortest end of the path that is free.
    names: dict[Path, str] = {path: by_path[path] for path in paths if path in by_path}
    for path in (path for path in paths if path not in names):
        matching = [
            n for n in recorded["sources"] if f"/{path.as_posix()}".endswith(f"/{n}") and n not in names.values()
        ]
        if matching:
            names[path] = max(matching, key=len)
    for path in (path for path in paths if path not in names):
        depths = range(1, len(path.parts) + 1)
        taken = {*names.values(), *recorded["sources"]}
        new = ["/".join(path.parts[-depth:]) for depth in depths]
        names[path] = next((name for name in new if name not in taken), new[-1])
    return [names[path] for path in paths]


def _in_words(before: Sequence[MixtureSource], now: Sequence[MixtureSource]) -> str:
    """ "emoji 0.7 -> 0.5, clipart removed, sprites 0.5 (new)", as shares of the documents."""
    old, new = ({s.name: s.weight / sum(x.weight for x in sources) for s in sources} for sources in (before, now))
    words = [f"{n} {old[n]:.3g} -> {new[n]:.3g}" if n in new else f"{n} removed" for n in old]
    return ", ".join(words + [f"{n} {share:.3g} (new)" for n, share in new.items() if n not in old])
