"""The final check of every conversion: a native checkpoint and a transformers folder are the same model.

In order: digests of both; config, names and shapes, with no missing and no extra tensor; every tensor bit for bit
(after one dtype conversion where the two sides differ), streamed; then the logits of both, in float32 on random packed
rows, with a difference of at most TOLERANCE of their scale. The check writes and deletes nothing. On failure the
report names the first layer that differs, and which of its tensors.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megamm.checkpoint.folder import find_checkpoint
from megamm.checkpoint.whole_tensors import Described, Difference, difference, pairs
from megamm.common import device
from megamm.common.errors import UserError
from megamm.config import ModelConfig, RunConfig
from megamm.config.model import FUNCTION
from megamm.convert.families.config import read_model
from megamm.convert.families.tables import Family, leaves
from megamm.convert.io.digests import DIGESTS, check_digests
from megamm.convert.io.tensor_sources import AsTransformers, Native, OfFiles, Tensors, layer_of, not_finite
from megamm.convert.job.plan import SEGMENT
from megamm.convert.job.workers import Workers
from megamm.convert.verify import logits as compare
from megamm.convert.verify import shapes
from megamm.model.flops import parameter_count

log = logging.getLogger(__name__)
TOLERANCE = 1e-5
"""Relative to the largest logit; for hidden states, to the largest value of a layer's output."""
ROW_LENGTH = 128
"""Maximum tokens of a row; both models run in float32, one after the other."""
SHOWN = 3


@dataclass(frozen=True)
class Checks:
    """How much of a conversion is checked.

    logits: the gate also compares logits; refuse_nan: NaN and Inf are a UserError before the conversion; gate: if
    False, the output is read back, but not compared with its source.
    """

    logits: bool = True
    refuse_nan: bool = False
    gate: bool = True

    @property
    def need_models(self) -> bool:
        """Whether both models have to fit into memory, one after the other."""
        return self.gate and self.logits


@dataclass
class Report:
    """What was checked (`lines`) and what failed (`problems`), a sentence each."""

    checkpoint: Path
    folder: Path
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems

    def say(self, line: str, level: int = logging.INFO) -> None:
        """Add a line, and log it."""
        self.lines.append(line)
        log.log(level, "%s", line)


@dataclass
class _Compared:
    """Result of comparing tensors on both sides."""

    changed: dict[str, str] = field(default_factory=dict)
    """Names of the tensors that differ, with a sentence on each."""
    not_finite: list[str] = field(default_factory=list)
    kinds: dict[tuple[torch.dtype, torch.dtype], int] = field(default_factory=dict)
    """Number of tensors by the dtypes of both sides."""
    rounded: list[torch.dtype] = field(default_factory=list)
    """Dtypes that both models' weights must be rounded to before they are equal: the folder's, the checkpoint's."""

    def add(self, other: "_Compared") -> None:
        """Add the result for further tensors."""
        self.changed |= other.changed
        self.not_finite += other.not_finite
        for kind, count in other.kinds.items():
            self.kinds[kind] = self.kinds.get(kind, 0) + count


class GateError(Exception):
    """The result of a conversion is not the same model as its source. The files written are kept."""

    def __init__(self, report: Report, left: Path) -> None:
        self.report = report
        super().__init__(f"verification failed: {'; '.join(report.problems)}; the result is kept in {left}")


def check(native: Path, hugging_face: Path, *, logits: bool = True, nproc: int = 0) -> Report:
    """Compare a run or checkpoint with a transformers folder. Raises UserError if one of them is unreadable.

    nproc: processes that compare tensors, 0: one per core, but not more than there are SEGMENTs of bytes.
    """
    report = Report(find_checkpoint(native), hugging_face)  # it verifies the manifest's digests
    report.say("digests: the checkpoint matches its manifest")
    if (hugging_face / DIGESTS).is_file():
        check_digests(hugging_face)
        report.say(f"digests: the folder matches its {DIGESTS}")
    else:
        report.say(f"digests: the folder has no {DIGESTS}")
    own = Native(report.checkpoint)
    config = own.config
    family, model = read_model(hugging_face, config.data.seq_length)
    _configs(report, config, family, model)
    ours, theirs = AsTransformers(own, family, config.model), OfFiles(hugging_face)
    common, is_complete = _names(report, ours, theirs)
    done = _tensors(report, ours, theirs, common, nproc)
    if not logits:
        report.say("logits: check skipped (--no-logits)")
    elif not is_complete:
        report.say("logits: check skipped: the tensors of the two sides do not match")
    elif done.not_finite:
        report.say("logits: check skipped: weights contain NaN/Inf")
    else:
        _logits(report, own, done)
    return report


def end(native: Path, hugging_face: Path, left: Path, checks: Checks, nproc: int) -> None:
    """Check the conversion whose result is stored in `left`, as its last step. Raises GateError if it fails."""
    if not checks.gate:
        log.warning("verification skipped (--no-gate): the result has not been compared with its source")
        return
    report = check(native, hugging_face, logits=checks.logits, nproc=nproc)
    if not report.passed:
        raise GateError(report, left)


def refuse_not_finite(tensors: Tensors) -> None:
    """Raise UserError if a tensor has NaN or Inf, before anything is converted."""
    found = not_finite(tensors)
    if found:
        name, count = next(iter(found.items()))
        what = f"{len(found)} tensors contain NaN or Inf, the first is {name} ({count:,} values)"
        raise UserError(what, where=tensors.where, remedy="use an older checkpoint, or remove --refuse-nan")


def room_for_logits(config: RunConfig, vocabulary_size: int) -> None:
    """Raise UserError, before anything is converted, if a model in float32 does not fit into memory."""
    import psutil

    needed, free = 4.5 * parameter_count(config.model, vocabulary_size), psutil.virtual_memory().available
    if needed > free:
        what = f"the logit check needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        raise UserError(what, remedy="use a larger machine, or compare only the tensors with --no-logits")


def _configs(report: Report, config: RunConfig, family: Family, model: ModelConfig) -> None:
    """Report keys that change what the weights compute and differ between config.json and the checkpoint."""
    ours = dict(leaves(config.model.model_dump()))
    for key, value in leaves(model.model_dump(exclude_unset=True)):
        if key in (*FUNCTION, "tie_embeddings") and key not in family.unused and ours[key] != value:
            report.problems.append(f"config.json has {key} = {value}, but the checkpoint has {ours[key]}")


def _names(report: Report, ours: AsTransformers, theirs: OfFiles) -> tuple[dict[str, Described], bool]:
    """Tensors on both sides, and whether these are all. Additional padding rows in the folder's tables are allowed."""
    found = {}
    folder = report.folder
    lines = shapes.problems(shapes.read_config(folder), theirs.described, folder / "config.json")
    for name, entry in ours.described.items():
        other = theirs.described.get(name)
        if other is None:
            lines.append(f"{name} is missing in the folder")
        elif other.shape == entry.shape or (name in ours.tables and _is_padded(entry, other)):
            found[name] = entry
        else:
            lines.append(f"{name} has the shape {list(entry.shape)}, in the folder {list(other.shape)}")
    report.say(f"names and shapes: {len(found)} tensors are on both sides")
    if lines:
        report.problems.append(_shortened(list(dict.fromkeys(lines))))
    return found, not lines


def _is_padded(ours: Described, theirs: Described) -> bool:
    return theirs.shape[0] >= ours.shape[0] and theirs.shape[1:] == ours.shape[1:]


def _tensors(
    report: Report, ours: AsTransformers, theirs: OfFiles, names: dict[str, Described], nproc: int
) -> _Compared:
    done = _Compared()
    shares = list(_shares(names))
    try:
        with Workers(lambda: nullcontext((ours, theirs)), nproc, len(shares)) as workers:
            found = dict(workers.all(_compared, {number: (share,) for number, share in enumerate(shares)}))
    except BrokenProcessPool:
        what = "a process that compares tensors was killed"
        raise UserError(what, where=report.folder, remedy="check for enough free memory, and run it again") from None
    for number in range(len(shares)):
        done.add(found[number])
    for (mine, other), count in done.kinds.items():
        as_what = "bit for bit" if mine == other else f"the checkpoint's {mine} with the folder's {other}"
        report.say(f"tensors: {count} compared, {as_what}".replace("torch.", ""))
        if mine != other:
            done.rounded += [other, mine]
    if done.not_finite:
        said = f"tensors: {len(done.not_finite)} contain NaN or Inf, the first is {done.not_finite[0]}"
        report.say(said, logging.WARNING)
    if done.changed:
        first = min(done.changed, key=_depth)
        at = layer_of(first)
        where = "the first is outside of the layers" if at is None else f"the first layer that differs is layer {at}"
        of_it = [said for name, said in done.changed.items() if layer_of(name) == at]
        report.problems.append(f"{len(done.changed)} tensors differ, {where}: {_shortened(of_it)}")
    return done


def _shares(names: dict[str, Described]) -> Iterator[dict[str, Described]]:
    """Split the names, in order, into shares of about a segment's bytes."""
    share, elements = dict[str, Described](), 0
    for name, described in names.items():
        share[name], elements = described, elements + described.elements
        if 2 * elements >= SEGMENT:
            yield share
            share, elements = {}, 0
    if share:
        yield share


def _compared(sides: tuple[AsTransformers, OfFiles], names: dict[str, Described]) -> _Compared:
    ours, theirs = sides
    done = _Compared()
    for name, a, b in pairs(ours.read, theirs.read, names):
        done.kinds[a.dtype, b.dtype] = done.kinds.get((a.dtype, b.dtype), 0) + 1
        b = b[: len(a)] if name in ours.tables else b
        if not (_is_finite(a) and _is_finite(b)):
            done.not_finite.append(name)
        if found := _difference(name, a, b):
            done.changed[name] = f"{name}: {found.differing:,} of {a.numel():,} differ, by {found.max_abs:.3g} at most"
    return done


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite, without the memory that `isfinite` takes: aminmax returns NaN if one is NaN."""
    return not tensor.numel() or all(end.isfinite() for end in tensor.aminmax())


def _difference(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> Difference | None:
    """The difference; None where one is equal to the other after rounding to its dtype."""
    found = difference(name, ours.to(theirs.dtype), theirs)
    if found is None or ours.dtype == theirs.dtype:
        return found
    return difference(name, ours, theirs.to(ours.dtype))


def _depth(name: str) -> tuple[int, bool]:
    """Sort key in the order of the forward pass: the embedding, the layers, the last norm and the head."""
    layer = layer_of(name)
    return (-1 if "embed" in name else 1 << 30, True) if layer is None else (layer, False)


def _logits(report: Report, own: Native, done: _Compared) -> None:
    size, place = own.vocabulary_size, device.choose("cpu")
    rows = compare.random_rows(size, min(ROW_LENGTH, own.config.data.seq_length))
    with compare.our_model(report.checkpoint, place, done.rounded) as forward:
        ours = [forward(row) for row in rows]
    with compare.their_model(report.folder, place, done.rounded) as forward:
        theirs = [forward(row).of_first_ids(size) for row in rows]
    found = compare.relative_differences(ours, theirs)
    worst, tokens = found[compare.LOGITS], sum(len(each.stages[compare.LOGITS]) for each in ours)
    report.say(f"logits: differ by at most {worst:.1e} of their scale, {tokens} tokens in {len(rows)} rows")
    if worst <= TOLERANCE:
        return
    stages = list(found)
    first = next(number for number, stage in enumerate(stages) if not found[stage] <= TOLERANCE)
    before = f" (the stage before: {found[stages[first - 1]]:.1e})" if first else ""
    of_it = [said for name, said in done.changed.items() if _stage(name) == stages[first]]
    why = _shortened(of_it) if of_it else "its tensors are equal: config.json, the mapping or a model's code differs"
    report.problems.append(
        f"logits differ by {worst:.1e} of their scale, allowed is {TOLERANCE:.0e}; "
        f"the first stage that differs is {stages[first]}, by {found[stages[first]]:.1e}{before}: {why}"
    )


def _stage(name: str) -> str:
    """The first stage of a pass that uses the tensor."""
    depth, is_alone = _depth(name)
    return f"layer {depth}" if not is_alone else compare.EMBEDDING if depth < 0 else compare.LOGITS


def _shortened(lines: Sequence[str]) -> str:
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return ", ".join(lines[:SHOWN]) + more
