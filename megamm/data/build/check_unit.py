"""The unit of work of a build that decodes: raw samples -> their checked bytes, what the report says, and facts.

In: a unit of data/build/raw_units.py. Out, in CHECKED/: `<unit>.data`, the bytes of all parts; `<unit>.jsonl`, one line
a sample with the places of its parts in there, or why it is skipped; the facts of `data/build/admission.py`, by which
duplicates are found over all units.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamm.common.files import new_file
from megamm.data.build.admission import Facts, write_facts
from megamm.data.build.heldout import Rule
from megamm.data.build.media_check import CheckedPart, CheckedSample, MediaChecks, SkippedSample, check_sample
from megamm.data.build.raw_units import UnitSample, read_unit
from megamm.data.raw.samples import Missing
from megamm.data.units.unit import SAMPLES, Result
from megamm.shards.tar_writer import disk_errors


@dataclass(frozen=True)
class CheckTask:
    """The unit's file, the source's name, the folder for the results, and the settings."""

    unit: Path
    source: str
    folder: Path
    checks: MediaChecks


@dataclass(frozen=True)
class CheckedBytes:
    """A part of a checked sample: its place in the unit's data."""

    modality: str
    ext: str
    offset: int
    size: int


@dataclass(frozen=True)
class StoredSample:
    """A checked sample: what the shards and the report need of it."""

    key: str
    rule: Rule | None
    is_ordered: bool
    parts: tuple[CheckedBytes, ...]
    masked: Counter[str]
    missing: tuple[Missing, ...]

    @property
    def split(self) -> str:
        """The split that the sample belongs to."""
        return "train" if self.rule is None else "heldout"


def check_unit(task: CheckTask) -> Result:
    """Check the samples of a unit."""
    samples, facts = 0, list[Facts | None]()
    task.folder.mkdir(parents=True, exist_ok=True)
    name = task.unit.stem
    with (
        disk_errors(task.folder),
        new_file(task.folder / f"{name}.data") as data,
        new_file(task.folder / f"{name}.jsonl") as lines,
    ):
        for sample in read_unit(task.unit):
            checked = check_sample(sample.raw, task.checks)
            if isinstance(checked, SkippedSample):
                lines.write(_line({"skipped": asdict(checked)}))
                facts.append(None)
            else:
                parts = [(part.modality, part.ext, data.tell(), data.write(part.data)) for part in checked.parts]
                lines.write(_line(_fields(sample, checked) | {"parts": parts}))
                facts.append(_facts(task.source, sample, checked))
            samples += 1
        write_facts(task.folder / name, facts)
    return {SAMPLES: samples}


def read_checked(folder: Path, unit: str) -> Iterator[StoredSample | SkippedSample]:
    """The checked samples of a unit, in order."""
    with (folder / f"{unit}.jsonl").open("rb") as lines:
        for line in lines:
            entry = json.loads(line)
            if "skipped" in entry:
                yield SkippedSample(**entry["skipped"])
                continue
            entry["parts"] = tuple(CheckedBytes(*part) for part in entry["parts"])
            entry["missing"] = tuple(Missing(*lost) for lost in entry["missing"])
            entry["masked"] = Counter(entry["masked"])
            yield StoredSample(**entry)


def _fields(sample: UnitSample, checked: CheckedSample) -> dict[str, Any]:
    return {
        "key": sample.raw.key,
        "rule": sample.rule,
        "is_ordered": sample.raw.ordered,
        "masked": checked.masked,
        "missing": [(lost.modality, lost.reason) for lost in checked.missing],
    }


def _line(entry: dict[str, Any]) -> bytes:
    return (json.dumps(entry) + "\n").encode("ascii")


def _facts(source: str, sample: UnitSample, checked: CheckedSample) -> Facts:
    return Facts(
        f"{source}/{sample.raw.key}",
        "train" if sample.rule is None else "heldout",
        "\n".join(_identity(part) for part in checked.parts),
        tuple((part.digest, part.modality) for part in checked.parts if part.modality != "text"),
        None if checked.sketch is None else checked.sketch.astype("<u4").tobytes().hex(),
    )


def _identity(part: CheckedPart) -> str:
    # Digests of decoded content: the same picture in two files, with other metadata, is one.
    return f"{part.modality} {part.digest}"
