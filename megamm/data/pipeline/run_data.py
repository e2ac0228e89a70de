"""Opens and checks all data of a run before any step: vocabulary, training rows, held-out rows.

`--dry-run` and the launcher also run it, so that a missing or damaged shard is found before processes start.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamm.common.errors import UserError
from megamm.common.sample import Batch, Document, IntArray, Row
from megamm.config import RunConfig
from megamm.data.pipeline import mixture_schedule
from megamm.data.pipeline.mixture_schedule import Change, OpenSource, Order
from megamm.data.pipeline.packing import Form, Forms, document_length, pack, plan_rows
from megamm.data.pipeline.row_stream import RowStream
from megamm.data.pipeline.token_dataset import DocumentKind, SampleSet
from megamm.modalities import REGISTRY, tokenizer_names
from megamm.modalities.protocol import CPU, Modality
from megamm.model.vocabulary import Vocabulary

HELDOUT_ROWS = 64
"""Maximum number of held-out rows read at an evaluation during training."""


@dataclass
class RunData:
    """The result of `open_run_data`; heldout_rows are packed from whole held-out documents in order."""

    vocabulary: Vocabulary
    modalities: dict[str, Modality]
    stream: RowStream
    heldout_rows: list[Row]
    sources: list[OpenSource]
    order: Order
    resumed: dict[str, Any] | None = None
    """The history that the run resumed from."""

    def resume(self, recorded: dict[str, Any], consumed_rows: int) -> Change | None:
        """Resume the recorded mixture, changed where the config differs. Raises UserError as `history.resume` does."""
        codec_ids = {name: modality.codec_id for name, modality in self.modalities.items()}

        def open_removed(path: Path, kind: DocumentKind) -> SampleSet:
            return SampleSet(path / "train", codec_ids, kind)

        self.resumed = recorded
        self.stream, change = mixture_schedule.resume(self.sources, self.order, recorded, consumed_rows, open_removed)
        return change

    def to_json(self, consumed_rows: int) -> dict[str, Any]:
        """The history of the mixture, for a checkpoint."""
        return mixture_schedule.to_json(self.stream, consumed_rows, self.resumed)

    def heldout_steps(self, config: RunConfig, data_rank: int, data_size: int) -> Iterator[list[Batch]]:
        """This data rank's microbatches of each evaluation step; together the same rows at every layout, each once."""
        # A pipeline needs as many microbatches as it has stages.
        micro, microbatches = config.train.micro_batch_size, config.parallel.pipeline
        empty = pack([], self.vocabulary, config.data.seq_length, forms_of(self.modalities, config.data.seq_length))
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


def forms_of(modalities: dict[str, Modality], row_length: int) -> Forms:
    """The properties of each modality's parts that packing into rows of that many tokens needs."""
    return {
        name: Form(
            PositionTable(m.positions(m.tokens_per_item or row_length - row_length % m.stride)),
            m.tokens_per_item is not None,
        )
        for name, m in modalities.items()
    }


def open_run_data(config: RunConfig) -> RunData:
    """Open the codecs and shards of the config. Raises UserError for missing, damaged or mismatched data."""
    modalities = load_modalities(config.tokenizers)
    for name in config.loss_weights:
        if name not in modalities:
            raise UserError(
                f"loss_weights.{name} has no tokenizer", remedy=f"the modalities are {', '.join(modalities)}"
            )
    vocabulary, forms = vocabulary_of(modalities), forms_of(modalities, config.data.seq_length)
    codec_ids = {name: modality.codec_id for name, modality in modalities.items()}
    sources = [
        OpenSource(source.path, source.weight, SampleSet(source.path / "train", codec_ids, source.documents))
        for source in config.data.sources
    ]
    order = Order(config.train.seed, config.data.seq_length, vocabulary, forms)
    heldout = [SampleSet(source.path / "heldout", codec_ids, source.documents) for source in config.data.sources]
    rows = _heldout_rows(heldout, vocabulary, config, forms)
    return RunData(vocabulary, modalities, mixture_schedule.begin(sources, order), rows, sources, order)


def _heldout_rows(sets: list[SampleSet], vocabulary: Vocabulary, config: RunConfig, forms: Forms) -> list[Row]:
    """Rows of the first held-out documents, from all sources in turn, as many as are evaluated."""
    length = config.data.seq_length
    turns = [_usable_documents(samples, length) for samples in sets]
    documents: list[Document] = []
    sizes: list[int] = []
    while turns and sum(sizes) < HELDOUT_ROWS * length:
        for turn in list(turns):
            document = next(turn, None)
            if document is None:
                turns.remove(turn)
            else:
                documents.append(document)
                sizes.append(document_length(*document.sizes))
    rows = plan_rows(np.array(sizes, dtype=np.int64), length)
    return [pack([documents[i] for i in row], vocabulary, length, forms) for row in rows[:HELDOUT_ROWS]]


def _usable_documents(samples: SampleSet, length: int) -> Iterator[Document]:
    """The documents of all samples that fit into rows of this length, in order."""
    for i in np.flatnonzero(samples.needed <= length).tolist():
        yield from samples.documents(i, length)
