"""`megamm generate`: from a prompt to one modality with an export, by transformers' own `generate` (KV cache).

Input: prompts, each of parts of any modalities in any order, as read by their tokenizers. Output: one medium of the
target for each. The prompt has the same form as in training: `<document_start>`, then text ids or `<X_start> ids
<X_end>` for each part; a media target adds its `<Y_start>`, and a text target after a text part continues it. At each
position, only ids that are valid for the target can follow: exactly the number of one item, or, for variable length, up
to the end token, which is allowed after a whole number of strides (frames). Text also ends at the first stop string.
Sampling is Gumbel-max (Gumbel 1954; Maddison et al. 2014) with one generator per item, so an item's result does not
depend on its batch. Parts that are bidirectional spans are read with a mask of their own before the first new id.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megamm.common.errors import UserError
from megamm.common.sample import IntArray, Part
from megamm.convert.io.export_folder import LoadedExport
from megamm.convert.io.span_masks import attention_mask
from megamm.data.pipeline.packing import MEDIA_MARKS
from megamm.inference.continuation import Continuation, TextFollower
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
    stop: tuple[str, ...] = ()
    """Text ends before the first of these strings."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.max_tokens < 1:
            remedy = "use temperature >= 0, top_k >= 0, 0 < top_p <= 1 and max_tokens >= 1"
            raise UserError(f"invalid sampling settings {self}", remedy=remedy)
        if "" in self.stop:
            raise UserError("an empty stop string", remedy="give text with --stop")


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


@dataclass(frozen=True)
class PromptIds:
    """The ids `[T]` before the first new one, and the span of each, -1 for none."""

    ids: IntArray
    span: IntArray


Prompt = Sequence[tuple[str, Any]]
"""Parts in order: the modality, and a medium as returned by its `Modality.read_media`."""


def generate(export: LoadedExport, media: Sequence[Any], source: str, target: str, sampling: Sampling) -> list[Any]:
    """Generate one medium of `target` for each medium of `source`; errors as `generate_from` has them."""
    return generate_from(export, [((source, medium),) for medium in media], target, sampling)


def generate_from(
    export: LoadedExport,
    prompts: Sequence[Prompt],
    target: str,
    sampling: Sampling,
    on_text: Callable[[str], None] | None = None,
) -> list[Any]:
    """Generate one medium of `target` for each prompt. on_text: gets the text of a single prompt as it is generated.

    UserError if the export lacks a modality, a prompt is too long for the model, or stop strings are given for media.
    """
    codec = modality_in(export, target)
    if target in export.config.spans:
        what = f"the model reads {target} as bidirectional spans (modalities.{target}.attention) and does not write it"
        raise UserError(what, where=export.folder, remedy="generate another modality")
    if sampling.stop and target != "text":
        raise UserError(f"stop strings end text, not {target}", remedy="remove --stop, or generate text")
    assert on_text is None or (target == "text" and len(prompts) == 1)
    # All media of a modality are encoded in one call, then dealt out to the prompts in the order of their parts.
    encoded: dict[str, Iterator[IntArray]] = {}
    for name in dict.fromkeys(name for prompt in prompts for name, _ in prompt):
        media = [medium for prompt in prompts for modality, medium in prompt if modality == name]
        encoded[name] = iter(modality_in(export, name).encode(media))
    items = [[Part(name, next(encoded[name])) for name, _ in prompt] for prompt in prompts]
    ids = [_prompt(export, parts, target) for parts in items]
    made: list[Any] = []
    for first in range(0, len(items), BATCH):
        batch = slice(first, first + BATCH)
        seeds = [sampling.seed + i for i in range(len(items))[batch]]
        if target == "text":
            texts = [
                Continuation(codec, _text_at_end(parts), sampling.stop, _most_text(export, prompt, sampling))
                for parts, prompt in zip(items[batch], ids[batch], strict=True)
            ]
            _continue_text(export, ids[batch], texts, sampling, seeds, on_text)
            made += [text.text for text in texts]
        else:
            made += [codec.decode(new) for new in _media_ids(export, ids[batch], target, sampling, seeds)]
    return made


def _text_at_end(parts: list[Part]) -> IntArray:
    """The text ids at the end of a prompt."""
    kept: list[IntArray] = []
    for part in reversed(parts):
        if part.modality != "text":
            break
        kept.insert(0, part.ids)
    return np.concatenate([np.zeros(0, dtype=np.int64), *kept])


def _prompt(export: LoadedExport, parts: list[Part], target: str) -> PromptIds:
    """Return what comes before the target's first token."""
    before_end = export.prompt(*parts)
    # The target, with its marks and the document's end; text needs room for one id.
    needed = len(before_end) + 1
    if target != "text":
        needed += export.modalities[target].stride + MEDIA_MARKS
    if needed > export.longest:
        given = " and ".join(f"{part.modality} of {len(part.ids)} tokens" for part in parts)
        what = f"{given} leaves no room for {target} in {export.longest}"
        raise UserError(what, where=export.folder, remedy="give a shorter input")
    span = export.prompt_spans(*parts)
    if target == "text":
        return PromptIds(before_end, span)
    return PromptIds(np.append(before_end, export.vocabulary.begin(target)), np.append(span, -1))


def _most_text(export: LoadedExport, prompt: PromptIds, sampling: Sampling) -> int:
    return min(sampling.max_tokens, export.longest - len(prompt.ids))


def _continue_text(
    export: LoadedExport,
    prompts: list[PromptIds],
    texts: list[Continuation],
    sampling: Sampling,
    seeds: list[int],
    on_text: Callable[[str], None] | None,
) -> None:
    """Generate the rest of `texts`."""
    ends, first_id = export.prompt_form.ends, export.vocabulary["text"].start
    only = ValidTokens(export.modalities["text"], first_id, ends, max(len(prompt.ids) for prompt in prompts))
    most = max(text.most for text in texts)
    follower = TextFollower(texts, first_id, ends, on_text)
    _continue(export, prompts, most, ends, _processors(only, sampling, seeds), StoppingCriteriaList([follower]))


def _media_ids(
    export: LoadedExport, prompts: list[PromptIds], target: str, sampling: Sampling, seeds: list[int]
) -> Iterator[IntArray]:
    """Yield the target's codec-local ids `[T]` after each prompt."""
    modality, ids_range, end = export.modalities[target], export.vocabulary[target], export.vocabulary.end(target)
    longest = max(len(prompt.ids) for prompt in prompts)
    # Of a variable length: what the row has room for, less its end and the document's, in whole strides.
    most = modality.tokens_per_item or (export.longest - longest - 2) // modality.stride * modality.stride
    ends = () if modality.tokens_per_item else (end,)
    only = ValidTokens(modality, ids_range.start, ends, longest)
    for ids in _continue(export, prompts, most, ends, _processors(only, sampling, seeds), StoppingCriteriaList()):
        yield ids[(ids >= ids_range.start) & (ids < ids_range.stop)] - ids_range.start


@torch.inference_mode()
def _continue(
    export: LoadedExport,
    prompts: list[PromptIds],
    most: int,
    ends: Sequence[int],
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
) -> IntArray:
    """Return the new ids `[items, T]`, with padding after an end."""
    padding = export.prompt_form.padding
    longest = max(len(prompt.ids) for prompt in prompts)

    # Padded on the left, so that all prompts end at the same position.
    def batched(arrays: Iterable[IntArray], value: int) -> torch.Tensor:
        padded = [np.pad(array, (longest - len(array), 0), constant_values=value) for array in arrays]
        return torch.from_numpy(np.stack(padded)).to(export.device)

    input_ids, span = batched((p.ids for p in prompts), padding), batched((p.span for p in prompts), -1)
    mask = batched((np.ones_like(p.ids) for p in prompts), 0)
    config = GenerationConfig(
        max_new_tokens=most,
        do_sample=False,  # the noise samples
        eos_token_id=list(ends) or None,
        pad_token_id=padding,
    )
    output_BS = export.model.generate(
        input_ids,
        attention_mask=mask,
        past_key_values=_read_spans(export, input_ids, mask, span),
        generation_config=config,
        logits_processor=processors,
        stopping_criteria=criteria,
    )
    new_BT: IntArray = output_BS[:, longest:].cpu().numpy()
    return new_BT


def _read_spans(
    export: LoadedExport, input_ids: torch.Tensor, mask: torch.Tensor, span: torch.Tensor
) -> DynamicCache | None:
    """Return the cache of all ids but the last, read with the mask of their spans; None without spans.

    The last id is a mark or text and sees all before it, so `generate` continues as if it had read the prompt itself.
    """
    if not bool((span >= 0).any()):
        return None
    cache = DynamicCache(config=export.model.config)
    export.model(
        input_ids[:, :-1],
        attention_mask=attention_mask(export.model, mask[:, :-1], span[:, :-1]),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, :-1],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return cache


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
