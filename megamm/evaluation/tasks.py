"""Tasks of a suite that need only losses: `loss`, `perplexity`, `bits_per_byte`, `pair_gain` and `recall`.

Every task has items, numbered from 0, which are computed in chunks of a fixed size: a chunk's records depend on nothing
but its items, so that chunks can be computed by any rank and again after a kill. `figures` turns all records, in order,
into numbers.

loss and perplexity: of each modality, over both orders of every sample. bits_per_byte: cross entropy of all text
labels, marks included, over the UTF-8 bytes of the texts. recall@k of a direction a_to_b: given a, the candidates for b
are ranked by log p(b | a) - log p(b), and the other way round; for `pair_gain` see losses.py.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megamm.common.errors import UserError
from megamm.common.sample import Document
from megamm.config.suite import TaskConfig
from megamm.data.pipeline.packing import document_length
from megamm.data.pipeline.token_dataset import TokenDataset
from megamm.evaluation import losses
from megamm.evaluation.losses import NO_SAMPLES_REMEDY
from megamm.evaluation.statistics import Estimate, MetricFigure, mean, ratio
from megamm.evaluation.subject import Subject
from megamm.modalities import REGISTRY

Record = dict[str, Any]
LOSS_METRICS, PAIR_GAIN, RECALL = ("loss", "perplexity", "bits_per_byte"), "pair_gain", "recall"


class EvaluationTask(Protocol):
    """A task of a suite; `count` items, `chunk` at a time."""

    config: TaskConfig
    count: int
    chunk: int

    def compute(self, subject: Subject, items: Sequence[int], folder: Path) -> list[Record]:
        """Return a record of each item; media are written into `folder`."""
        ...

    def figures(self, records: Sequence[Record]) -> Iterator[MetricFigure]:
        """Return the numbers of all records."""
        ...


def require_source(config: TaskConfig) -> Path:
    """Return the task's source. UserError if it has none."""
    if config.source is None:
        raise UserError(f"the task of {', '.join(config.metrics)} has no source", remedy="add `source: SHARDS/NAME`")
    return config.source


def parts_of(config: TaskConfig) -> tuple[tuple[str, ...], str]:
    """Return the prompt's modalities and the target of `a_to_b` or `a+b_to_c`. UserError if it is not a direction."""
    given, _, target = (config.direction or "").rpartition("_to_")
    names = tuple(given.split("+")) if given else ()
    if not names or any(name not in REGISTRY for name in (*names, target)):
        remedy = f"set `direction: a_to_b` with two of {', '.join(REGISTRY)}"
        raise UserError(f"{', '.join(config.metrics)}: no direction {config.direction!r}", remedy=remedy)
    return names, target


class _OfSource:
    """Held-out samples of one source, chosen by the task's seed."""

    def __init__(self, subject: Subject, config: TaskConfig) -> None:
        self.config, self.source = config, require_source(config)
        self.seed, n = config.seed or 0, config.n or 1
        self.heldout = losses.open_heldout(subject, self.source)
        used = self.heldout.used(subject.config.data.seq_length)
        if not len(used):
            raise UserError("no held-out samples", where=self.source, remedy=NO_SAMPLES_REMEDY)
        order = np.random.default_rng([self.seed, len(used)]).permutation(len(used))
        self.samples = [int(used[int(i)]) for i in sorted(order[:n].tolist())]

    def figure(
        self, metric: str, estimate: Estimate, direction: str | None = None, note: str | None = None
    ) -> MetricFigure:
        return MetricFigure(
            metric,
            estimate.value,
            estimate.standard_error,
            estimate.n,
            self.seed,
            self.source.name,
            direction or self.config.direction,
            note=note,
        )


class LossTask(_OfSource):
    """Loss, perplexity and bits per byte."""

    chunk = 32

    def __init__(self, subject: Subject, config: TaskConfig) -> None:
        super().__init__(subject, config)
        self.count = len(self.samples)

    def compute(self, subject: Subject, items: Sequence[int], folder: Path) -> list[Record]:
        length = subject.config.data.seq_length
        documents = [list(self.heldout.documents(self.samples[i], length)) for i in items]
        scores = losses.score(subject, [document for of_item in documents for document in of_item])
        records, first = [], 0
        for of_item in documents:
            mine = slice(first, first := first + len(of_item))
            sums, counts = scores.sums[mine].sum(0), scores.counts[mine].sum(0)
            texts = [part.ids for document in of_item for part in document.parts if part.modality == "text"]
            size = sum(len(str(subject.modalities["text"].decode(ids)).encode()) for ids in texts)
            named = zip(subject.vocabulary.modalities, sums, counts, strict=True)
            found = {name: [float(total), int(count)] for name, total, count in named if count}
            records.append({"key": of_item[0].key if of_item else "", "losses": found, "bytes": size})
        return records

    def figures(self, records: Sequence[Record]) -> Iterator[MetricFigure]:
        names = sorted({name for record in records for name in record["losses"]}, key=list(REGISTRY).index)
        for name in names:
            found = [record["losses"].get(name, [0.0, 0]) for record in records]
            loss = ratio([total for total, _ in found], [count for _, count in found])
            if "loss" in self.config.metrics:
                yield self.figure(f"loss {name}", loss)
            if "perplexity" in self.config.metrics:
                yield self.figure(f"perplexity {name}", *_perplexity(loss))
            if "bits_per_byte" in self.config.metrics and name == "text":
                bits = ratio([total / math.log(2) for total, _ in found], [record["bytes"] for record in records])
                yield self.figure("bits_per_byte", bits)


def _perplexity(loss: Estimate) -> tuple[Estimate, None, str | None]:
    assert loss.value is not None
    if loss.value > 700:  # exp overflows
        return Estimate(None, None, loss.n), None, "the perplexity is too large for a number"
    value = math.exp(loss.value)
    error = None if loss.standard_error is None else value * loss.standard_error
    return Estimate(value, error, loss.n), None, None


class PairGainTask(_OfSource):
    """Pair gain of every direction, or of one."""

    chunk = 16

    def __init__(self, subject: Subject, config: TaskConfig) -> None:
        super().__init__(subject, config)
        whole = _unordered(self)
        rules, rng = losses.heldout_rules(self.source), np.random.default_rng([self.seed, 0])
        self.pairs = list(losses.contrast_pairs(subject, whole, rules, rng))
        if config.direction is not None:
            wanted = {*parts_of(config)[0], parts_of(config)[1]}
            self.pairs = [pair for pair in self.pairs if {part.modality for part in pair.own.parts} == wanted]
        self.count, self.input_only = len(self.pairs), subject.config.spans

    def compute(self, subject: Subject, items: Sequence[int], folder: Path) -> list[Record]:
        pairs = [self.pairs[i] for i in items]
        documents = [d for pair in pairs for d in (*losses.orders(pair.own), *losses.mixed(pair))]
        means = losses.score(subject, documents).last.reshape(-1, 4)
        return [{"key": pair.own.key, "losses": row.tolist()} for pair, row in zip(pairs, means, strict=True)]

    def figures(self, records: Sequence[Record]) -> Iterator[MetricFigure]:
        means = np.array([record["losses"] for record in records]).reshape(-1, 4)
        gains = losses.pair_gains(self.pairs, means, self.input_only)
        if not gains:
            yield self.figure(PAIR_GAIN, Estimate(None, None, 0), note="no sample has two parts and a partner")
        for direction, gain in gains.items():
            if self.config.direction in (None, direction):
                estimate = Estimate(gain.mean, gain.standard_error, gain.samples)
                note = f"above 0 for {gain.positive_share:.0%}; the error is over {gain.nouns} nouns"
                yield self.figure(PAIR_GAIN, estimate, direction, note)


def _unordered(task: _OfSource) -> list[Document]:
    if not isinstance(task.heldout, TokenDataset):
        raise UserError("a source of text alone has no pairs", where=task.source, remedy="give a shard set with media")
    return [task.heldout.whole(i) for i in task.samples if not task.heldout.is_ordered(i)]


class RecallTask(_OfSource):
    """Recall@k both ways; an item is a group of candidates, each of which is a query too."""

    chunk = 1

    def __init__(self, subject: Subject, config: TaskConfig) -> None:
        super().__init__(subject, config)
        given, target = parts_of(config)
        if len(given) != 1 or given[0] == target:
            raise UserError(f"recall ranks one modality given another, not {config.direction}", remedy="give a_to_b")
        self.names = (given[0], target)
        if both := sorted(subject.config.spans.intersection(self.names)):
            what = f"recall scores both modalities, and the model reads {both[0]} as bidirectional spans"
            raise UserError(what, remedy="remove the task")
        found = []
        for document in _unordered(self):
            parts = {part.modality: part for part in document.parts}
            if set(self.names) <= parts.keys():
                found.append(Document(document.key, tuple(parts[name] for name in self.names)))
        # Every combination of two samples must fit into a row.
        longest = [max((d.parts[side].ids.size for d in found), default=0) for side in (0, 1)]
        while found and document_length(*zip(self.names, longest, strict=True)) > subject.config.data.seq_length:
            found.sort(key=lambda d: sum(part.ids.size for part in d.parts))
            found.pop()
            longest = [max((d.parts[side].ids.size for d in found), default=0) for side in (0, 1)]
        self.size = min(config.candidates, len(found))
        order = np.random.default_rng([self.seed, len(found), 1]).permutation(len(found))
        self.count = len(found) // self.size if self.size > 1 else 0
        self.groups = [[found[i] for i in order[g * self.size : (g + 1) * self.size]] for g in range(self.count)]

    def compute(self, subject: Subject, items: Sequence[int], folder: Path) -> list[Record]:
        if not items:  # other ranks score both ways
            for _ in range(2):
                losses.score(subject, [])
        return [self._group(subject, self.groups[i]) for i in items]

    def _group(self, subject: Subject, group: list[Document]) -> Record:
        record: Record = {"keys": [document.key for document in group]}
        for query, candidate in ((0, 1), (1, 0)):
            joint = [Document("", (a.parts[query], b.parts[candidate])) for a in group for b in group]
            alone = [Document("", (b.parts[candidate],)) for b in group]
            sizes = np.array([b.parts[candidate].ids.size for b in group])
            last = losses.score(subject, [*joint, *alone]).last
            given, prior = last[: len(joint)].reshape(len(group), -1), last[len(joint) :]
            # log p(b | a) - log p(b), summed over the tokens of b.
            record["scores"] = [*record.get("scores", []), ((prior - given) * sizes).tolist()]
            contents = [b.parts[candidate].ids.tobytes() for b in group]
            record["contents"] = [*record.get("contents", []), [contents.index(content) for content in contents]]
        return record

    def figures(self, records: Sequence[Record]) -> Iterator[MetricFigure]:
        a, b = self.names
        for way, direction in enumerate((f"{a}_to_{b}", f"{b}_to_{a}")):
            for k in self.config.k:
                hits = [
                    hit
                    for record in records
                    for hit in recall_at(k, np.array(record["scores"][way]), record["contents"][way])
                ]
                note = f"{self.size} candidates, {min(k / self.size, 1):.3f} by chance" if hits else "too few samples"
                yield self.figure(f"recall@{k}", mean(hits), direction, note)


def recall_at(k: int, scores: npt.NDArray[np.float64], contents: Sequence[int]) -> list[float]:
    """Return for each query (row) the probability that its own candidate is among the best k, ties in random order.

    contents: a number of each candidate's content: equal ones are the same answer.
    """
    hits = []
    for query, row in enumerate(scores):
        others = np.array([content != contents[query] for content in contents])
        better = int((row[others] > row[query]).sum())
        ties = int((row[others] == row[query]).sum())
        hits.append(min(max((k - better) / (ties + 1), 0.0), 1.0))
    return hits
