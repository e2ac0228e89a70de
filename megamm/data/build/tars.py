"""The units of work of a build that write tars: checked samples -> the shards of a source.

In: the checked units of a source (data/build/check_unit.py) and the refused samples. Out: FOLDER/<split>/<modality>/,
as `ShardWriter` would write them from first to last. Which samples are in which tar follows from the numbers of their
parts; each tar is then a unit of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megamm.data.build.admission import Refusal
from megamm.data.build.check_unit import StoredSample, read_checked
from megamm.data.build.report import BuildReport
from megamm.data.units.engines import UnitEngine, run_units
from megamm.data.units.unit import SAMPLES, Result, Stage, Unit
from megamm.shards.folder import SPLITS
from megamm.shards.tar_writer import join_tars, write_tar

_TAR_MEMBERS = 1000
"""Members of a tar; all those of one sample are in one."""


@dataclass
class TarTask:
    """One tar: its file, the modality of its members, and the rows of its samples in the checked units."""

    path: Path
    modality: str
    checked: Path
    rows: dict[str, list[int]] = field(default_factory=dict)
    members: int = 0


@dataclass
class _TarPlan:
    """The tars of one source by split and modality."""

    folder: Path
    checked: Path
    tars: dict[tuple[str, str], list[TarTask]] = field(default_factory=dict)

    def add(self, unit: str, row: int, sample: StoredSample) -> None:
        """Give a sample its place in the tars of its modalities."""
        for modality in dict.fromkeys(part.modality for part in sample.parts):
            if (sample.split, modality) not in self.tars:
                # Both splits, even if one stays empty: readers need not ask which folders exist.
                for split in SPLITS:
                    self.tars[split, modality] = [self._tar(split, modality, 0)]
            tars = self.tars[sample.split, modality]
            if tars[-1].members >= _TAR_MEMBERS:
                tars.append(self._tar(sample.split, modality, len(tars)))
            tars[-1].rows.setdefault(unit, []).append(row)
            tars[-1].members += sum(part.modality == modality for part in sample.parts)

    def _tar(self, split: str, modality: str, number: int) -> TarTask:
        folder = self.folder / split / f".{modality}.partial"
        return TarTask(folder / f"{number:06d}.tar", modality, self.checked)


def write_source(
    engine: UnitEngine,
    units: Sequence[Unit],
    checked: Path,
    work: Path,
    folder: Path,
    report: BuildReport,
    refusals: Mapping[int, Refusal],
    first: int,
) -> int:
    """Write a source's shards to FOLDER, and count its samples in the report; returns the number of the next sample.

    first: the number of the source's first sample among those of all sources; work: for what the stage keeps.
    """
    plan = _TarPlan(work / f"tars-{folder.name}", checked)
    for unit in units:
        for row, sample in enumerate(read_checked(checked, unit.name)):
            if not isinstance(sample, StoredSample):
                continue
            if refusal := refusals.get(first + row):
                report.skip(refusal.rule, sample.key, refusal.reason)
                continue
            plan.add(unit.name, row, sample)
            report.count(sample)
        first += row + 1
    tasks = [task for tars in plan.tars.values() for task in tars]
    named = [Unit("-".join((*task.path.parts[-3:-1], task.path.stem)), task) for task in tasks]
    run_units(engine, Stage(work / f"tar-{folder.name}", write_one), named)
    for (split, modality), tars in plan.tars.items():
        join_tars(tars[0].path.parent, len(tars), folder / split / modality)
    return first


def write_one(task: TarTask) -> Result:
    """Write one tar."""
    members = write_tar(task.path, ((key, ext, data, None) for key, ext, data in _members(task)))
    return {SAMPLES: len(members)}


def _members(task: TarTask) -> Iterator[tuple[str, str, bytes]]:
    """Key, extension and data of the members of a tar."""
    for unit, rows in task.rows.items():
        wanted = set(rows)
        with (task.checked / f"{unit}.data").open("rb") as data:
            for row, sample in enumerate(read_checked(task.checked, unit)):
                if row not in wanted:
                    continue
                assert isinstance(sample, StoredSample)
                for number, part in enumerate(sample.parts):
                    if part.modality == task.modality:
                        data.seek(part.offset)
                        # The number is the part's position in the whole document, over all modalities.
                        ext = f"{number}.{part.ext}" if sample.is_ordered else part.ext
                        yield sample.key, ext, data.read(part.size)
