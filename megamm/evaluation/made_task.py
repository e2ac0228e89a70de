"""Tasks that generate: one medium for each held-out prompt, measured against the real medium of the same sample.

An item's record has its files, its text, and its values; what cannot be measured is left out with the reason and
counted. FID, KID and IS read the media again when all are made.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megamm.common.errors import UserError
from megamm.common.files import new_file
from megamm.config.suite import SamplingConfig, TaskConfig
from megamm.evaluation import media_metrics, set_metrics, text_metrics
from megamm.evaluation.extractors import LITE0, PIXELS, ImageNetwork, image_network
from megamm.evaluation.losses import NO_SAMPLES_REMEDY
from megamm.evaluation.media_metrics import MEDIA_METRICS, Measure
from megamm.evaluation.packages import versions
from megamm.evaluation.similarity import SIMILARITIES, Similarity, identity
from megamm.evaluation.statistics import Estimate, MetricFigure, Unmeasurable, jackknife, mean
from megamm.evaluation.subject import Subject
from megamm.evaluation.tasks import Record, parts_of, require_source
from megamm.evaluation.text_metrics import NEED_REFERENCE, TEXT_METRICS
from megamm.shards.folder import ShardFolder
from megamm.shards.index import UNNUMBERED

SET_METRICS = {"image": ("fid", "kid", "inception_score"), "video": ("consistency",)}
"""Metrics from the features of a network, by generated modality."""


def known_metrics(target: str) -> set[str]:
    """Return the metrics of a generated modality."""
    known = {*MEDIA_METRICS.get(target, {}), *SIMILARITIES.get(target, {}), *SET_METRICS.get(target, ())}
    return known | (set(TEXT_METRICS) if target == "text" else set())


class MadeTask:
    """Generation of a direction's target from held-out prompts, and its metrics."""

    chunk = 16

    def __init__(self, subject: Subject, config: TaskConfig, sampling: SamplingConfig) -> None:
        self.config, self.source, self.sampling = config, require_source(config), config.sampling or sampling
        self.seed = config.seed or 0
        self.given, self.target = parts_of(config)
        self.modalities = subject.modalities
        if missing := [name for name in (*self.given, self.target) if name not in self.modalities]:
            remedy = f"use one of {', '.join(self.modalities)}"
            raise UserError(f"the model has no modality {missing[0]!r}", where=config.direction, remedy=remedy)
        if unknown := set(config.metrics) - known_metrics(self.target):
            remedy = f"use {', '.join(sorted(known_metrics(self.target)))}"
            raise UserError(f"{sorted(unknown)[0]} is not a metric of {self.target}", remedy=remedy)
        self.folders = {name: self._folder(name) for name in (*self.given, self.target)}
        self.numbers = {name: _whole_members(folder) for name, folder in self.folders.items()}
        keys = sorted(set.intersection(*(set(numbers) for numbers in self.numbers.values())))
        if not keys:
            raise UserError(f"no held-out samples for {config.direction}", where=self.source, remedy=NO_SAMPLES_REMEDY)
        order = np.random.default_rng([self.seed, len(keys)]).permutation(len(keys))
        self.keys = [keys[i] for i in order[: config.n]]
        self.count = len(self.keys)
        codec = getattr(self.modalities[self.target], "codec", None)
        self.measure = Measure(getattr(codec, "sample_rate", 16_000), config.tau, config.voxels)
        self._load_networks()

    def _folder(self, name: str) -> ShardFolder:
        folder = self.source / "heldout" / name
        if not folder.is_dir():
            raise UserError(f"the source has no {name}", where=folder, remedy="choose a direction of its modalities")
        return ShardFolder(folder)

    def _load_networks(self) -> None:
        """Load what the metrics need, so that a wrong folder is found before anything is generated."""
        wanted = set(self.config.metrics)
        for name in wanted & TEXT_METRICS.keys():
            TEXT_METRICS[name](["a word"], ["a word"])  # imports its package
        makers = SIMILARITIES.get(self.target, {})
        self.similarities: dict[str, Similarity] = {}
        for name in sorted(wanted & makers.keys()):
            if self.config.weights is None:
                remedy = "set `weights` to the folder of its model (docs/evaluation.md)"
                raise UserError(f"{name} needs a network", where=self.config.direction, remedy=remedy)
            self.similarities[name] = makers[name](self.config.weights)
        if wanted & set(SET_METRICS.get(self.target, ())):
            has_classes = self.network.compute is not None and self.network.name != PIXELS
            if "inception_score" in wanted and not has_classes:
                remedy = f"set `extractor: {LITE0}`, or the folder of an image classifier"
                raise UserError("inception_score needs a network with classes", remedy=remedy)

    @cached_property
    def network(self) -> ImageNetwork:
        return image_network(self.config.extractor or (PIXELS if self.target == "video" else LITE0))

    def medium(self, name: str, key: str) -> tuple[bytes, str]:
        """Return the bytes and the extension of a sample's medium."""
        folder, number = self.folders[name], self.numbers[name][key]
        return folder.read(number), folder.extensions[number]

    def _read(self, name: str, key: str) -> Any:
        return self.modalities[name].read_media(*self.medium(name, key))

    def compute(self, subject: Subject, items: Sequence[int], folder: Path) -> list[Record]:
        """Generate the items; with an empty `items`, only take part in what other ranks generate."""
        prompts = [[(name, self._read(name, self.keys[i])) for name in self.given] for i in items]
        first_seed = self.seed + (items[0] if items else 0)
        made = subject.generate(prompts, self.target, self.sampling, first_seed)
        return [
            self._record(i, medium, dict(prompt), folder)
            for i, medium, prompt in zip(items, made, prompts, strict=True)
        ]

    def _record(self, item: int, made: Any, prompt: Mapping[str, Any], folder: Path) -> Record:
        key, codec = self.keys[item], self.modalities[self.target]
        real = self._read(self.target, key)
        record: Record = {"key": key, "seed": self.seed + item, "prompt": prompt.get("text")}
        if self.target == "text":
            record |= {"made": made.strip(), "real": real.strip()}
        else:
            file = f"{item:05d}.{codec.extensions[0]}"
            folder.mkdir(parents=True, exist_ok=True)
            with new_file(folder / file) as output:
                output.write(codec.write_media(made))
            record["file"] = file
        values: dict[str, float | str] = {}
        for metric in self.config.metrics:
            if metric in TEXT_METRICS or metric in SET_METRICS.get("image", ()):
                continue
            try:
                values[metric] = self._value(metric, made, real, prompt.get("text") or "")
            except Unmeasurable as reason:
                values[metric] = str(reason)
        return record | {"values": values}

    def _value(self, metric: str, made: Any, real: Any, prompt: str) -> float:
        if metric in self.similarities:
            value = self.similarities[metric](made, real, prompt, self.measure)
        elif metric == "consistency":
            value = media_metrics.consistency(self.network(list(made))[0]) if len(made) else float("nan")
        else:
            value = MEDIA_METRICS[self.target][metric](made, real, self.measure)
        if not np.isfinite(value):
            raise Unmeasurable("the value is not finite")
        return value

    def figures(self, records: Sequence[Record]) -> Iterator[MetricFigure]:
        """Return the numbers of all items."""
        for metric in self.config.metrics:
            if metric in TEXT_METRICS:
                yield self._text(metric, records)
            elif metric in SET_METRICS.get("image", ()):
                continue
            else:
                found = [record["values"][metric] for record in records]
                reasons = dict(Counter(value for value in found if isinstance(value, str)))
                estimate = mean([value for value in found if not isinstance(value, str)])
                yield self._figure(metric, estimate, reasons)
        if any(metric in SET_METRICS["image"] for metric in self.config.metrics):
            yield from self._of_sets(records)

    def _text(self, metric: str, records: Sequence[Record]) -> MetricFigure:
        kept = [record for record in records if record["real"] or metric not in NEED_REFERENCE]
        left_out = {"an empty reference": len(records) - len(kept)} if len(kept) < len(records) else {}
        if not kept:
            return self._figure(metric, Estimate(None, None, 0), left_out)
        texts = np.array([(record["made"], record["real"]) for record in kept], dtype=object)
        estimate = jackknife(lambda which: TEXT_METRICS[metric](*texts[which].T.tolist()), len(kept), self.seed)
        return self._figure(metric, estimate, left_out)

    def _of_sets(self, records: Sequence[Record]) -> Iterator[MetricFigure]:
        """Return FID, KID and IS of all images."""
        folder, codec = self.made_folder, self.modalities[self.target]
        made, logits = self.network([codec.read_media((folder / r["file"]).read_bytes(), "png") for r in records])
        real, _ = self.network([self._read(self.target, record["key"]) for record in records])
        for metric in self.config.metrics:
            if metric == "inception_score":
                assert logits is not None
                yield self._of_set(metric, lambda which: set_metrics.inception_score(logits[which]), len(made))
            elif metric in ("fid", "kid"):
                yield from self._distance(metric, made, real)

    def _distance(
        self, metric: str, made: npt.NDArray[np.float64], real: npt.NDArray[np.float64]
    ) -> Iterator[MetricFigure]:
        note = None
        if metric == "fid" and len(made) < 2 * made.shape[1]:
            note = f"FID needs at least {2 * made.shape[1]} samples for {made.shape[1]} features; KID is given instead"
            yield replace(self._figure("fid", Estimate(None, None, len(made)), {}), note=note)
            if "kid" in self.config.metrics:
                return
            metric = "kid"
        distance = getattr(set_metrics, metric)
        figure = self._of_set(metric, lambda which: distance(made[which], real[which]), len(made))
        order = np.random.default_rng([self.seed, len(real), 2]).permutation(len(real))
        halves = real[order[: len(real) // 2]], real[order[len(real) // 2 :]]
        floor = distance(*halves) if len(halves[0]) > 1 else None
        yield replace(figure, floor=floor, note=note)

    def _of_set(self, metric: str, statistic: Any, n: int) -> MetricFigure:
        try:
            return self._figure(metric, jackknife(statistic, n, self.seed), {})
        except Unmeasurable as reason:
            return replace(self._figure(metric, Estimate(None, None, n), {}), note=str(reason))

    def _figure(self, metric: str, estimate: Estimate, left_out: dict[str, int]) -> MetricFigure:
        name, by = metric, None
        if metric in (*SET_METRICS["image"], *SET_METRICS["video"]):
            by = self.network.identity
        elif metric in self.similarities:
            assert self.config.weights is not None
            by = identity(self.config.weights)
        if by is not None:
            name = f"{metric}@{by['name']}"
        package = text_metrics.PACKAGES_OF.get(metric) or media_metrics.PACKAGES_OF.get(metric)
        return MetricFigure(
            name,
            estimate.value,
            estimate.standard_error,
            estimate.n,
            self.seed,
            self.source.name,
            self.config.direction,
            left_out,
            note="no sample could be measured" if estimate.n == 0 else None,
            extractor=by,
            versions=versions(package) if package else {},
        )

    made_folder = Path()
    """Where `compute` has written the media; set by the suite."""


def _whole_members(folder: ShardFolder) -> dict[str, int]:
    """Return key -> number of the members whose sample has one part of this modality."""
    parts, keys = folder.parts, list(folder.keys)
    return {key: i for i, key in enumerate(keys) if parts[i] == UNNUMBERED}
