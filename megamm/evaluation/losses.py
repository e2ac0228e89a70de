"""Held-out losses and pair gains of a model, and the scores of documents that other metrics are computed from.

Loss: mean cross entropy (nats per token) of each modality, over every held-out sample in both orders (the parts in
reading order and in reverse).

Pair gain of a direction, for example text_to_image: the loss of the second part after another sample's first part,
minus its loss after its own first part, in nats per token of the second part, averaged over samples. It is above zero
only if the model predicts the second part from the first: the other sample is from the same source, so its style does
not help, and has another normalised noun if possible. In a sample with more than two parts, every two parts are such a
pair. The standard error is over nouns, because the variants of one noun (skin tones, plurals) are not independent
samples (cluster-robust: Liang & Zeger 1986). If the build's report tells by which rule each sample is held out
(data/build/heldout.py), gains are also reported for each rule.
"""

import json
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megamm.common.errors import UserError
from megamm.common.sample import Document, FloatArray, IntArray
from megamm.config import SourceConfig
from megamm.data.pipeline.bin_dataset import DocumentDataset, open_split
from megamm.data.pipeline.packing import document_length
from megamm.data.pipeline.token_dataset import TokenDataset
from megamm.data.raw.samples import normalise_noun
from megamm.evaluation.subject import Subject

log = logging.getLogger(__name__)

NO_SAMPLES_REMEDY = "build more data; of .bin and .idx files, only a source of the run with `heldout` above 0 has some"


@dataclass(frozen=True)
class PairGain:
    """Pair gain in nats per token of the second part; positive_share: share of samples with a gain above 0."""

    mean: float
    standard_error: float | None
    samples: int
    nouns: int
    positive_share: float


@dataclass(frozen=True)
class Evaluation:
    """Loss and tokens by modality, pair_gain by direction ("text_to_image"); step: training step of the weights.

    pair_gain_by_rule: the same for the samples held out by one rule, "noun" or "combination".
    """

    step: int
    samples: int
    loss: dict[str, float]
    tokens: dict[str, int]
    pair_gain: dict[str, PairGain]
    pair_gain_by_rule: dict[str, dict[str, PairGain]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class DocumentScores:
    """Scores of every document: summed loss and number of tokens by modality `[n, modalities]`.

    last: mean loss over the last part's own tokens, without marks `[n]`.
    """

    sums: npt.NDArray[np.float64]
    counts: IntArray
    last: npt.NDArray[np.float64]


@dataclass(frozen=True)
class ContrastPair:
    """Two parts of a held-out sample, and the same two parts of the sample that it is compared with."""

    own: Document
    other: Document
    noun: str
    rule: str | None
    """The rule by which it is held out; None if its source has no report."""


def evaluate(subject: Subject, sources: list[Path], *, limit: int | None = None, seed: int = 0) -> Evaluation:
    """Evaluate on the held-out samples of every source, with at most `limit` samples each.

    A source is SHARDS/<source>, or PREFIX of .bin and .idx files that the run trained on. UserError if a split has no
    samples, or no tokens of the model's tokenizers.
    """
    samples, documents, pairs = 0, [], []
    for number, source in enumerate(sources):
        heldout = open_heldout(subject, source)
        fitting = heldout.used(subject.config.data.seq_length)[:limit]
        if long_samples := heldout.long_samples(subject.config.data.seq_length):
            log.warning("%s", long_samples)
        samples += len(fitting)
        documents += [d for i in fitting for d in heldout.documents(i, subject.config.data.seq_length)]
        if not isinstance(heldout, TokenDataset):
            continue  # documents of text alone: there are no pairs
        whole = [heldout.whole(i) for i in fitting if not heldout.is_ordered(i)]
        pairs += list(contrast_pairs(subject, whole, heldout_rules(source), np.random.default_rng([seed, number])))
    if not samples:
        raise UserError("no held-out samples", where=", ".join(map(str, sources)), remedy=NO_SAMPLES_REMEDY)
    scores = score(subject, [*documents, *(d for pair in pairs for d in (*orders(pair.own), *mixed(pair)))])
    sums, counts = scores.sums[: len(documents)].sum(0), scores.counts[: len(documents)].sum(0)
    found = [(m, name) for m, name in enumerate(subject.vocabulary.modalities) if counts[m]]
    # Four documents of each pair follow those of the loss: both orders, then both with the partner's first part.
    second = scores.last[len(documents) :].reshape(-1, 4)
    rules = sorted({pair.rule for pair in pairs if pair.rule is not None})
    of_rule = {rule: [i for i, pair in enumerate(pairs) if pair.rule == rule] for rule in rules}
    return Evaluation(
        step=subject.step,
        samples=samples,
        loss={name: float(sums[m] / counts[m]) for m, name in found},
        tokens={name: int(counts[m]) for m, name in found},
        pair_gain=pair_gains(pairs, second, subject.config.spans),
        pair_gain_by_rule={
            rule: pair_gains([pairs[i] for i in of], second[of], subject.config.spans) for rule, of in of_rule.items()
        },
    )


def open_heldout(subject: Subject, source: Path) -> DocumentDataset:
    """Open the held-out samples of a source with the options that the run had for it."""
    trained = {config.path.name: config for config in subject.config.data.sources}
    config = trained.get(source.name, SourceConfig(path=source)).model_copy(update={"path": source})
    # Sources that the run did not have may have samples longer than a row: these are left out, not an error.
    long_documents = subject.config.data.long_documents
    return open_split(config, "heldout", subject.modalities, "skip" if long_documents == "error" else long_documents)


def heldout_rules(source: Path) -> dict[str, str]:
    """Return key -> rule by which it is held out, from the build's report in SHARDS/<source>; {} without a report."""
    report = source / "report.json"
    if not report.is_file():
        return {}
    by_rule = json.loads(report.read_bytes()).get("heldout_by", {})  # older builds have no such field
    return {key: rule for rule, keys in by_rule.items() for key in keys}


def orders(document: Document) -> list[Document]:
    return [document, Document(document.key, document.parts[::-1])]


def _length(document: Document) -> int:
    return document_length(*document.sizes)


def score(subject: Subject, documents: list[Document]) -> DocumentScores:
    """Score the documents; equal ones are computed once: most pairs are also among the documents of the loss."""
    number: dict[tuple[tuple[str, bytes], ...], int] = {}
    contents = [tuple((part.modality, part.ids.tobytes()) for part in document.parts) for document in documents]
    # `which` maps each document to the number of its first equal one.
    which = [number.setdefault(content, len(number)) for content in contents]
    different = list(dict(zip(which, documents, strict=True)).values())
    shape = (len(different), len(subject.vocabulary.modalities))
    sums, counts, last = np.zeros(shape), np.zeros(shape, dtype=np.int64), np.full(shape[0], np.nan)
    for i, row, loss_S in subject.token_losses(different):
        for modality in range(shape[1]):
            is_of = row.modality == modality
            sums[i, modality], counts[i, modality] = loss_S[is_of].sum(dtype=np.float64), is_of.sum()
        of_last = loss_S[last_part(different[i])]
        last[i] = of_last.mean(dtype=np.float64) if of_last.size else math.nan
    return DocumentScores(sums[which], counts[which], last[which])


def contrast_pairs(
    subject: Subject, documents: list[Document], rules: dict[str, str], rng: np.random.Generator
) -> Iterator[ContrastPair]:
    """Yield every two parts of every sample of one source with their partners; skip those too long for a row."""
    by_modalities: dict[tuple[str, str], list[tuple[Document, str]]] = {}
    for document in documents:
        noun = _noun(subject, document)
        for two in combinations(document.parts, 2):
            names = (two[0].modality, two[1].modality)
            by_modalities.setdefault(names, []).append((Document(document.key, two), noun))
    for same in by_modalities.values():
        if len(same) < 2:
            continue
        for own, other in enumerate(partners([noun for _, noun in same], rng)):
            pair = ContrastPair(same[own][0], same[other][0], same[own][1], rules.get(same[own][0].key))
            every = [*orders(pair.own), *mixed(pair)]
            if all(_length(document) <= subject.config.data.seq_length for document in every):
                yield pair


def _noun(subject: Subject, document: Document) -> str:
    texts = [subject.modalities["text"].decode(p.ids) for p in document.parts if p.modality == "text"]
    return normalise_noun(texts[0]) if texts else document.key


def partners(nouns: Sequence[str], rng: np.random.Generator) -> IntArray:
    """Return a random permutation `[n]` without fixed points; partners differ in noun if no noun has more than half.

    Samples are sorted by noun and shifted by the size of the largest group, so that each gets a partner from another
    group.
    """
    _, group, sizes = np.unique(np.array(nouns), return_inverse=True, return_counts=True)
    rank = rng.permutation(len(sizes))
    # Random within a group, and groups in random order: every partner of another noun is possible.
    order = np.lexsort((rng.random(len(nouns)), rank[group]))
    result = np.empty(len(nouns), dtype=np.int64)
    # Groups lie side by side in `order`; a shift by the largest size leads out of every group of at most half.
    result[order] = np.roll(order, -min(int(sizes.max()), len(nouns) // 2))
    return result


def mixed(pair: ContrastPair) -> tuple[Document, Document]:
    """Return the sample in both orders, with its first part replaced by the partner's."""
    (first, second), (other_first, other_second) = pair.own.parts, pair.other.parts
    return Document(pair.own.key, (other_first, second)), Document(pair.own.key, (other_second, first))


def pair_gains(
    pairs: list[ContrastPair], second: npt.NDArray[np.float64], input_only: Collection[str]
) -> dict[str, PairGain]:
    """Return the gains by direction, except into modalities that are input only.

    second: mean losses `[pairs, 4]` of the pair in both orders, and of both with another sample's first part.
    """
    gains: dict[str, tuple[list[float], list[str]]] = {}
    for pair, means in zip(pairs, second, strict=True):
        for document, gain in zip(orders(pair.own), means[2:] - means[:2], strict=True):
            if document.parts[1].modality in input_only:
                continue
            values, nouns = gains.setdefault("_to_".join(part.modality for part in document.parts), ([], []))
            values.append(float(gain))
            nouns.append(pair.noun)
    return {direction: summarise(np.array(values), nouns) for direction, (values, nouns) in gains.items()}


def last_part(document: Document) -> slice:
    """Return the positions of the last part's own tokens in the labels of its row, without special tokens."""
    *earlier, last = document.parts
    before = document_length(*((part.modality, part.ids.size) for part in earlier)) - 1 + (last.modality != "text")
    # The label at an index is the next token, so the part's first token is predicted one index before it.
    return slice(before - 1, before - 1 + last.ids.size)


def summarise(gains: FloatArray, nouns: list[str]) -> PairGain:
    """Return the mean over samples, with the standard error over nouns (None for a single noun)."""
    mean = float(gains.mean())
    _, group = np.unique(np.array(nouns), return_inverse=True)
    residuals = np.bincount(group, weights=gains - mean)
    groups = len(residuals)
    # Sums of residuals by noun, with the factor G / (G - 1) for few clusters.
    error = math.sqrt((residuals**2).sum() * groups / (groups - 1)) / len(gains) if groups > 1 else None
    return PairGain(mean, error, len(gains), groups, float((gains > 0).mean()))


def summary_lines(figures: dict[str, Any]) -> Iterator[str]:
    """Format the figures (`Evaluation.to_json`) for people."""
    yield f"step {figures['step']}, {figures['samples']} held-out samples, both orders"
    for name, loss in figures["loss"].items():
        yield f"loss {name}: {loss:.4f} nats/token over {figures['tokens'][name]} tokens"
    rules = [(f", held out by {rule}", gains) for rule, gains in figures["pair_gain_by_rule"].items()]
    for which, gains in [("", figures["pair_gain"]), *(rules if len(rules) > 1 else [])]:
        yield from _gain_lines(which, gains)


def _gain_lines(which: str, gains: dict[str, Any]) -> Iterator[str]:
    for direction, gain in gains.items():
        error = "unknown" if gain["standard_error"] is None else f"{gain['standard_error']:.4f}"
        yield (
            f"pair gain {direction}{which}: {gain['mean']:+.4f} nats/token (standard error {error}), "
            f"above 0 for {gain['positive_share']:.0%} of {gain['samples']} samples, {gain['nouns']} nouns"
        )
