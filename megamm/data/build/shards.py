"""Builds shards from raw samples: `megamm data build RAW/<source>... --to SHARDS`.

In: raw data in a format of data/raw/readers.py, by default folders with a `samples.jsonl` (data/raw/samples.py). Out,
for each source: SHARDS/<source>/<train|heldout>/<modality>/ (shards/folder.py), `report.json` (counts; every skipped
sample with its reason) and `ATTRIBUTION.md`; SHARDS contains both merged. A sample's parts are members `<key>.<ext>`,
or `<key>.<number>.<ext>` if interleaved, each in the folder of its modality.
Every medium is decoded fully; identical samples are kept once; a noun or a medium is in one split only. The same input
gives the same bytes. The order in each split is that of the SHA-256 of the keys, so --limit takes a random subset.
Two rules hold samples out (data/build/heldout.py): by noun, and by combination of words that all occur in training.
"""

import hashlib
import logging
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megamm.common.errors import UserError
from megamm.data.build import curation
from megamm.data.build.curation import CurationOptions, NearDuplicates
from megamm.data.build.heldout import Heldout
from megamm.data.build.media_check import CheckedSample, MediaChecks, SkippedSample, check_sample
from megamm.data.build.report import BuildReport, merge_reports
from megamm.data.raw.extensions import OTHER
from megamm.data.raw.readers import READERS, media_root, source_name
from megamm.data.raw.samples import Broken, NoData, RawSample
from megamm.modalities import REGISTRY
from megamm.shards.folder import SPLITS, ShardWriter

logger = logging.getLogger(__name__)

_SAMPLES_PER_WORKER = 200
"""A worker process takes about three seconds to start, so it is not started for fewer samples."""
_OF_ALL = ("report.json", "ATTRIBUTION.md")
"""Files in SHARDS beside the folders of the sources."""
_AHEAD = 32
"""Samples per worker that are checked ahead of writing; they wait in memory."""


@dataclass(frozen=True)
class BuildOptions:
    """heldout: share of nouns; heldout_combinations: share of the captions of the other nouns; max_broken: share of
    samples; limit: samples per source; image_size: pixels (drawings).

    form: format of the raw data (`readers.READERS`); curation: rules that samples have to pass; allow_missing:
    modalities without which a sample is still used (OTHER: files of unknown kinds).
    """

    heldout: float = 0.05
    heldout_combinations: float = 0.0
    max_broken: float = 0.02
    limit: int | None = None
    image_size: int = 128
    form: str = "samples"
    curation: CurationOptions = field(default_factory=CurationOptions)
    allow_missing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("heldout", "heldout_combinations", "max_broken"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}", remedy="give a number from 0 to 1")
        if self.image_size < 1 or (self.limit is not None and self.limit < 1):
            raise UserError("image_size and limit must be at least 1", remedy="give a positive number")
        for modality in self.allow_missing:
            if modality not in (*REGISTRY, OTHER):
                remedy = f"choose from {', '.join((*REGISTRY, OTHER))}"
                raise UserError(f"allow_missing: unknown modality {modality!r}", remedy=remedy)
        if self.form not in READERS:
            raise UserError(f"unknown raw data format {self.form!r}", remedy=f"choose from {', '.join(READERS)}")


class _Seen:
    """Samples and media already in the shards of a build, so that nothing is stored twice or in both splits."""

    def __init__(self, near_duplicates: float) -> None:
        self.samples: dict[bytes, str] = {}
        self.media: dict[str, str] = {}
        """The split of each medium, by its digest."""
        self.texts = NearDuplicates(near_duplicates)

    def admit(self, name: str, sample: CheckedSample, split: str) -> tuple[str, str] | None:
        """Register the sample; if it is skipped, return the rule and the reason."""
        content = "\n".join(f"{part.modality} {part.digest}" for part in sample.parts)
        # Digests of decoded content: the same picture in two files, with other metadata, is one.
        identity = hashlib.sha256(content.encode()).digest()
        if identity in self.samples:
            return "duplicates", f"identical to {self.samples[identity]}"
        # Texts may repeat in both splits: many captions are common phrases.
        media = {part.digest: part.modality for part in sample.parts if part.modality != "text"}
        for digest, modality in media.items():
            if self.media.get(digest, split) != split:
                return "leaks", f"its {modality} is in the {self.media[digest]} split"
        if sample.sketch is not None:
            # Checked before the exact identity is stored, so a skipped sample leaves no trace.
            if near := self.texts.find(sample.sketch):
                return "near_duplicates", f"similarity {near[1]:.2f} to {near[0]}"
            self.texts.add(name, sample.sketch)
        self.samples[identity] = name
        self.media |= dict.fromkeys(media, split)
        return None


class _SplitWriters:
    """The shard writers of one source; a modality's folders are created, in both splits, with its first part."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._writers: dict[tuple[str, str], ShardWriter] = {}

    def add(self, split: str, raw: RawSample, sample: CheckedSample) -> None:
        """Write the parts of a sample to the folders of their modalities."""
        for number, part in enumerate(sample.parts):
            if (split, part.modality) not in self._writers:
                # Both splits, even if one stays empty: readers need not ask which folders exist.
                for name in SPLITS:
                    writer = ShardWriter(self._folder / name / part.modality)
                    self._writers[name, part.modality] = self._stack.enter_context(writer)
            # The number is the part's position in the whole document, over all modalities.
            ext = f"{number}.{part.ext}" if raw.ordered else part.ext
            self._writers[split, part.modality].add(raw.key, ext, part.data)


def build(raws: list[Path], shards: Path, options: BuildOptions, workers: int | None = None) -> list[BuildReport]:
    """Build every source, then rename all at once. A UserError leaves SHARDS unchanged. workers: None = all cores."""
    _check_names(raws, shards)
    shards.mkdir(parents=True, exist_ok=True)
    # One for all sources of the command: a sample in two sources is stored once.
    seen = _Seen(options.curation.near_duplicates)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=shards) as temporary:
        work = Path(temporary)
        reports = [_build_source(raw.resolve(), work, options, seen, workers) for raw in raws]
        # Each rename is atomic; the sources are complete before the first one gets its name.
        for report in reports:
            (work / report.source).rename(shards / report.source)
    merge_reports(shards)
    return reports


def _check_names(raws: list[Path], shards: Path) -> None:
    """Raise UserError unless every source gets a folder of its own in SHARDS, which does not exist yet."""
    named: dict[str, Path] = {}
    for raw in raws:
        name, target = source_name(raw), shards / source_name(raw)
        if not name or name.startswith(".") or name in _OF_ALL:
            raise UserError(f"a source cannot be called {name!r}", where=raw, remedy="rename this raw folder or file")
        if name in named:
            remedy = "rename one of them, or build each into a --to of its own: a source is named after its raw data"
            raise UserError(f"two sources are called {name!r}", where=f"{named[name]}, {raw}", remedy=remedy)
        if target.resolve() == raw.resolve():
            raise UserError("the shards would replace the raw data", where=raw, remedy="choose another --to")
        if os.path.lexists(target):
            remedy = "delete that folder to rebuild it, or choose another --to"
            raise UserError("this source is already built", where=target, remedy=remedy)
        named[name] = raw


def _build_source(raw: Path, work: Path, options: BuildOptions, seen: _Seen, workers: int | None) -> BuildReport:
    """Build one source in the folder `work`; returns its report."""
    report = BuildReport(source_name(raw), curation=curation.parameters(options.curation))
    folder, spool = work / report.source, work / f".{report.source}.spool"
    spool.mkdir()
    # Keys, texts and paths of all samples are in memory; media are read one by one.
    samples, heldout = _read(raw, spool, options, report)
    may_miss = frozenset(options.allow_missing)
    checks = MediaChecks(media_root(raw), options.image_size, options.curation, may_miss, dict(REGISTRY))
    with ExitStack() as stack:
        writers = _SplitWriters(folder, stack)
        # In build order, so that of two duplicates the same one is kept whichever worker finishes first.
        for sample, checked in zip(samples, _checked(samples, checks, workers), strict=True):
            if isinstance(checked, SkippedSample):
                report.skip(checked.rule, checked.what, checked.reason)
                continue
            split = "heldout" if sample.key in heldout else "train"
            if refused := seen.admit(f"{report.source}/{sample.key}", checked, split):
                report.skip(refused[0], sample.key, refused[1])
                continue
            writers.add(split, sample, checked)
            report.count(split, sample.key, checked)
            if split == "heldout":
                report.heldout_by[heldout.rule(sample.key)].append(sample.key)
        # Only broken samples count against the limit: rules and duplicates are expected to skip some.
        broken = len(report.left_out["broken"])
        if broken > options.max_broken * report.samples:
            what = f"{broken} of {report.samples} samples are broken, more than {options.max_broken:.1%}"
            reasons = "; ".join(str(reason) for reason in report.reasons("broken")[:3])
            remedy = f"{reasons}; fix or remove them, or raise --max-broken; nothing was written"
            raise UserError(what, where=raw, remedy=remedy)
    report.write(folder)
    # Licences require the attribution to stay with the data.
    credits = media_root(raw) / "ATTRIBUTION.md"
    if credits.is_file():
        (folder / credits.name).write_bytes(credits.read_bytes())
    return report


def _read(raw: Path, spool: Path, options: BuildOptions, report: BuildReport) -> tuple[list[RawSample], Heldout]:
    """Read the usable samples in build order, and choose the held-out ones; the report counts the others."""
    samples: dict[str, RawSample] = {}
    broken: list[Broken] = []
    ignored: Counter[str] = Counter()
    for entry in READERS[options.form](raw, spool, frozenset(options.allow_missing)):
        if isinstance(entry, Broken):
            broken.append(entry)
        elif isinstance(entry, NoData):
            report.no_data[entry.kind] += 1
        elif entry.key in samples:
            broken.append(Broken(entry.key, "duplicate key"))
        else:
            samples[entry.key] = entry
            ignored.update(entry.ignored)
    for entry in broken:
        report.skip("broken", entry.what, entry.reason)
    chosen = sorted(samples, key=lambda key: hashlib.sha256(key.encode()).digest())[: options.limit]
    heldout = Heldout.of([samples[key] for key in chosen], options.heldout, options.heldout_combinations)
    # Training samples come first: of two samples that share a medium, the held-out one is dropped.
    chosen.sort(key=heldout.__contains__)
    report.samples = len(chosen) + len(broken)
    report.ignored_fields = dict(sorted(ignored.items()))
    if ignored:
        logger.warning("%s: ignoring unknown fields: %s", report.source, ", ".join(report.ignored_fields))
        if not any(part.modality == "text" for key in chosen for part in samples[key].parts):
            logger.warning("%s: no sample has text; if one of these fields is the text, call it text", report.source)
    if not chosen:
        raise UserError("no usable sample", where=raw, remedy=report.first_reason())
    return [samples[key] for key in chosen], heldout


def _checked(
    samples: list[RawSample], checks: MediaChecks, workers: int | None
) -> Iterator[CheckedSample | SkippedSample]:
    """Run check_sample on every sample, in order; in worker processes if there are enough samples."""
    check = partial(check_sample, checks=checks)
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), len(samples) // _SAMPLES_PER_WORKER)
    where = f"{workers} worker processes" if workers else "in process"
    logger.info("%s: %d samples, %s", checks.root.name, len(samples), where)
    if not workers:
        yield from map(check, samples)
        return
    # "spawn": a forked child of a process with threads (torch, image libraries) can hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            # pool.map submits everything at once, so pass limited slices: the results contain the media.
            for start in range(0, len(samples), _AHEAD * workers):
                yield from pool.map(check, samples[start : start + _AHEAD * workers], chunksize=4)
        except BrokenProcessPool as error:
            remedy = "probably out of memory: find the sample with --limit, or remove the largest samples"
            raise UserError("a worker process was killed", where=checks.root, remedy=remedy) from error
