"""An export as the subject of an evaluation: scores and generation by standard transformers."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megamm.common.errors import UserError
from megamm.common.sample import IGNORE_LABEL, Batch, Document, FloatArray, Row
from megamm.config import RunConfig
from megamm.config.suite import SamplingConfig
from megamm.convert.extras.card import CARD
from megamm.convert.io.export_folder import DIGESTS, LoadedExport
from megamm.convert.io.span_masks import attention_mask
from megamm.data.pipeline.packing import document_length
from megamm.evaluation.subject import Prompt
from megamm.inference.generate import Sampling, generate_from
from megamm.modalities.protocol import Modality
from megamm.model.vocabulary import Vocabulary

LOGITS, LOGITS_CPU = 2**25, 2**22
"""Logits computed at a time (128 and 16 MiB in float32): determines the number of documents per batch. On a CPU, memory
that the allocator reuses and that fits into the cache saves a quarter of the time."""


def digest_of_export(folder: Path) -> str:
    """Return the first 12 digits of the SHA-256 of the export's own list of digests, its card left out."""
    try:
        # The card may be written again, with the figures of this evaluation.
        listed = [line for line in (folder / DIGESTS).read_text().splitlines() if not line.endswith(f"  {CARD}")]
        return hashlib.sha256("\n".join(listed).encode()).hexdigest()[:12]
    except OSError as error:
        remedy = "create the export again with `megamm convert export`"
        raise UserError(
            f"cannot read the digests of the export: {error.strerror}", where=folder, remedy=remedy
        ) from None


class ExportSubject:
    """megamm.evaluation.subject.Subject of an open export, in one process."""

    def __init__(self, export: LoadedExport, logits: int | None = None) -> None:
        """logits: how many are computed at a time; default: LOGITS or LOGITS_CPU."""
        self.export = export
        self.logits = logits or (LOGITS_CPU if export.device.type == "cpu" else LOGITS)

    @property
    def config(self) -> RunConfig:
        return self.export.config

    @property
    def vocabulary(self) -> Vocabulary:
        return self.export.vocabulary

    @property
    def modalities(self) -> Mapping[str, Modality]:
        return self.export.modalities

    @property
    def step(self) -> int:
        return self.export.step

    @torch.inference_mode()
    def token_losses(self, documents: Sequence[Document]) -> Iterator[tuple[int, Row, FloatArray]]:
        """Yield (index, row, cross entropy of each label `[S]`) of every document, longest first."""
        # Longest first: the largest batch is computed first, so memory runs out at once or never; rows of similar
        # length are padded least.
        lengths = [document_length(*document.sizes) for document in documents]
        order = sorted(range(len(documents)), key=lambda i: -lengths[i])
        while order:
            longest = lengths[order[0]]
            size = max(1, self.logits // (self.vocabulary.size * longest))
            indices, order = order[:size], order[size:]
            rows = [self.export.row(documents[i], longest) for i in indices]
            batch = Batch.stack(rows).to(self.export.device)
            mask = attention_mask(self.export.model, batch.segment >= 0, batch.span)
            logits_BSV = self.export.model(batch.input_ids, attention_mask=mask).logits
            loss_BS = torch.nn.functional.cross_entropy(
                logits_BSV.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_LABEL, reduction="none"
            ).view_as(batch.labels)
            yield from zip(indices, rows, loss_BS.cpu().numpy(), strict=True)

    def generate(self, prompts: Sequence[Prompt], target: str, sampling: SamplingConfig, first_seed: int) -> list[Any]:
        """Generate one medium of `target` for each prompt; item i uses first_seed + i."""
        options = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, first_seed, sampling.max_tokens)
        return generate_from(self.export, prompts, target, options)
