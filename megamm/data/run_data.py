"""All the data of a run, opened and checked before any step: vocabulary, training rows, held-out rows.

Also run by `--dry-run` and by the launcher, so that a missing or damaged shard costs no process start.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megamm.config import RunConfig
from megamm.data.loader import RowStream, SampleSet, heldout_documents
from megamm.data.mixture import Mixture, Source
from megamm.data.packing import Positions, pack, plan_rows
from megamm.data.sample import Batch, Row
from megamm.errors import UserError
from megamm.modalities import REGISTRY
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
        empty = pack([], self.vocabulary, config.data.seq_length, positions_of(self.modalities))
        for first in range(0, len(self.heldout_rows), micro * microbatches * data_size):
            starts = [first + (i * data_size + data_rank) * micro for i in range(microbatches)]
            parts = [self.heldout_rows[start : start + micro] for start in starts]
            # A rank without a row left takes part with padding, which counts nothing.
            yield [Batch.stack(part + [empty] * (micro - len(part))) for part in parts]


def load_modalities(tokenizers: dict[str, Path], device: torch.device = CPU) -> dict[str, Modality]:
    """Codec of each configured modality on `device`, text first. UserError for a name that is not in the registry."""
    for name in tokenizers:
        if name not in REGISTRY:
            raise UserError(
                f"tokenizers.{name}: no such modality", remedy=f"the modalities are {', '.join(sorted(REGISTRY))}"
            )
    return {name: REGISTRY[name].load(tokenizers[name], device) for name in REGISTRY if name in tokenizers}


def vocabulary_of(modalities: dict[str, Modality]) -> Vocabulary:
    """The one vocabulary over these codecs."""
    return Vocabulary.of({name: (m.vocabulary_size, m.codec_id) for name, m in modalities.items()})


def positions_of(modalities: dict[str, Modality]) -> Positions:
    return {name: modality.positions for name, modality in modalities.items()}


def source_names(paths: list[Path]) -> list[str]:
    """Short names that tell the sources apart: last parts of their paths, so that moved data keeps its order."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def open_run_data(config: RunConfig) -> RunData:
    """Open codecs and shards of the config. UserError names what is missing, damaged or does not fit."""
    for name in config.loss_weights:
        if name not in config.tokenizers:
            raise UserError(f"loss_weights.{name} has no tokenizer", remedy="name modalities of `tokenizers`")
    modalities = load_modalities(config.tokenizers)
    vocabulary, positions = vocabulary_of(modalities), positions_of(modalities)
    codec_ids = {name: modality.codec_id for name, modality in modalities.items()}
    sets = [SampleSet(source.path / "train", codec_ids) for source in config.data.sources]
    names = source_names([source.path for source in config.data.sources])
    sources = [
        Source(name, source.weight, len(samples))
        for name, source, samples in zip(names, config.data.sources, sets, strict=True)
    ]
    mixture = Mixture(sources, config.train.seed)
    stream = RowStream(sets, mixture, vocabulary, config.data.seq_length, positions)
    heldout = [SampleSet(source.path / "heldout", codec_ids) for source in config.data.sources]
    return RunData(vocabulary, modalities, stream, _heldout_rows(heldout, vocabulary, config, positions))


def _heldout_rows(sets: list[SampleSet], vocabulary: Vocabulary, config: RunConfig, positions: Positions) -> list[Row]:
    """Rows of the first held-out documents of all sources in turn, as many as are evaluated."""
    length = config.data.seq_length
    turns = [heldout_documents(samples) for samples in sets]
    documents, tokens = [], 0
    while turns and tokens < HELDOUT_ROWS * length:
        for turn in list(turns):
            document = next(turn, None)
            if document is None:
                turns.remove(turn)
            else:
                one = pack([document], vocabulary, length, positions)
                documents.append((document, int((one.segment >= 0).sum())))
                tokens += documents[-1][1]
    rows = plan_rows(np.array([size for _, size in documents], dtype=np.int64), length)
    return [pack([documents[i][0] for i in row], vocabulary, length, positions) for row in rows[:HELDOUT_ROWS]]
