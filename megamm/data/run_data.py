"""All the data of a run, opened and checked before any step: vocabulary, training rows, held-out rows.

Also run by `--dry-run` and by the launcher, so that a missing or damaged shard costs no process start.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megamm.config import RunConfig
from megamm.data.mixture import Mixture, Source
from megamm.data.packing import Form, Forms, document_length, pack, plan_rows
from megamm.data.row_stream import RowStream
from megamm.data.sample import Batch, Document, Row
from megamm.data.sample_set import SampleSet
from megamm.errors import UserError
from megamm.modalities import REGISTRY, families
from megamm.modalities.base import CPU, Modality
from megamm.model.vocabulary import Vocabulary

HELDOUT_ROWS = 64
"""At most so many held-out rows are read at an evaluation during training."""


@dataclass
class RunData:
    """What `open_run_data` gives; heldout_rows are packed from whole held-out documents in order."""

    vocabulary: Vocabulary
    modalities: dict[str, Modality]
    stream: RowStream
    heldout_rows: list[Row]

    def heldout_steps(self, config: RunConfig, data_rank: int, data_size: int) -> Iterator[list[Batch]]:
        """This data rank's microbatches of every evaluation step; the same rows at every layout, each once."""
        # A pipeline is filled by as many microbatches as it has stages.
        micro, microbatches = config.train.micro_batch, config.parallel.pipeline
        empty = pack([], self.vocabulary, config.data.seq_length, forms_of(self.modalities))
        for first in range(0, len(self.heldout_rows), micro * microbatches * data_size):
            starts = [first + (i * data_size + data_rank) * micro for i in range(microbatches)]
            parts = [self.heldout_rows[start : start + micro] for start in starts]
            # A rank without a row left takes part with padding, which counts nothing.
            yield [Batch.stack(part + [empty] * (micro - len(part))) for part in parts]


def load_modalities(tokenizers: dict[str, Path], device: torch.device = CPU) -> dict[str, Modality]:
    """The modalities of the configured codecs, on `device`, in the registry's order. UserError for an unknown codec."""
    for family in tokenizers:
        if family not in families():
            raise UserError(f"tokenizers.{family}: no such codec", remedy=f"the codecs are {', '.join(families())}")
    return {name: m.load(tokenizers[m.family], device) for name, m in REGISTRY.items() if m.family in tokenizers}


def vocabulary_of(modalities: dict[str, Modality]) -> Vocabulary:
    """The one vocabulary over these codecs."""
    return Vocabulary.of({name: (m.vocabulary_size, m.codec_id) for name, m in modalities.items()})


def forms_of(modalities: dict[str, Modality]) -> Forms:
    """What packing has to know of each modality's parts."""
    return {name: Form(m.positions, m.tokens_per_item is not None) for name, m in modalities.items()}


def source_names(paths: list[Path]) -> list[str]:
    """Short names that tell the sources apart: last parts of their paths, so that moved data keeps its order."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def open_run_data(config: RunConfig) -> RunData:
    """Open codecs and shards of the config. UserError names what is missing, damaged or does not fit."""
    modalities = load_modalities(config.tokenizers)
    for name in config.loss_weights:
        if name not in modalities:
            raise UserError(
                f"loss_weights.{name} has no tokenizer", remedy=f"the modalities are {', '.join(modalities)}"
            )
    vocabulary, forms = vocabulary_of(modalities), forms_of(modalities)
    codec_ids = {name: modality.codec_id for name, modality in modalities.items()}
    sets = [SampleSet(source.path / "train", codec_ids, source.documents) for source in config.data.sources]
    names = source_names([source.path for source in config.data.sources])
    sources = [
        Source(name, source.weight, len(samples))
        for name, source, samples in zip(names, config.data.sources, sets, strict=True)
    ]
    mixture = Mixture(sources, config.train.seed)
    stream = RowStream(sets, mixture, vocabulary, config.data.seq_length, forms)
    heldout = [SampleSet(source.path / "heldout", codec_ids, source.documents) for source in config.data.sources]
    return RunData(vocabulary, modalities, stream, _heldout_rows(heldout, vocabulary, config, forms))


def _heldout_rows(sets: list[SampleSet], vocabulary: Vocabulary, config: RunConfig, forms: Forms) -> list[Row]:
    """Rows of the first held-out documents of all sources in turn, as many as are evaluated."""
    length = config.data.seq_length
    turns = [(d for i in np.flatnonzero(s.needed <= length).tolist() for d in s.documents(i, length)) for s in sets]
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
