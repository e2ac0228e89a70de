"""`megamm generate`: from one modality to another with an export, by transformers' own `generate` (KV cache).

Input: media of one modality, as read by its tokenizer. Output: the same number of the other modality. The prompt has
the same form as in training: `<document_start> text` or `<document_start> <X_start> ids <X_end>`; a media target adds
its `<Y_start>`. At each position, only ids that are valid for the target can follow: exactly the number of one item,
or, for variable length, up to the end token, which is allowed after a whole number of strides (frames). Sampling is
Gumbel-max (Gumbel 1954; Maddison et al. 2014) with one generator per item, so an item's result does not depend on its
batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megamm.common.errors import UserError
from megamm.common.sample import IntArray, Part
from megamm.convert.io.export_folder import LoadedExport
from megamm.data.pipeline.packing import document_length
from megamm.modalities.protocol import Modality

BATCH = 32
"""Items generated at a time."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. temperature 0: the most likely token; top_k 0 and top_p 1 are off. Item i uses seed + i."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 64
    """Maximum length of a text target."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.max_tokens < 1:
            remedy = "use temperature >= 0, top_k >= 0, 0 < top_p <= 1 and max_tokens >= 1"
            raise UserError(f"invalid sampling settings {self}", remedy=remedy)


class ValidTokens(LogitsProcessor):
    """Excludes every id that is invalid at the target's current index; `stops` is empty for a fixed length."""

    def __init__(self, modality: Modality, first_id: int, stops: Sequence[int], prompt_length: int) -> None:
        self.modality, self.first_id, self.stops, self.prompt_length = modality, first_id, list(stops), prompt_length

    def __call__(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        index = input_ids.shape[1] - self.prompt_length
        ids = self.modality.valid_token_ids(index)
        kept = torch.full_like(scores_BV, -torch.inf)
        valid = slice(self.first_id + ids.start, self.first_id + ids.stop)
        kept[:, valid] = scores_BV[:, valid]
        is_text = self.modality.name == "text"
        # Only text may be empty; other media end after at least one whole latent frame.
        if self.stops and index % self.modality.stride == 0 and (index or is_text):
            kept[:, self.stops] = scores_BV[:, self.stops]
        return kept


class GumbelNoise(LogitsProcessor):
    """Adds standard Gumbel noise: the largest sum is a draw from the softmax. Row i uses its own seed."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        # Drawn on the CPU in float64: the same numbers on every device, without rounding of the tail.
        draws = [
            torch.empty(scores_BV.shape[1], dtype=torch.float64).exponential_(generator=g) for g in self.generators
        ]
        return scores_BV - torch.stack(draws).log().to(scores_BV)


def generate(export: LoadedExport, media: Sequence[Any], source: str, target: str, sampling: Sampling) -> list[Any]:
    """Generate one medium of `target` for each medium of `source` (as returned by `Modality.read_media`).

    UserError if the export lacks a modality, both are the same, or an item is too long for the model.
    """
    reader, codec = modality_in(export, source), modality_in(export, target)
    # A model imported without control ids can only continue text.
    if source == target and export.vocabulary.has_control:
        raise UserError(f"cannot generate {source} to {target}", remedy="choose a target other than the source")
    parts = [Part(source, ids) for ids in reader.encode(media)]
    items = [_prompt(export, part, target) for part in parts]
    return [codec.decode(ids) for ids in _continue_all(export, items, target, sampling)]


def _prompt(export: LoadedExport, part: Part, target: str) -> IntArray:
    """Return the ids `[T]` before the target's first token."""
    target_length = export.modalities[target].stride
    needed = document_length((part.modality, len(part.ids)), (target, target_length))
    if needed > export.config.data.seq_length:
        what = (
            f"{part.modality} of {len(part.ids)} tokens leaves no room for {target} in {export.config.data.seq_length}"
        )
        raise UserError(what, where=export.folder, remedy="give a shorter input")
    before_end = export.prompt(part)
    return before_end if target == "text" else np.append(before_end, export.vocabulary.begin(target))


def _continue_all(export: LoadedExport, prompts: list[IntArray], target: str, sampling: Sampling) -> Iterator[IntArray]:
    """Yield the target's codec-local ids `[T]` after each prompt."""
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first : first + BATCH]
        seeds = [sampling.seed + i for i in range(first, first + len(batch))]
        yield from _continue(export, batch, target, sampling, seeds)


@torch.inference_mode()
def _continue(
    export: LoadedExport, prompts: list[IntArray], target: str, sampling: Sampling, seeds: list[int]
) -> list[IntArray]:
    vocabulary, modality = export.vocabulary, export.modalities[target]
    ids_range, fixed = vocabulary[target], modality.tokens_per_item
    stops = export.prompt_form.ends if target == "text" else (vocabulary.end(target),)
    padding = export.prompt_form.padding
    longest = max(map(len, prompts))
    # Padded on the left, so that all prompts end at the same position.
    padded = [np.pad(p, (longest - len(p), 0), constant_values=padding) for p in prompts]
    mask = [np.pad(np.ones(len(p), dtype=np.int64), (longest - len(p), 0)) for p in prompts]
    input_BS = torch.from_numpy(np.stack(padded)).to(export.device)
    config = GenerationConfig(
        max_new_tokens=fixed or _most_tokens(modality, sampling, export.config.data.seq_length - longest),
        do_sample=False,  # the noise samples
        eos_token_id=list(stops),
        pad_token_id=padding,
    )
    output_BS = export.model.generate(
        input_BS,
        attention_mask=torch.from_numpy(np.stack(mask)).to(export.device),
        generation_config=config,
        logits_processor=_processors(
            ValidTokens(modality, ids_range.start, () if fixed else stops, longest), sampling, seeds
        ),
    )
    new_BT = output_BS[:, longest:].cpu().numpy()
    # After an end there is padding, whose id can be one of the text's.
    ended = [ids[: int(np.isin(ids, stops).argmax())] if np.isin(ids, stops).any() else ids for ids in new_BT]
    return [ids[(ids >= ids_range.start) & (ids < ids_range.stop)] - ids_range.start for ids in ended]


def _most_tokens(modality: Modality, sampling: Sampling, room: int) -> int:
    """Return the maximum length of a variable target: text by the sampling, media by the row, in whole strides."""
    most = min(sampling.max_tokens, room) if modality.name == "text" else room - 2  # its end token and the document's
    return most // modality.stride * modality.stride


def _processors(only: ValidTokens, sampling: Sampling, seeds: list[int]) -> LogitsProcessorList:
    processors = LogitsProcessorList([only])
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(GumbelNoise(seeds))
    return processors


def modality_in(export: LoadedExport, name: str) -> Modality:
    """Return a modality of the export. UserError if it does not have it."""
    if name not in export.modalities:
        remedy = f"use one of {', '.join(export.modalities)}"
        raise UserError(f"the export has no modality {name!r}", where=export.folder, remedy=remedy)
    return export.modalities[name]
