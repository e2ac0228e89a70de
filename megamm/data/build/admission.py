"""Which samples are kept: identical ones once, near-duplicate texts once, a medium in one split only; over all units.

In: the facts of every sample, a file a unit. Out: the samples that are refused, with rule and reason. The samples are
considered in order, and the first of two is kept. Only samples that share a hash with another can be refused, or be the
reason for it, so the work is cut by hash (stage `hashes`: each unit takes a range of all hashes and finds the samples
that share one) and then by connected samples (stage `admission`: each unit takes some groups, of which no two share
a hash, and considers the samples of each in order). The result is that of one process that considers all samples.
The memory of the process that asks grows with the number of samples that share a hash, 16 bytes for each, and a unit's
with that of its share.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash

from megamm.common.files import new_file
from megamm.common.sample import IntArray
from megamm.data.build.curation import NearDuplicates, Signature, bands
from megamm.data.units.engines import UnitEngine, run_units
from megamm.data.units.unit import SAMPLES, Result, Stage, Unit

_RANGE_HASHES = 1 << 21
"""Hashes of a unit of the first stage, about."""
_GROUPED_SAMPLES = 4096
"""Samples of a unit of the second stage, about."""


@dataclass(frozen=True)
class Facts:
    """What admission needs to know of a sample.

    identity: equal for equal samples; media: digest and modality of each medium; sketch: MinHash of its text, in hex.
    """

    name: str
    split: str
    identity: str
    media: tuple[tuple[str, str], ...]
    sketch: str | None

    @property
    def signature(self) -> Signature | None:
        """The MinHash signature of the text."""
        return None if self.sketch is None else np.frombuffer(bytes.fromhex(self.sketch), dtype="<u4")

    def hashes(self) -> list[int]:
        """The 64-bit hashes of all that another sample may share. Equal hashes of different things only cost time."""
        found = [f"identity {self.identity}".encode()]
        found += [f"{modality} {digest}".encode() for digest, modality in self.media]
        if (signature := self.signature) is not None:
            found += [b"band %d " % start + band for start, band in bands(signature)]
        return [xxhash.xxh3_64_intdigest(data) for data in found]


@dataclass(frozen=True)
class Refusal:
    """A refused sample: the rule and the reason."""

    rule: str
    reason: str


class Admission:
    """The samples admitted so far, so that nothing is stored twice or in both splits."""

    def __init__(self, near_duplicates: float) -> None:
        self.samples: dict[bytes, str] = {}
        self.media: dict[str, str] = {}
        """The split of each medium, by its digest."""
        self.texts = NearDuplicates(near_duplicates)

    def admit(self, sample: Facts) -> Refusal | None:
        """Register the sample, or return why it is refused."""
        identity = hashlib.sha256(sample.identity.encode()).digest()
        if identity in self.samples:
            return Refusal("duplicates", f"identical to {self.samples[identity]}")
        # Texts may repeat in both splits: many captions are common phrases.
        media = dict(sample.media)
        for digest, modality in media.items():
            if self.media.get(digest, sample.split) != sample.split:
                return Refusal("leaks", f"its {modality} is in the {self.media[digest]} split")
        if (signature := sample.signature) is not None:
            # Checked before the exact identity is stored, so a refused sample leaves no trace.
            if near := self.texts.find(signature):
                return Refusal("near_duplicates", f"similarity {near[1]:.2f} to {near[0]}")
            self.texts.add(sample.name, signature)
        self.samples[identity] = sample.name
        self.media |= dict.fromkeys(media, sample.split)
        return None


def write_facts(base: Path, facts: Sequence[Facts | None]) -> None:
    """Write the facts of a unit's samples, None for a skipped one: BASE.facts, .rows.npy and .hashes.npy."""
    hashes = [(value, row) for row, sample in enumerate(facts) if sample for value in set(sample.hashes())]
    array = np.array(hashes, dtype=np.uint64).reshape(-1, 2)
    rows = [0]
    with new_file(base.with_name(f"{base.name}.facts")) as file:
        for sample in facts:
            data = json.dumps(astuple(sample)).encode("ascii") if sample else b""
            file.write(data)
            rows.append(rows[-1] + len(data))
    _save(base.with_name(f"{base.name}.rows.npy"), np.array(rows, dtype=np.int64))
    # Hashes and rows apart, and sorted: a range of hashes is one slice of each.
    _save(base.with_name(f"{base.name}.hashes.npy"), np.ascontiguousarray(array[array[:, 0].argsort()].T))


def refused(
    engine: UnitEngine, work: Path, units: Sequence[Path], samples: Sequence[int], near_duplicates: float
) -> dict[int, Refusal]:
    """The refused samples by number, counted through all units.

    units: the facts of each unit, as given to `write_facts`; samples: number of samples of each; work: a folder for
    what these stages keep, which depends on the units.
    """
    work.mkdir(parents=True, exist_ok=True)
    starts = np.concatenate(([0], np.cumsum(samples, dtype=np.int64)))
    listed = work / "units.json"
    with new_file(listed) as file:
        file.write(json.dumps([[str(unit), int(start)] for unit, start in zip(units, starts, strict=False)]).encode())
    total = sum(np.load(_hashes(unit), mmap_mode="r").shape[1] for unit in units)
    ranges = max(1, total // _RANGE_HASHES)
    bounds = [number * 2**64 // ranges for number in range(ranges + 1)]
    tasks = [
        Unit(f"{number:06d}-of-{ranges}", HashRange(listed, work / f"shared-{number:06d}.npy", *bounds[number:][:2]))
        for number in range(ranges)
    ]
    run_units(engine, Stage(work / "hashes", find_shared), tasks)
    edges = np.concatenate([np.load(task.argument.out) for task in tasks])
    found: dict[int, Refusal] = {}
    groups = [
        Unit(
            f"{number:06d}",
            SampleGroups(
                listed, _saved_groups(work, number, members), work / f"refused-{number:06d}.json", near_duplicates
            ),
        )
        for number, members in enumerate(_batches(edges))
    ]
    run_units(engine, Stage(work / "admission", admit_groups), groups)
    for unit in groups:
        for number, rule, reason in json.loads(unit.argument.out.read_bytes()):
            found[number] = Refusal(rule, reason)
    return found


@dataclass(frozen=True)
class HashRange:
    """Finds the samples that share a hash from `first` to before `end`. units: list of them; out: for the pairs."""

    units: Path
    out: Path
    first: int
    end: int


def find_shared(task: HashRange) -> Result:
    """Write pairs of samples `[pairs, 2]`: of each shared hash, the first sample that has it with each other one."""
    hashes, numbers = [], []
    for path, start in json.loads(task.units.read_bytes()):
        values, rows = np.load(_hashes(Path(path)), mmap_mode="r")
        # Compared as Python integers: 2**64 does not fit into a 64-bit number.
        low = int(values.searchsorted(np.uint64(task.first)))
        high = len(values) if task.end == 2**64 else int(values.searchsorted(np.uint64(task.end)))
        hashes.append(np.array(values[low:high]))
        numbers.append(rows[low:high].astype(np.int64) + start)
    value, number = np.concatenate(hashes), np.concatenate(numbers)
    order = np.lexsort((number, value))
    value, number = value[order], number[order]
    repeats = np.flatnonzero(value[1:] == value[:-1]) + 1
    begins = np.concatenate(([True], value[1:] != value[:-1])) if len(value) else np.zeros(0, dtype=bool)
    first = np.maximum.accumulate(np.where(begins, np.arange(len(value)), 0))
    pairs = np.unique(np.stack((number[first[repeats]], number[repeats]), axis=1), axis=0)
    _save(task.out, pairs.reshape(-1, 2))
    return {SAMPLES: 0, "pairs": len(pairs)}


@dataclass(frozen=True)
class SampleGroups:
    """Groups of samples to consider. units: list of the units; groups: a file of numbers; out: for the refusals."""

    units: Path
    groups: Path
    out: Path
    near_duplicates: float


def admit_groups(task: SampleGroups) -> Result:
    """Write [number, rule, reason] of the refused samples of some groups."""
    units = json.loads(task.units.read_bytes())
    starts = np.array([start for _, start in units], dtype=np.int64)
    group, number = np.load(task.groups)
    refusals, admission = [], Admission(task.near_duplicates)
    for i in range(len(number)):
        if i and group[i] != group[i - 1]:
            admission = Admission(task.near_duplicates)  # groups share nothing
        unit = int(starts.searchsorted(number[i], side="right")) - 1
        facts = _read_facts(Path(units[unit][0]), int(number[i] - starts[unit]))
        if refusal := admission.admit(facts):
            refusals.append([int(number[i]), refusal.rule, refusal.reason])
    with new_file(task.out) as file:
        file.write(json.dumps(refusals).encode())
    return {SAMPLES: len(number)}


def _batches(edges: IntArray) -> Iterator[np.ndarray]:
    """Groups of connected samples, some of them at a time: group and number of each sample `[2, samples]`, in order."""
    if not len(edges):
        return
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers, ends = np.unique(edges, return_inverse=True)
    left, right = ends.reshape(-1, 2).T
    graph = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(len(numbers), len(numbers)))
    _, label = connected_components(graph, directed=False)
    order = np.lexsort((numbers, label))
    label, numbers = label[order], numbers[order]
    begins = np.flatnonzero(np.concatenate(([True], label[1:] != label[:-1])))
    start = 0
    for end in [*begins[1:].tolist(), len(label)]:
        if end - start >= _GROUPED_SAMPLES or end == len(label):
            yield np.stack((label[start:end], numbers[start:end]))
            start = end


def _saved_groups(work: Path, number: int, members: np.ndarray) -> Path:
    path = work / f"groups-{number:06d}.npy"
    _save(path, members)
    return path


@lru_cache(maxsize=256)
def _rows(unit: Path) -> tuple[bytes, IntArray]:
    """The facts of a unit's samples, and where each one is in there."""
    facts = unit.with_name(f"{unit.name}.facts").read_bytes()
    return facts, np.load(unit.with_name(f"{unit.name}.rows.npy"))


def _read_facts(unit: Path, row: int) -> Facts:
    facts, rows = _rows(unit)
    name, split, identity, media, sketch = json.loads(facts[rows[row] : rows[row + 1]])
    return Facts(name, split, identity, tuple((digest, modality) for digest, modality in media), sketch)


def _hashes(unit: Path) -> Path:
    return unit.with_name(f"{unit.name}.hashes.npy")


def _save(path: Path, array: np.ndarray) -> None:
    with new_file(path) as file:
        np.save(file, array)
