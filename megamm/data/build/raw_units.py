"""Cuts the raw samples of a source into units of work, in build order, without holding all of them in memory.

In: what a reader yields. Out: files of UNIT_SAMPLES lines, one JSON line a sample, first those of the training split,
then the held-out ones; in each split in the order of the SHA-256 of the keys. The samples are sorted on disk: sorted
runs are merged (external merge sort). A unit is named after its number and the digest of its lines, which have the
size and time of every medium: what an earlier attempt has done is only kept if its input is still the same.
"""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from megamm.common.files import new_file
from megamm.data.build.heldout import Heldout, Rule, is_heldout
from megamm.data.raw.samples import Broken, ByteRange, Entry, Missing, NoData, RawPart, RawSample
from megamm.data.units.unit import Unit

UNIT_SAMPLES = 256
"""Samples of a unit; the shards do not depend on it."""
_RUN_SAMPLES = 100_000
"""Samples that are sorted in memory."""
_MERGED_RUNS = 64
"""Runs, and so open files, that are merged at a time."""


@dataclass
class RawUnits:
    """The units of a source and what its reader found besides; broken: in the order of the raw data."""

    units: list[Unit] = field(default_factory=list)
    samples: int = 0
    broken: list[Broken] = field(default_factory=list)
    no_data: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    has_text: bool = False


@dataclass(frozen=True)
class Shares:
    """Which samples are used and held out: the shares of BuildOptions, and the limit."""

    nouns: float
    combinations: float
    limit: int | None


@dataclass(frozen=True)
class UnitSample:
    """A sample of a unit, and the rule that holds it out, if any."""

    raw: RawSample
    rule: Rule | None


def cut(entries: Iterable[Entry], source: str, root: Path, folder: Path, shares: Shares) -> RawUnits:
    """Write the units of a source to a folder. root: the folder to which the paths of media are relative."""
    folder.mkdir(parents=True, exist_ok=True)
    found = RawUnits()
    broken: list[tuple[int, Broken]] = []
    chosen = folder / f"{source}.sorted"
    with chosen.open("w", encoding="ascii") as file:
        for line in islice(_unique(_sorted_lines(entries, folder, found, broken), found, broken), shares.limit):
            file.write(line)
            found.samples += 1
    found.broken = [entry for _, entry in sorted(broken, key=lambda item: item[0])]
    # Combinations of words are a matter of all captions, so this rule alone needs them all in memory.
    combinations = None
    if shares.combinations:
        combinations = Heldout.of((s for _, s in _read(chosen)), shares.nouns, shares.combinations).combinations
    for is_heldout_pass in (False, True):
        lines = _split_lines(chosen, root, shares.nouns, combinations, is_heldout_pass, found)
        # Training samples come first: of two samples that share a medium, the held-out one is dropped.
        name = f"{source}-{'heldout' if is_heldout_pass else 'train'}"
        while unit := list(islice(lines, UNIT_SAMPLES)):
            found.units.append(_write_unit(folder, f"{name}-{len(found.units):06d}", unit))
    chosen.unlink()
    return found


def read_unit(path: Path) -> Iterator[UnitSample]:
    """The samples of a unit."""
    with path.open("rb") as lines:
        for line in lines:
            entry = json.loads(line)
            yield UnitSample(_decode(entry), entry["rule"])


def _sorted_lines(
    entries: Iterable[Entry], folder: Path, found: RawUnits, broken: list[tuple[int, Broken]]
) -> Iterator[str]:
    """Lines "<SHA-256 of the key> <number> <sample>" of the usable samples, sorted; the others are noted."""
    levels: list[list[Path]] = [[]]
    run: list[str] = []
    count = 0
    for number, entry in enumerate(entries):
        if isinstance(entry, Broken):
            broken.append((number, entry))
        elif isinstance(entry, NoData):
            found.no_data[entry.kind] += 1
        else:
            digest = hashlib.sha256(entry.key.encode()).hexdigest()
            run.append(f"{digest} {number:015d} {json.dumps(_encode(entry))}\n")
            if len(run) == _RUN_SAMPLES:
                count += 1
                levels[0].append(_write_run(folder / f"run-{count}", sorted(run)))
                run.clear()
                # Merged by levels, like the digits of a number: a sample is rewritten once a level.
                for level, runs in enumerate(levels):
                    if len(runs) == _MERGED_RUNS:
                        count += 1
                        merged = _write_run(folder / f"run-{count}", _merged(runs))
                        levels[level] = []
                        if level + 1 == len(levels):
                            levels.append([])
                        levels[level + 1].append(merged)
    run.sort()
    yield from _merged([path for runs in levels for path in runs], run)


def _write_run(path: Path, lines: Iterable[str]) -> Path:
    with path.open("w", encoding="ascii") as file:
        file.writelines(lines)
    return path


def _merged(runs: list[Path], last: Iterable[str] = ()) -> Iterator[str]:
    """The lines of sorted runs, sorted; their files are deleted afterwards."""
    with ExitStack() as stack:
        yield from heapq.merge(*(stack.enter_context(run.open(encoding="ascii")) for run in runs), last)
    for run in runs:
        run.unlink()


def _unique(lines: Iterable[str], found: RawUnits, broken: list[tuple[int, Broken]]) -> Iterator[str]:
    """The first line of every key, in the order of the raw data; the others are broken."""
    before = ""
    for line in lines:
        digest, number, sample = line.split(" ", 2)
        if digest == before:
            broken.append((int(number), Broken(json.loads(sample)["key"], "duplicate key")))
            continue
        before = digest
        found.ignored.update(json.loads(sample)["ignored"])
        yield line


def _read(path: Path) -> Iterator[tuple[dict[str, Any], RawSample]]:
    """The samples of a sorted file, encoded and decoded."""
    with path.open(encoding="ascii") as lines:
        for line in lines:
            entry = json.loads(line.split(" ", 2)[2])
            yield entry, _decode(entry)


def _split_lines(
    path: Path, root: Path, nouns: float, combinations: frozenset[str] | None, is_heldout_pass: bool, found: RawUnits
) -> Iterator[str]:
    """The lines of the units of one split."""
    for entry, sample in _read(path):
        found.has_text |= any(part.modality == "text" for part in sample.parts)
        rule: Rule | None = None
        if is_heldout(sample.noun, nouns):
            rule = "noun"
        elif combinations and sample.key in combinations:
            rule = "combination"
        if (rule is not None) == is_heldout_pass:
            yield json.dumps(entry | {"rule": rule, "files": [_state(part, root) for part in sample.parts]}) + "\n"


def _state(part: RawPart, root: Path) -> tuple[int, int] | None:
    """Size and time of change of a medium's file; None for a text and for a file that is not there."""
    if part.modality == "text":
        return None
    return _stat(part.byte_range.file if part.byte_range else root / part.content)


@lru_cache(maxsize=1024)
def _stat(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None  # the check reports it
    return found.st_size, found.st_mtime_ns


def _write_unit(folder: Path, name: str, lines: list[str]) -> Unit:
    data = "".join(lines).encode("ascii")
    path = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}.jsonl"
    with new_file(path) as file:
        file.write(data)
    return Unit(path.stem, path)


def _encode(sample: RawSample) -> dict[str, Any]:
    """A sample as JSON."""
    parts = [
        (part.modality, part.content, (str(r.file), r.offset, r.size) if (r := part.byte_range) else None)
        for part in sample.parts
    ]
    missing = [(lost.modality, lost.reason) for lost in sample.missing]
    return {
        "key": sample.key,
        "noun": sample.noun,
        "parts": parts,
        "ordered": sample.ordered,
        "ignored": sample.ignored,
        "missing": missing,
    }


def _decode(entry: dict[str, Any]) -> RawSample:
    """The inverse of _encode."""
    parts = tuple(
        RawPart(modality, content, ByteRange(Path(inside[0]), *inside[1:]) if inside else None)
        for modality, content, inside in entry["parts"]
    )
    missing = tuple(Missing(*lost) for lost in entry["missing"])
    return RawSample(entry["key"], entry["noun"], parts, entry["ordered"], tuple(entry["ignored"]), missing)
