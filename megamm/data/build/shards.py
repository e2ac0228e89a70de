"""Builds shards from raw samples: `megamm data build RAW/<source>... --to SHARDS`.

In: raw data in a format of data/raw/readers.py, by default folders with a `samples.jsonl` (data/raw/samples.py). Out,
for each source: SHARDS/<source>/<train|heldout>/<modality>/ (shards/folder.py), `report.json` (counts; every skipped
sample with its reason) and `ATTRIBUTION.md`; SHARDS contains both merged. A sample's parts are members `<key>.<ext>`,
or `<key>.<number>.<ext>` if interleaved, each in the folder of its modality.
Every medium is decoded fully; identical samples are kept once; a noun or a medium is in one split only. The same input
gives the same bytes. The order in each split is that of the SHA-256 of the keys, so --limit takes a random subset.
The work is done in named units (data/units/): units of samples are checked, those to keep are chosen over all of them,
and units of tars are written. No process holds all samples, and a killed build continues with what it has finished.
Two rules hold samples out (data/build/heldout.py): by noun, and by combination of words that all occur in training.
"""

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megamm.common.errors import UserError
from megamm.data.build import curation
from megamm.data.build.admission import refused
from megamm.data.build.check_unit import CheckTask, check_unit, read_checked
from megamm.data.build.curation import CurationOptions
from megamm.data.build.media_check import MediaChecks, SkippedSample
from megamm.data.build.raw_units import RawUnits, Shares, cut
from megamm.data.build.report import BuildReport, merge_reports
from megamm.data.build.tars import write_source
from megamm.data.raw.extensions import OTHER
from megamm.data.raw.readers import READERS, media_root, source_name
from megamm.data.units.engines import UnitEngine, open_engine, run_units
from megamm.data.units.unit import KilledUnit, Stage, Unit
from megamm.modalities import REGISTRY

logger = logging.getLogger(__name__)

_SAMPLES_PER_WORKER = 200
"""A worker process takes about three seconds to start, so it is not started for fewer samples."""
_OF_ALL = ("report.json", "ATTRIBUTION.md")
"""Files in SHARDS beside the folders of the sources."""
_FORMAT = 1
"""Version of the files that a build in progress keeps: those of another one are not used."""


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


def build(raws: list[Path], shards: Path, options: BuildOptions, workers: int | None = None) -> list[BuildReport]:
    """Build every source, then rename all at once. A UserError leaves SHARDS unchanged.

    workers: processes, 0 = only this one, None = one a core. What a killed build has finished is kept in SHARDS,
    and the same command continues from there.
    """
    _check_names(raws, shards)
    shards.mkdir(parents=True, exist_ok=True)
    raws = [raw.resolve() for raw in raws]
    with _work_folder(shards, repr((_FORMAT, [str(raw) for raw in raws], options))) as work:
        sources = [_read(raw, work, options) for raw in raws]
        if workers is None:
            most = sum(source.cut.samples for source in sources) // _SAMPLES_PER_WORKER
            workers = min(len(os.sched_getaffinity(0)), most)
        with open_engine(workers) as opened:
            built = _build_sources(sources, work, options, opened)
        # Each rename is atomic; the sources are complete before the first one gets its name.
        for source in sources:
            (built / source.name).rename(shards / source.name)
    merge_reports(shards)
    return [source.report for source in sources]


@contextmanager
def _work_folder(shards: Path, settings: str) -> Iterator[Path]:
    """The folder of a build in progress, of the same name for the same settings; removed at the end.

    It stays if the process or a unit's worker is killed. Raises UserError if another build is using it.
    """
    work = shards / f".build-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"
    work.mkdir(exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            remedy = "wait for it, or choose another --to"
            raise UserError("the same build is running", where=shards, remedy=remedy) from error
        try:
            yield work
        except (KilledUnit, KeyboardInterrupt, SystemExit):
            logger.warning("%s: finished units are kept; the same command continues from there", work)
            raise
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work)


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


@dataclass
class _Source:
    """A source while it is built: its raw data, units and report."""

    raw: Path
    name: str
    cut: RawUnits
    report: BuildReport


def _build_sources(sources: list[_Source], work: Path, options: BuildOptions, engine: UnitEngine) -> Path:
    """Check the samples of all sources, choose those to keep, and write each source's folder; returns where."""
    checked = work / "checked"
    for source in sources:
        root, may_miss = media_root(source.raw), frozenset(options.allow_missing)
        checks = MediaChecks(root, options.image_size, options.curation, may_miss, dict(REGISTRY))
        units = [Unit(u.name, CheckTask(u.argument, source.name, checked, checks)) for u in source.cut.units]
        run_units(engine, Stage(work / "check", check_unit), units)
        _require_few_broken(source, checked, options.max_broken)
    # One admission for all sources of the command: a sample in two sources is stored once.
    names = [unit.name for source in sources for unit in source.cut.units]
    counts = [sum(1 for _ in read_checked(checked, name)) for name in names]
    # What follows depends on all units, so its folder does.
    rest = work / f"of-{hashlib.sha256(' '.join(names).encode()).hexdigest()[:16]}"
    units_of_facts = [checked / name for name in names]
    refusals = refused(engine, rest, units_of_facts, counts, options.curation.near_duplicates)
    first = 0
    for source in sources:
        folder = rest / source.name
        first = write_source(engine, source.cut.units, checked, rest, folder, source.report, refusals, first)
        source.report.write(folder)
        # Licences require the attribution to stay with the data.
        credits = media_root(source.raw) / "ATTRIBUTION.md"
        if credits.is_file():
            (folder / credits.name).write_bytes(credits.read_bytes())
    return rest


def _require_few_broken(source: _Source, checked: Path, most: float) -> None:
    """Note the samples that a rule skips. Raises UserError if too many are broken."""
    report = source.report
    for unit in source.cut.units:
        for sample in read_checked(checked, unit.name):
            if isinstance(sample, SkippedSample):
                report.skip(sample.rule, sample.what, sample.reason)
    # Only broken samples count against the limit: rules and duplicates are expected to skip some.
    broken = len(report.left_out["broken"])
    if broken > most * report.samples:
        what = f"{broken} of {report.samples} samples are broken, more than {most:.1%}"
        reasons = "; ".join(str(reason) for reason in report.reasons("broken")[:3])
        remedy = f"{reasons}; fix or remove them, or raise --max-broken; nothing was written"
        raise UserError(what, where=source.raw, remedy=remedy)


def _read(raw: Path, work: Path, options: BuildOptions) -> _Source:
    """Read a source's samples, and cut the usable ones into units; the report counts the others."""
    report = BuildReport(source_name(raw), curation=curation.parameters(options.curation))
    spool = work / f".{report.source}.spool"
    shutil.rmtree(spool, ignore_errors=True)
    spool.mkdir()
    entries = READERS[options.form](raw, spool, frozenset(options.allow_missing))
    shares = Shares(options.heldout, options.heldout_combinations, options.limit)
    units = cut(entries, report.source, media_root(raw), work / "raw", shares)
    for entry in units.broken:
        report.skip("broken", entry.what, entry.reason)
    report.no_data = units.no_data
    report.samples = units.samples + len(units.broken)
    report.ignored_fields = dict(sorted(units.ignored.items()))
    if units.ignored:
        logger.warning("%s: ignoring unknown fields: %s", report.source, ", ".join(report.ignored_fields))
        if not units.has_text:
            logger.warning("%s: no sample has text; if one of these fields is the text, call it text", report.source)
    if not units.samples:
        raise UserError("no usable sample", where=raw, remedy=report.first_reason())
    logger.info("%s: %d samples in %d units", report.source, units.samples, len(units.units))
    return _Source(raw, report.source, units, report)
